"""Films a prompt: python scripts/animate.py --prompt "a sks dog wearing headphones surfing"."""

import sys

from cdvideo.cli import run_main
from cdvideo.sampling.animate import main

if __name__ == "__main__":
    sys.exit(run_main(main))
