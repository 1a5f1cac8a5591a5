"""Algorithms: `algo=<name>`."""
