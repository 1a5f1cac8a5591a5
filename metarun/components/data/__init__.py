"""Data sets: `data=<name>`."""
