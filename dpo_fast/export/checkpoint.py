"""A checkpoint as it lies on disk: its files, the tensors in its safetensors, and whether they can be trusted."""

import json
import math
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpo_fast.errors import CheckpointError
from dpo_fast.files import copy_file

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
ADAPTER_CONFIG, ADAPTER_FILE = "adapter_config.json", "adapter_model.safetensors"
# What makes an ordinary Transformers folder. Pickles, optimizer states and logs stay behind.
FOLDER_PATTERNS = ("*.json", "*.txt", "*.model", "*.jinja", "*.md", "LICENSE*", "NOTICE*", "*.tiktoken")
CODE_PATTERNS = ("*.py",)
# The files of a tokenizer, which an adapter's folder may lack.
TOKENIZER_PATTERNS = ("tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json",
                      "chat_template.*", "*.tiktoken", "*.model")  # fmt: skip
TRAINING_FILES = frozenset({"trainer_state.json", "training_args.json", "optimizer.json"})
# safetensors' names of the dtypes that can be read by reference, with their size in bytes.
FLOAT_SIZES = {"F32": 4, "F16": 2, "BF16": 2}
# The integer of a float's size, and the bits of its exponent.
EXPONENTS = {"F32": (np.uint32, 0x7F800000), "F16": (np.uint16, 0x7C00), "BF16": (np.uint16, 0x7F80)}
FINITE_CHUNK = 1 << 18  # elements that are looked at together when weights are searched for NaN
HEADER_LIMIT = 100_000_000  # bytes; the safetensors format's own limit


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor's bytes lie.

    Attributes:
        file: the safetensors file's name, within the checkpoint's folder.
        offset: of its first byte in the file.
        length: in bytes.
        dtype: safetensors' name, such as "BF16".
        shape: as stored.
    """

    file: str
    offset: int
    length: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A Transformers or PEFT folder whose weights are safetensors.

    Attributes:
        folder: where it lies on this machine.
        source: what the user named: a Hub id, or the folder's own name.
        revision: the Hub's commit, or None for a local folder.
        tensors: by name, over all shards.
    """

    folder: Path
    source: str
    revision: str | None
    tensors: dict[str, StoredTensor]

    @property
    def weight_files(self) -> list[str]:
        """Names of the safetensors files, sorted."""
        return sorted({tensor.file for tensor in self.tensors.values()})

    @property
    def is_adapter(self) -> bool:
        """Whether it is a PEFT folder: an adapter of a base model that lies elsewhere."""
        return (self.folder / ADAPTER_CONFIG).is_file()


def open_checkpoint(name: str, revision: str | None = None, *, trust_remote_code: bool = False) -> Checkpoint:
    """Find a checkpoint by local folder or Hub id, and read what its safetensors hold.

    Args:
        name: a local folder, or a Hub id such as ``user/model``.
        revision: a branch, tag or commit; for Hub ids only.
        trust_remote_code: whether Python files of the checkpoint are taken along.

    Raises:
        CheckpointError: it does not exist, is no Transformers or PEFT folder, holds pickles only, or a file is damaged.
    """
    folder = Path(name)
    if folder.is_dir():
        if revision is not None:
            raise CheckpointError(f"{name}: a revision belongs to a Hub id, and this is a local folder; leave it out")
        source = folder.resolve().name
    elif folder.exists():
        raise CheckpointError(f"{name}: is a file; name the folder that holds config.json and model.safetensors")
    else:
        folder, revision = _download(name, revision, trust_remote_code)
        source = name
    # Beside a config.json too: Transformers would load the adapter, and not other weights that lie here.
    if (folder / ADAPTER_CONFIG).is_file():
        return Checkpoint(folder, source, revision, read_adapter_tensors(folder))
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{name}: holds no config.json, so it is no Transformers folder")
    return Checkpoint(folder, source, revision, read_tensors(folder))


def read_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a folder's safetensors by name, with every header checked against its file's size."""
    index = folder / INDEX_FILE
    if (folder / SINGLE_FILE).is_file():  # before an index, which an earlier save may have left: as Transformers does
        weight_map, files = None, [SINGLE_FILE]
    elif index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = sorted(set(weight_map.values()))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"{index}: is not an index of safetensors shards; save the checkpoint again"
            ) from error
        for file in files:
            if not isinstance(file, str) or Path(file).name != file:
                raise CheckpointError(
                    f"{index}: names the shard {file!r}, which is no plain file name; do not trust this checkpoint"
                )
            if not (folder / file).is_file():
                raise CheckpointError(f"{folder}: the shard {file!r} is missing, and {INDEX_FILE} names it; copy it")
    else:
        pickles = sorted(path.name for path in folder.glob("*.bin")) + sorted(
            path.name for path in folder.glob("*.pt*")
        )
        if pickles:
            raise CheckpointError(
                f"{folder}: holds {pickles[0]}, a pickle, which can run code when it is loaded, and no safetensors; "
                'convert it where you trust it: python -c "from transformers import AutoModelForCausalLM as M; '
                f'M.from_pretrained({str(folder)!r}).save_pretrained({str(folder) + "-safetensors"!r})"'
            )
        raise CheckpointError(
            f"{folder}: holds neither {SINGLE_FILE} nor {INDEX_FILE}; save the model there with save_pretrained"
        )
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in _read_header(folder / file).items():
            if name in tensors:
                raise CheckpointError(f"{folder}: the tensor {name!r} is in {tensors[name].file} and in {file}")
            tensors[name] = tensor
    missing = sorted(set(weight_map or ()) - set(tensors))
    if missing:
        raise CheckpointError(f"{folder}: {INDEX_FILE} promises the tensor {missing[0]!r}, which no shard holds")
    return tensors


def read_adapter_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a PEFT folder's adapter by name, with the header checked against the file's size."""
    if not (folder / ADAPTER_FILE).is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        raise CheckpointError(
            f"{folder}: holds {ADAPTER_CONFIG} and no {ADAPTER_FILE}"
            + ", only adapter_model.bin, a pickle, which can run code when it is loaded" * pickled
            + "; save the adapter with PEFT's save_pretrained, which writes safetensors"
        )
    return _read_header(folder / ADAPTER_FILE)


def _read_header(path: Path) -> dict[str, StoredTensor]:
    """One safetensors file's tensors: 8 bytes of header size, the header in JSON, then the bytes."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        header_size = int.from_bytes(start, "little")
        if len(start) < 8 or header_size > min(HEADER_LIMIT, size - 8):
            raise CheckpointError(
                f"{path}: is truncated or no safetensors file: {size} bytes, too few for its header; copy it again"
            )
        first = 8 + header_size
        try:
            header = json.loads(file.read(header_size))
            header.pop("__metadata__", None)
            tensors = {name: _stored_tensor(path.name, first, entry) for name, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path}: its safetensors header is damaged; copy the file again") from error
    # The format's rule: the tensors fill the file from the header to the end, with no gap and no overlap.
    position = first
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].length)):
        if tensor.offset + tensor.length > size:
            raise CheckpointError(
                f"{path}: is truncated: the tensor {name!r} ends at byte {tensor.offset + tensor.length}, "
                f"the file at {size}; copy it again"
            )
        if tensor.offset != position:
            raise CheckpointError(
                f"{path}: the tensor {name!r} begins at byte {tensor.offset}, and the one before it ends at "
                f"{position}; the file is damaged: copy it again"
            )
        position += tensor.length
        width = FLOAT_SIZES.get(tensor.dtype)
        if width is not None and tensor.length != width * math.prod(tensor.shape):
            raise CheckpointError(
                f"{path}: the tensor {name!r} of shape {list(tensor.shape)} and dtype {tensor.dtype} has "
                f"{tensor.length} bytes; the file is damaged: copy it again"
            )
    if position != size:
        raise CheckpointError(
            f"{path}: has {size - position} bytes behind its last tensor; the file is damaged: copy it again"
        )
    return tensors


def _stored_tensor(file: str, first: int, entry: dict[str, Any]) -> StoredTensor:
    """One entry of a header whose data begins at byte `first`; ValueError if it is not what the format says."""
    begin, end = entry["data_offsets"]
    shape, dtype = entry["shape"], entry["dtype"]
    if not isinstance(dtype, str) or any(type(number) is not int or number < 0 for number in (begin, end, *shape)):
        raise ValueError(entry)
    if end < begin:
        raise ValueError(entry)
    return StoredTensor(file, first + begin, end - begin, dtype, tuple(shape))


def check_finite(checkpoint: Checkpoint) -> None:
    """Refuse weights that hold NaN or infinity.

    A floating-point number is neither exactly if its exponent's bits are not all set, which integers can test for
    float32, float16 and bfloat16 alike.

    Raises:
        CheckpointError: with the tensor, the position and the file.
    """
    # Reading and comparing release the interpreter, so tensors are searched side by side.
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for _ in threads.map(lambda name: _check_finite(checkpoint, name), checkpoint.tensors):
            pass


def _check_finite(checkpoint: Checkpoint, name: str) -> None:
    """Refuse one tensor, as `check_finite` does."""
    tensor = checkpoint.tensors[name]
    if tensor.dtype not in EXPONENTS:
        return
    bits, exponent = EXPONENTS[tensor.dtype]
    # Read, not mapped: mapped pages would count as this process's memory. Chunks stay in the processor's cache.
    chunk, exponents = np.empty(FINITE_CHUNK, bits), np.empty(FINITE_CHUNK, bits)
    remaining = tensor.length // chunk.itemsize
    with (checkpoint.folder / tensor.file).open("rb", buffering=0) as file:
        file.seek(tensor.offset)
        while remaining:
            count = file.readinto(chunk[: min(remaining, FINITE_CHUNK)].data.cast("B")) // chunk.itemsize
            if not count:
                raise CheckpointError(f"{checkpoint.folder / tensor.file}: became shorter while it was read; try again")
            found = np.bitwise_and(chunk[:count], exponent, out=exponents[:count])
            if found.max() == exponent:
                start = tensor.length // chunk.itemsize - remaining
                position = np.unravel_index(start + int((found == exponent).argmax()), tensor.shape)
                raise CheckpointError(
                    f"{checkpoint.folder / tensor.file}: the tensor {name!r} is NaN or infinite at "
                    f"{[int(i) for i in position]}; export a checkpoint whose training did not diverge"
                )
            remaining -= count


def same_bytes(checkpoint: Checkpoint, one: str, other: str) -> bool:
    """Whether two stored tensors are equal, bit for bit."""
    first, second = (checkpoint.tensors[name] for name in (one, other))
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    return first.length == 0 or _stored_bytes(checkpoint, first).data == _stored_bytes(checkpoint, second).data


def _stored_bytes(checkpoint: Checkpoint, tensor: StoredTensor) -> "np.memmap[Any, np.dtype[np.uint8]]":
    """A tensor's bytes as they lie in the file, read as they are looked at; not for empty tensors."""
    return np.memmap(checkpoint.folder / tensor.file, np.uint8, "r", tensor.offset, (tensor.length,))


def folder_files(checkpoint: Checkpoint, *, trust_remote_code: bool) -> Iterator[Path]:
    """The files of a checkpoint that belong to an ordinary Transformers folder, weights included.

    Raises:
        CheckpointError: a file's name is no plain text.
    """
    patterns = (*FOLDER_PATTERNS, *(CODE_PATTERNS if trust_remote_code else ()))
    names = {
        path.name
        for pattern in patterns
        for path in checkpoint.folder.glob(pattern)
        if path.is_file() and path.name not in TRAINING_FILES
    }
    for name in sorted(names | set(checkpoint.weight_files)):
        if not name.isprintable():  # control characters, or bytes that are no UTF-8: no manifest can hold them
            raise CheckpointError(f"{checkpoint.folder}: the file name {name!r} holds no plain text; rename the file")
        yield checkpoint.folder / name


def copy_folder(checkpoint: Checkpoint, target: Path, *, trust_remote_code: bool, link: bool = False) -> None:
    """Copy a checkpoint's files, bit for bit.

    The Hub's cache never changes a file in place, so its blobs are hard-linked where the disk allows; a local folder
    may be written over by the next training run, so it is copied, unless `link` says that its weights will stay as
    they are. Symbolic links are never made: engines refuse them.
    """
    target.mkdir(parents=True)
    from_hub, weights = checkpoint.revision is not None, set(checkpoint.weight_files)
    for source in folder_files(checkpoint, trust_remote_code=trust_remote_code):
        copy_file(source.resolve(), target / source.name, link=from_hub or (link and source.name in weights))


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a folder's tokenizer, without what the target has."""
    for pattern in TOKENIZER_PATTERNS:
        for path in sorted(source.glob(pattern)):
            if not (target / path.name).exists():
                copy_file(path.resolve(), target / path.name)


def _download(name: str, revision: str | None, trust_remote_code: bool) -> tuple[Path, str]:
    """Fetch a Hub repository's Transformers files; the folder of the snapshot and its commit."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith((".", "/")):
        raise CheckpointError(f"{name!r}: no such folder, and no Hub id such as user/model either")
    patterns = [*FOLDER_PATTERNS, "*.safetensors", *(CODE_PATTERNS if trust_remote_code else ())]
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError, HFValidationError) as error:
        reason = re.sub(r"hf_\w+", "hf_…", str(error).strip().splitlines()[0] if str(error).strip() else "")[:200]
        at = f" at revision {revision!r}" if revision else ""
        raise CheckpointError(
            f"{name}{at}: no such folder here, and the Hub could not give it ({type(error).__name__}: {reason}); "
            "check the name, the network and `hf auth login`"
        ) from error
    return folder, folder.name
