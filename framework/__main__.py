"""``python -m framework`` is the same as the console script ``armillary``."""

import sys

from framework.cli import main

if __name__ == "__main__":
    sys.exit(main())
