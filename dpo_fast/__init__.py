"""Evaluate DPO-trained language models on inference engines, with TRL's numbers."""

__version__ = "0.1.0"
