"""Does an engine still make the original's decisions? Numbers and a verdict from scores, in NumPy alone."""
