"""The command line for `python -m replay`, where the command `replay` is not on the path."""

import sys

from replay.cli import main

if __name__ == "__main__":
    sys.exit(main())
