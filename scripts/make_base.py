"""Make the embedded base: render the world, train all parts, export. See configs/base/ and cdvideo/world/make_base.py."""

import sys

from cdvideo.cli import run_main
from cdvideo.world.make_base import main

if __name__ == "__main__":
    sys.exit(run_main(main))
