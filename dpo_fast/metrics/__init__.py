"""From scores to metrics, in NumPy alone: rewards, losses, statistics."""
