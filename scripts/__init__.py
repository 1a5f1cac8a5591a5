"""Programs around the project: benchmarks, campaigns, generators. None is installed."""
