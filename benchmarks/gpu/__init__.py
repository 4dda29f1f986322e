"""dpo_fast against its peers on an NVIDIA GPU: see `__main__.py`."""
