"""Tries out what cdvideo needs on this machine: python scripts/doctor.py."""

import sys

from cdvideo.cli import run_main
from cdvideo.doctor import main

if __name__ == "__main__":
    sys.exit(run_main(main))
