"""`python -m fastbptt` is the command `fastbptt`."""

from __future__ import annotations

import sys

from fastbptt.cli import main

if __name__ == "__main__":
    sys.exit(main())
