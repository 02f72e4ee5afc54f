"""`python -m titan_video.data`: the former name of `python -m titan_video.ingest`."""

import sys

from titan_video.ingest.__main__ import main

if __name__ == "__main__":
    main(sys.argv[1:])
