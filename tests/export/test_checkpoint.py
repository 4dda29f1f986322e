"""Checkpoints on disk: what is read agrees with safetensors' own reader, and what is damaged is refused by name."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tiny_models import copy_checkpoint, make_pair

from dpo_fast.errors import CheckpointError
from dpo_fast.export import checkpoint
from dpo_fast.export.checkpoint import Checkpoint, check_finite, copy_folder, open_checkpoint, read_tensors, same_bytes

from .binding import opened

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def refusal(action: Callable[[], object]) -> str:
    """The message of the CheckpointError that an action raises: one line."""
    with pytest.raises(CheckpointError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    return message


def stored_bytes(folder: Path, name: str) -> bytes:
    """A tensor's bytes, where the checkpoint says that they lie."""
    tensor = read_tensors(folder)[name]
    content = (folder / tensor.file).read_bytes()
    return content[tensor.offset : tensor.offset + tensor.length]


def write_weights(folder: Path, tensors: dict[str, torch.Tensor], name: str = WEIGHTS) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / name, metadata={"format": "pt"})
    (folder / "config.json").write_text("{}")
    return folder


def write_raw(folder: Path, header: object, data: bytes = b"\0" * 16) -> Path:
    """A safetensors file of a header of our choice."""
    folder.mkdir(exist_ok=True)
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data)
    return folder


def entry(begin: Any = 0, end: Any = 16, shape: Any = (4,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_lie_where_safetensors_says(tmp_path: Path, dtype: str) -> None:
    torch.manual_seed(0)
    tensors = {name: torch.randn(shape).to(DTYPES[dtype]) for name, shape in {"b": (3, 5), "a": (7,), "c": ()}.items()}
    found = read_tensors(write_weights(tmp_path / "folder", tensors))
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (dtype, tuple(tensor.shape))
        expected = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert stored_bytes(tmp_path / "folder", name) == expected


def test_shards_are_read_as_one(tmp_path: Path) -> None:
    policy, _ = make_pair(tmp_path, shards=3)
    found = open_checkpoint(str(policy))
    assert found.weight_files == sorted(path.name for path in policy.glob("*.safetensors"))
    assert len(found.weight_files) > 1
    for file in found.weight_files:
        for name, tensor in load_file(policy / file).items():
            assert found.tensors[name].file == file
            assert stored_bytes(policy, name) == tensor.numpy().tobytes()
    assert len(found.tensors) == len(json.loads((policy / INDEX).read_text())["weight_map"])


def test_a_single_file_goes_before_a_stale_index(tmp_path: Path) -> None:
    """Transformers loads model.safetensors where both are there, and so must we: the graph is of those weights."""
    folder = write_weights(tmp_path / "folder", {"a": torch.ones(2)})
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    assert read_tensors(folder)["a"].file == WEIGHTS


def test_a_local_folder_is_named_by_itself(tiny_pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_pair[0])
    found = open_checkpoint(".")
    assert (found.source, found.revision) == ("policy", None)
    assert "a revision belongs to a Hub id" in refusal(lambda: open_checkpoint(".", "main"))


def test_names_that_lead_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("user/no-such-model", "no-such-model"):
        message = refusal(lambda name=name: open_checkpoint(name))
        assert message.startswith(f"{name}: no such folder here, and the Hub could not give it")
    assert "at revision 'v2'" in refusal(lambda: open_checkpoint("user/no-such-model", "v2"))
    for name in ("/no/such/folder", "./nothing", "a/b/c", "user/model\nname"):
        assert f"{name!r}: no such folder, and no Hub id" in refusal(lambda name=name: open_checkpoint(name))
    (tmp_path / "file").write_text("")
    assert "file: is a file; name the folder" in refusal(lambda: open_checkpoint("file"))


def test_a_token_in_a_hub_error_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise OSError("401 for hf_abcdefSECRET\nand a page of advice")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    message = refusal(lambda: open_checkpoint("user/private"))
    assert "SECRET" not in message
    assert "advice" not in message
    assert "`hf auth login`" in message


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, "holds no config.json"),
        ({"adapter_config.json": "{}"}, "holds adapter_config.json and no adapter_model.safetensors"),
        # Transformers would load the adapter, and not these weights.
        ({"adapter_config.json": "{}", "config.json": "{}", WEIGHTS: ""}, "and no adapter_model.safetensors; save the"),
        ({"config.json": "{}"}, f"holds neither {WEIGHTS} nor {INDEX}; save the model there with save_pretrained"),
        ({"config.json": "{}", "pytorch_model.bin": ""}, "convert it where you trust it: python -c"),
        ({"config.json": "{}", "model.pth": ""}, "holds model.pth, a pickle, which can run code"),
    ],
)
def test_folders_that_are_no_checkpoint(tmp_path: Path, files: dict[str, str], expected: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    message = refusal(lambda: open_checkpoint(str(tmp_path)))
    assert str(tmp_path) in message
    assert expected in message


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ({"a": entry(0, 32, [8])}, "the tensor 'a' ends at byte"),
        ({"a": entry(1 << 40, (1 << 40) + 16)}, "is truncated"),
        ({"a": entry(-8, 8)}, "header is damaged"),
        ({"a": entry(16, 0)}, "header is damaged"),
        ({"a": entry(0.0, 16)}, "header is damaged"),
        ({"a": entry(False, 16)}, "header is damaged"),
        ({"a": entry(shape=[-4])}, "header is damaged"),
        ({"a": entry(shape=[float("inf")])}, "header is damaged"),
        ({"a": entry(shape="4")}, "header is damaged"),
        ({"a": entry(shape=[1 << 70])}, "has 16 bytes"),
        ({"a": entry(shape=[3])}, "the tensor 'a' of shape [3] and dtype F32 has 16 bytes"),
        ({"a": entry(dtype=["F32"])}, "header is damaged"),
        ({"a": entry(0, 12, [3])}, "4 bytes behind its last tensor"),
        ({"a": entry(4, 16, [3])}, "the tensor 'a' begins at byte"),
        ({"a": entry(0, 16), "b": entry(8, 16, [2])}, "the tensor 'b' begins at byte"),
        ({"a": entry(0, 4, [1]), "b": entry(8, 16, [2])}, "the tensor 'b' begins at byte"),
        ({"a": {"dtype": "F32", "shape": [4]}}, "header is damaged"),
        ({"a": 3}, "header is damaged"),
        ({}, "16 bytes behind its last tensor"),
        ([], "header is damaged"),
        ("text", "header is damaged"),
        (b"not JSON", "header is damaged"),
        (b"\xff\xfe{}", "header is damaged"),
        (b"[" * 100_000, "header is damaged"),
    ],
)
def test_headers_that_lie(tmp_path: Path, header: object, expected: str) -> None:
    """safetensors' own reader refuses each of them too."""
    folder = write_raw(tmp_path, header)
    message = refusal(lambda: read_tensors(folder))
    assert expected in message
    assert str(folder / WEIGHTS) in message
    with pytest.raises((SafetensorError, OverflowError)):
        safe_open(folder / WEIGHTS, "np").keys()


@pytest.mark.parametrize("size", [0, 1, 7, 8, 100])
def test_a_file_cut_in_the_header(tiny_pair: tuple[Path, Path], tmp_path: Path, size: int) -> None:
    content = (tiny_pair[0] / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(content[:size])
    assert f"{size} bytes, too few for its header; copy it again" in refusal(lambda: read_tensors(tmp_path))


def test_a_header_size_beyond_all_bounds(tmp_path: Path) -> None:
    """A size of 2^63 is neither read nor allocated, and nor is one above the format's limit in a sparse file."""
    (tmp_path / WEIGHTS).write_bytes((1 << 63).to_bytes(8, "little") + b"{}")
    assert "too few for its header" in refusal(lambda: read_tensors(tmp_path))
    with (tmp_path / WEIGHTS).open("r+b") as file:
        file.write((200_000_000).to_bytes(8, "little"))
        file.truncate(300_000_000)
    assert "no safetensors file" in refusal(lambda: read_tensors(tmp_path))


@given(cut=st.integers(1, 2000))
@settings(max_examples=30)
def test_a_file_cut_in_the_data_names_the_tensor(tiny_pair: tuple[Path, Path], cut: int) -> None:
    tensors = read_tensors(tiny_pair[0])
    size = (tiny_pair[0] / WEIGHTS).stat().st_size
    first_cut = min((t.offset, name) for name, t in tensors.items() if t.offset + t.length > size - cut)[1]
    folder = tiny_pair[0].parent / "cut"
    folder.mkdir(exist_ok=True)
    (folder / WEIGHTS).write_bytes((tiny_pair[0] / WEIGHTS).read_bytes()[:-cut])
    message = refusal(lambda: read_tensors(folder))
    assert f"is truncated: the tensor {first_cut!r} ends at byte" in message
    assert f"the file at {size - cut}" in message


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        ({"weight_map": {"a": "gone.safetensors"}}, "the shard 'gone.safetensors' is missing"),
        ({"weight_map": {"a": "../evil.safetensors"}}, "'../evil.safetensors', which is no plain file name"),
        ({"weight_map": {"a": "/etc/passwd"}}, "which is no plain file name"),
        ({"weight_map": {"a": "sub/one.safetensors"}}, "which is no plain file name"),
        ({"weight_map": {"a": ".."}}, "the shard '..' is missing"),
        ({"weight_map": {"a": "x\ny"}}, r"the shard 'x\ny' is missing"),
        ({"weight_map": {"a": 3}}, "the shard 3, which is no plain file name"),
        ({"weight_map": {"a": ["one.safetensors"]}}, "is not an index"),
        ({"weight_map": ["one.safetensors"]}, "is not an index"),
        ({"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}, "promises the tensor 'b'"),
        ({"weight_map": {"a": "one.safetensors", "c": "two.safetensors"}}, "'a' is in one.safetensors and in two"),
        ({}, "is not an index"),
        ([], "is not an index"),
        ("{", "is not an index"),
        ("[" * 100_000, "is not an index"),
    ],
)
def test_indexes_that_lie(tmp_path: Path, index: object, expected: str) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "evil.safetensors")
    folder = tmp_path / "folder"
    write_weights(folder, {"a": torch.ones(2)}, "one.safetensors")
    write_weights(folder, {"a": torch.ones(2), "c": torch.ones(2)}, "two.safetensors")
    (folder / INDEX).write_text(index if isinstance(index, str) else json.dumps(index))
    assert expected in refusal(lambda: open_checkpoint(str(folder)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_that_are_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, value: float) -> None:
    """Found in any chunk, and named by tensor and position; the largest finite numbers pass."""
    monkeypatch.setattr(checkpoint, "FINITE_CHUNK", 16)
    kind = DTYPES[dtype]
    tensors = {"fine": torch.full((3, 7), torch.finfo(kind).max, dtype=kind), "bad": torch.zeros(5, 9, dtype=kind)}
    check_finite(opened(write_weights(tmp_path, tensors)))
    tensors["bad"][3, 4] = value
    message = refusal(lambda: check_finite(opened(write_weights(tmp_path, tensors))))
    assert "the tensor 'bad' is NaN or infinite at [3, 4]" in message
    assert str(tmp_path / WEIGHTS) in message


def test_unaligned_and_empty_and_scalar_tensors_are_searched(tmp_path: Path) -> None:
    """A header of any length is allowed, so that a float32 may begin at any byte; safetensors' own writer pads."""
    names = {"empty": entry(0, 0, [0]), "scalar": entry(0, 4, []), "bad": entry(4, 12, [2])}
    header = json.dumps(names).encode()
    header += b" " * (1 - len(header) % 4)  # the data begin 1 byte past a multiple of 4
    folder = write_raw(tmp_path, header, np.array([1, 2, np.nan], np.float32).tobytes())
    tensors = read_tensors(folder)
    assert tensors["bad"].offset % 4 != 0
    assert "'bad' is NaN or infinite at [1]" in refusal(lambda: check_finite(opened(folder)))
    folder = write_raw(tmp_path, header, np.array([np.nan, 2, 3], np.float32).tobytes())
    assert "'scalar' is NaN or infinite at []" in refusal(lambda: check_finite(opened(folder)))


def test_same_bytes(tmp_path: Path) -> None:
    one = torch.arange(6.0)
    tensors = {"one": one, "same": one.clone(), "other": one + 1, "shape": one.reshape(2, 3).clone()}
    tensors |= {"empty": torch.ones(0), "void": torch.ones(0)}
    found = opened(write_weights(tmp_path, tensors))
    assert same_bytes(found, "one", "same")
    assert same_bytes(found, "empty", "void")
    assert not same_bytes(found, "one", "other")
    assert not same_bytes(found, "one", "shape")


def test_a_copy_holds_what_belongs_to_the_model(tiny_pair: tuple[Path, Path], tmp_path: Path) -> None:
    source = copy_checkpoint(tiny_pair[0], tmp_path / "source")
    kept = {"LICENSE", "chat_template.jinja", "README.md", "vocab.txt"} | {path.name for path in source.iterdir()}
    left = {"optimizer.pt", "training_args.bin", "trainer_state.json", "modeling.py", "other.safetensors", "rng.pth"}
    for name in kept | left:
        path = source / name
        if not path.exists():
            path.write_text(name)
    (source / "runs").mkdir()
    (source / "runs" / "events.json").write_text("{}")
    copy_folder(opened(source), tmp_path / "copy", trust_remote_code=False)
    assert {path.name for path in (tmp_path / "copy").iterdir()} == kept
    for name in kept:
        assert (tmp_path / "copy" / name).read_bytes() == (source / name).read_bytes()
        assert not (tmp_path / "copy" / name).samefile(source / name)
    copy_folder(opened(source), tmp_path / "with_code", trust_remote_code=True)
    assert {path.name for path in (tmp_path / "with_code").iterdir()} == kept | {"modeling.py"}


def test_a_hub_snapshot_is_hard_linked_and_never_a_symbolic_link(tiny_pair: tuple[Path, Path], tmp_path: Path) -> None:
    """The cache is a folder of links to blobs; engines refuse symbolic links that lead out of a bundle."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123abcd"
    copy_checkpoint(tiny_pair[0], blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(path)
    found = Checkpoint(snapshot, "user/model", "0123abcd", read_tensors(snapshot))
    copy_folder(found, tmp_path / "copy", trust_remote_code=False)
    for path in (tmp_path / "copy").iterdir():
        assert not path.is_symlink()
        assert path.samefile(blobs / path.name)


def test_another_disk_is_copied_to(
    tiny_pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, target: Path) -> None:
        raise OSError(18, os.strerror(18))  # EXDEV

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    found = Checkpoint(tiny_pair[0], "user/model", "0123abcd", read_tensors(tiny_pair[0]))
    copy_folder(found, tmp_path / "copy", trust_remote_code=False)
    assert (tmp_path / "copy" / WEIGHTS).read_bytes() == (tiny_pair[0] / WEIGHTS).read_bytes()
