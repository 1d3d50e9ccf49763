"""`python -m blip2` is the command `blip2`."""

import sys

from blip2.cli import main

if __name__ == "__main__":
    sys.exit(main())
