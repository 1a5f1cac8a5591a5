"""One run on disk: its directory, checkpoints and log of metrics."""

SWEEP_FILE = "sweep.json"
"""In a sweep's directory: what was launched, and how it ended."""
