"""Hostile or broken checkpoints: either one line that refuses them, or a bundle that says what PyTorch says.

Nothing else may come out: no traceback, and never a bundle of another model. The self-check is the judge of what was
accepted, so each example runs the whole exporter; graphs of architectures that were met before are not traced again.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import copy_checkpoint, write_recipe

from dpo_fast.errors import DpoFastError
from dpo_fast.export.exporter import ExportOptions, export

from .test_weights import WEIGHTS

Trace = Callable[..., ir.Model]
# Each example exports; the fixtures are read only.
FEW = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

SCALARS = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8)
ANYTHING = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner)
)
# Near misses are more telling than noise: sizes that are off by a little, and kinds that are nearly right.
NEAR = st.sampled_from([0, -1, 1, 2, 3, 4, 8, 31, 33, 64, 500, 501, 1.5, True, "32", [32], {}, None, 10**9, "llama"])
KEYS = [
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "rms_norm_eps", "rope_parameters",
    "hidden_act", "tie_word_embeddings", "attention_bias", "mlp_bias", "layer_types", "architectures", "dtype",
    "auto_map", "quantization_config", "sliding_window", "pad_token_id", "is_decoder", "pretraining_tp",
]  # fmt: skip


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where examples are made, one after another."""
    return tmp_path_factory.mktemp("fuzz")


def export_or_refuse(policy: Path, work: Path, number: int) -> None:
    """Export, or be refused in one line; then nothing is left."""
    output = work / "out" / f"bundle-{number}"
    try:
        export(str(policy), None, output, ExportOptions(recipe=str(write_recipe(work))))
    except DpoFastError as error:
        refusal = str(error)
    else:
        refusal = None
    if refusal is not None:
        assert "\n" not in refusal
        assert len(refusal) < 2000
        assert not output.exists()
        assert not list(output.parent.glob(f".{output.name}*"))
        return
    manifest = json.loads((output / "bundle.json").read_text())
    assert manifest["models"]["policy"]["self_check"]["passed"]


def fresh(policy: Path, work: Path) -> tuple[Path, int]:
    """A copy of the checkpoint that the example may break, and the example's number."""
    number = len(list(work.glob("policy-*")))
    (work / "out").mkdir(exist_ok=True)
    return copy_checkpoint(policy, work / f"policy-{number}"), number


@pytest.mark.slow
@FEW
@given(changes=st.dictionaries(st.sampled_from(KEYS), NEAR | ANYTHING, min_size=1, max_size=2))
def test_any_config(tiny_pair: tuple[Path, Path], work: Path, changes: dict[str, Any]) -> None:
    policy, number = fresh(tiny_pair[0], work)
    path = policy / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    export_or_refuse(policy, work, number)


@FEW
@given(content=st.binary(max_size=64) | ANYTHING.map(lambda value: json.dumps(value).encode()))
def test_a_config_that_is_none(tiny_pair: tuple[Path, Path], work: Path, content: bytes) -> None:
    policy, number = fresh(tiny_pair[0], work)
    (policy / "config.json").write_bytes(content)
    export_or_refuse(policy, work, number)


def read_header(path: Path) -> tuple[dict[str, Any], bytes]:
    """A safetensors file's header and what follows it."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def write_header(path: Path, header: Any, tensors: bytes, size: int | None = None) -> None:
    text = json.dumps(header).encode()
    path.write_bytes((len(text) if size is None else size).to_bytes(8, "little") + text + tensors)


def is_entry(value: Any) -> bool:
    """Whether it is a tensor's entry still, with all that an action may take from it."""
    return isinstance(value, dict) and all(isinstance(value.get(key), list) for key in ("data_offsets", "shape"))


@pytest.mark.slow
@FEW
@given(data=st.data())
def test_any_header(tiny_pair: tuple[Path, Path], work: Path, data: st.DataObject) -> None:
    """A tensor's entry with other values: offsets exchanged or moved, shapes transposed, dtypes of the same size."""
    policy, number = fresh(tiny_pair[0], work)
    header, tensors = read_header(policy / WEIGHTS)
    names = sorted(set(header) - {"__metadata__"})
    for _ in range(data.draw(st.integers(1, 2))):  # what the first made of an entry, the second may meet
        one, other = (data.draw(st.sampled_from(names)) for _ in range(2))
        entry = header.get(one)
        if not is_entry(entry):
            continue
        action = data.draw(st.sampled_from(["exchange", "offset", "shape", "dtype", "rename", "drop", "anything"]))
        if action == "exchange" and is_entry(header.get(other)):
            entry["data_offsets"], header[other]["data_offsets"] = header[other]["data_offsets"], entry["data_offsets"]
        elif action == "offset":
            entry["data_offsets"] = [place + data.draw(st.integers(-64, 64)) for place in entry["data_offsets"]]
        elif action == "shape":
            entry["shape"] = data.draw(st.permutations(entry["shape"]) | st.lists(st.integers(-1, 70), max_size=3))
        elif action == "dtype":
            entry["dtype"] = data.draw(st.sampled_from(["F32", "I32", "U32", "F16", "BF16", "F64", "F8_E4M3", "", 7]))
        elif action == "rename":
            header[data.draw(st.sampled_from(names) | st.text(max_size=10))] = header.pop(one)
        elif action == "drop":
            del header[one]
        else:
            header[one] = data.draw(ANYTHING)
    write_header(policy / WEIGHTS, header, tensors)
    export_or_refuse(policy, work, number)


@FEW
@given(
    size=st.integers(0, 2**64 - 1) | st.integers(0, 5000),
    header=ANYTHING,
    tensors=st.binary(max_size=64),
)
def test_a_file_that_is_no_safetensors(
    tiny_pair: tuple[Path, Path], work: Path, size: int, header: Any, tensors: bytes
) -> None:
    policy, number = fresh(tiny_pair[0], work)
    write_header(policy / WEIGHTS, header, tensors, size)
    export_or_refuse(policy, work, number)
