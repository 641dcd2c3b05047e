"""Measure the embedded base (`evaluate.py base`), and train the judge that does it (`evaluate.py train-judge`)."""

import sys

from cdvideo.cli import run_main
from cdvideo.evaluation.main import main

if __name__ == "__main__":
    sys.exit(run_main(main))
