"""While a training goes on: its evaluations on an engine (`DPOFastCallback`), its checkpoints scored (`watch`)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpo_fast.training.callback import DPOFastCallback

__all__ = ["DPOFastCallback"]


def __getattr__(name: str) -> Any:
    """The callback, loaded when it is asked for: `dpo-fast watch` needs no trainer."""
    if name == "DPOFastCallback":
        from dpo_fast.training.callback import DPOFastCallback

        return DPOFastCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
