"""Outer optimizers: `outer_opt=<name>`."""
