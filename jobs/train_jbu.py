"""The older name of featup train."""

import sys

from .train import main

if __name__ == "__main__":
    sys.exit(main())
