"""Many runs: plans, jobs, searches."""
