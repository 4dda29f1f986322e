"""Evaluate DPO-trained language models on inference engines, with TRL's numbers."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpo_fast.training import DPOFastCallback as DPOFastCallback

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """The callback for trainers, which loads torch, and so only when it is asked for."""
    if name == "DPOFastCallback":
        from dpo_fast.training import DPOFastCallback

        return DPOFastCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
