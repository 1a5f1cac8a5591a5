"""Networks: `backbone=<name>`."""
