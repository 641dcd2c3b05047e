"""Time things against their peers: `sampler`, `decode`, `length`, `concepts`, `training-step`, `memory`."""

import sys

from cdvideo.cli import run_main
from cdvideo.evaluation.benchmark_main import main

if __name__ == "__main__":
    sys.exit(run_main(main))
