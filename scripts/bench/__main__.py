"""`python scripts/bench`."""

import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    # The package instead of its folder: its modules then have no names of the whole world.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from bench.cli import main

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that no process stays behind
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
