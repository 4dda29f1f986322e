"""Runs of the same pairs, compared pair by pair: `dpo-fast compare`."""
