"""`python -m titan_video.planner.dry_run`: see run.py."""

import sys

from titan_video.planner.dry_run.run import main

if __name__ == "__main__":
    main(sys.argv[1:])
