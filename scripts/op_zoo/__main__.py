"""`python scripts/op_zoo`: every operation as an inner loss, against finite differences.

    python scripts/op_zoo                     # all of it, and docs/operations.md
    python scripts/op_zoo --only linalg       # names that contain this; prints, writes nothing

Goes on where it was interrupted, as long as its file of results is there.
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    # The package instead of its folder: its modules then have no names of the whole world.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from op_zoo.run import main

    main(
        argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    )
