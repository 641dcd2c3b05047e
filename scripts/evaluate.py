"""Measure the embedded base (`base`), compare ways to learn a concept (`study`), train what measures (`train-...`)."""

import sys

from cdvideo.cli import run_main
from cdvideo.evaluation.main import main

if __name__ == "__main__":
    sys.exit(run_main(main))
