"""Every setting: schemas, checks, and how Hydra composes them."""
