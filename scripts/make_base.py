"""Make the embedded base: render the world, train all parts, export. Settings: configs/base/."""

import sys

if __name__ == "__main__":  # imports too: the processes that render load this file, and need none of it
    from cdvideo.cli import run_main
    from cdvideo.world.main import main

    sys.exit(run_main(main))
