"""Where what is worth keeping between runs lies: token ids and reference scores. All of it can be made again."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dpo_fast.errors import StorageError
from dpo_fast.files import storage_errors

VARIABLE = "DPO_FAST_CACHE"


def cache_folder() -> Path:
    """The folder that the environment variable DPO_FAST_CACHE names, or else `dpo_fast` in the user's cache folder."""
    chosen = os.environ.get(VARIABLE)
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dpo_fast"


@contextmanager
def cache_errors(target: Path) -> Iterator[None]:
    """Turn what a disk says of a cached file into our error, which names the way to another disk.

    Raises:
        StorageError: the disk refused.
    """
    try:
        with storage_errors(target):
            yield
    except StorageError as error:
        raise StorageError(f"{error} ({VARIABLE} names the cache's folder)") from error
