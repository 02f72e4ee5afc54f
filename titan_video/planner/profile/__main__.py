"""`python -m titan_video.planner.profile`: see machine.py."""

import sys

from titan_video.planner.profile.machine import main

if __name__ == "__main__":
    main(sys.argv[1:])
