"""metarun: few-shot meta-learning experiments from the command line, and their engine."""

__version__ = "0.2.0"
