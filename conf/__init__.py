"""The Hydra configs, shipped as the package `metarun.conf`."""
