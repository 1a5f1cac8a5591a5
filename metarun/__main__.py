"""`python -m metarun`, and the command `metarun`."""

import sys

from metarun.cli.main import main
from metarun.system.lifetime import end_at_once


def command() -> None:
    """Be the command line: end this process with its exit code."""
    code = main()
    end_at_once(code)
    sys.exit(code)


if __name__ == "__main__":
    command()
