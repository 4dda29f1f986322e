"""The files of a model folder that are published, and what must not be among them."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

from dpo_fast.errors import CheckpointError
from dpo_fast.text import one_line

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")
# Formats that run code when they are loaded; a Trainer leaves several of them beside the weights.
PICKLE_SUFFIXES = frozenset({".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth"})


def model_files(folder: Path) -> dict[str, Path]:
    """The files of a whole model's folder, by path within it.

    Raises:
        CheckpointError: the first of `problems_of`.
    """
    for problem in problems_of(folder):
        raise problem
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def problems_of(folder: Path) -> Iterator[CheckpointError]:
    """Everything that keeps a folder from being published: it is no whole model, or holds what nobody means to send."""
    if not folder.is_dir():
        yield CheckpointError(f"{str(folder)!r} is not a folder; give the folder of a saved model")
        return
    root = folder.resolve()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        shown = one_line(repr(str(name)))
        if any(part.startswith(".") for part in name.parts):
            yield CheckpointError(f"{shown} in {str(folder)!r} is a hidden file, not published: move or delete it")
        # realpath, as resolve() raises on a link that leads to itself.
        elif not Path(os.path.realpath(path)).is_relative_to(root):
            yield CheckpointError(f"{shown} in {str(folder)!r} links to a file outside of it: put a copy in its place")
        elif path.suffix.lower() in PICKLE_SUFFIXES:
            yield CheckpointError(f"{shown} in {str(folder)!r} may be a pickle, not published: move or delete it")
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        yield CheckpointError(f"{str(folder)!r} has no config.json: give a folder that save_pretrained wrote")
    if not any(folder.glob("*.safetensors")):
        yield CheckpointError(f"{str(folder)!r} has no *.safetensors: save the model with safe serialization")
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        yield CheckpointError(f"{str(folder)!r} has no tokenizer: save the tokenizer beside the model")
    yield from _shard_problems(folder)


def _shard_problems(folder: Path) -> Iterator[CheckpointError]:
    """A sharded model of which a shard is missing."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        yield CheckpointError(f"{str(index)!r} is not an index of shards: save the model again")
        return
    for shard in sorted(map(str, shards)):
        if not (folder / shard).is_file():
            yield CheckpointError(f"{one_line(repr(shard))}, a shard in {str(index)!r}, is missing: save it again")
