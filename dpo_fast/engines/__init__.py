"""Inference engines: each turns a batch into per-token scores."""
