"""`python scripts/bench`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # The package instead of its folder: its modules then have no names of the whole world.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from bench.cli import main

    sys.exit(main())
