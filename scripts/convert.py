"""Converts concepts and adapters: python scripts/convert.py FILE --to kohya."""

import sys

from cdvideo.cli import run_main
from cdvideo.interchange.main import main

if __name__ == "__main__":
    sys.exit(run_main(main))
