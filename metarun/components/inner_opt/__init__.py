"""Inner optimizers: `inner_opt=<name>`."""
