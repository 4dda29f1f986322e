"""What a run's numbers speak for: `dpo-fast advise`."""
