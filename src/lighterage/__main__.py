"""`python -m lighterage` is the command `lighterage`."""

from __future__ import annotations

import sys

from lighterage.cli import main

if __name__ == "__main__":
    sys.exit(main())
