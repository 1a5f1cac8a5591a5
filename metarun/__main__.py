"""`python -m metarun`."""

import sys

from metarun.cli import main

sys.exit(main())
