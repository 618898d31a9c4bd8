"""What `scripts/gpu_check` runs: a module per stage, and what they share."""
