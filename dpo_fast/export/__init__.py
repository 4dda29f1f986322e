"""From Transformers checkpoints to log-prob graphs that point into the checkpoints' own weights."""
