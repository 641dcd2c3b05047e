"""Teach a base one thing from a few pictures: writes a concept file, contact sheets and the course of the losses."""

import sys

from cdvideo.cli import run_main
from cdvideo.recipes import train_concept_main

if __name__ == "__main__":
    sys.exit(run_main(train_concept_main))
