"""What `scripts/gpu_check.sh` runs beside the tests, the benchmark and trainings."""
