"""Published figures, and the runs that reproduce them: `metarun reproduce`."""
