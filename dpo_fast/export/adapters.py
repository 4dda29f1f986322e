"""PEFT adapters as they lie on disk: which modules of the base model they change, and by which stored tensors.

The tensors of ``adapter_model.safetensors`` say what is adapted; ``adapter_config.json`` says by how much, and what the
base model is. PEFT itself is not needed. What would change the forward and is not understood here is refused.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dpo_fast.errors import CheckpointError
from dpo_fast.export.checkpoint import ADAPTER_CONFIG, FLOAT_SIZES, Checkpoint, StoredTensor, open_checkpoint
from dpo_fast.export.weights import Binding, Stored

PREFIX = "base_model.model."  # what PEFT puts before the base model's own names
MERGE = (
    "merge it into its base first: "
    "AutoPeftModelForCausalLM.from_pretrained(...).merge_and_unload().save_pretrained(...)"
)
# Keys of adapter_config.json that are read here.
READ = frozenset(
    {"peft_type", "base_model_name_or_path", "revision", "r", "lora_alpha", "rank_pattern", "alpha_pattern",
     "use_rslora", "use_dora", "lora_bias", "bias", "modules_to_save", "init_lora_weights"}
)  # fmt: skip
# Keys that say how an adapter was trained, or what its tensors say too. Any other key is refused, if it is set.
WITHOUT_EFFECT = frozenset(
    {"task_type", "auto_mapping", "peft_version", "inference_mode", "target_modules", "exclude_modules",
     "layers_to_transform", "layers_pattern", "lora_dropout", "fan_in_fan_out", "ensure_weight_tying", "loftq_config",
     "eva_config", "corda_config", "lora_ga_config", "megatron_core", "qalora_group_size", "runtime_config"}
)  # fmt: skip
# Initialisations that leave the base model's weights as they are; the others (PiSSA, OLoRA, CorDA …) subtract their
# start from them each time the adapter is loaded.
INITIALISATIONS = (None, True, False, "gaussian", "eva", "orthogonal")
# The ends of the names of a branch's tensors, and what they are.
LOW_RANK_ENDINGS = {
    "lora_A.weight": "lora_A",
    "lora_B.weight": "lora_B",
    "lora_B.bias": "lora_bias",
    "lora_embedding_A": "lora_A",
    "lora_embedding_B": "lora_B",
    "lora_magnitude_vector": "magnitude",
}
COMPARED = 1 << 24  # elements whose values are compared together: bounds the memory


@dataclass(frozen=True, slots=True)
class LowRank:
    """A module with a low-rank branch: LoRA, or DoRA where there is a magnitude.

    Attributes:
        rank: rows of A.
        scaling: factor of the branch: alpha / rank, or alpha / sqrt(rank) (rsLoRA, arXiv:2312.03732).
        tensors: the stored tensors by the branch's parameters: lora_A, lora_B, lora_bias, magnitude.
    """

    rank: int
    scaling: float
    tensors: dict[str, str]

    def shapes(self, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
        """The shapes that the branch's tensors have on a module of so many inputs and outputs."""
        shapes = {"lora_A": (self.rank, inputs), "lora_B": (outputs, self.rank)}
        return {name: shapes.get(name, (outputs,)) for name in self.tensors}


@dataclass(frozen=True, slots=True)
class Replacement:
    """A module that was trained whole and replaces the base's: PEFT's modules_to_save.

    Attributes:
        tensors: the stored tensors by the module's parameters.
    """

    tensors: dict[str, str]


# What an adapter changes, by the path of the base model's module.
AdaptedModules = dict[str, LowRank | Replacement]


@dataclass(frozen=True, slots=True)
class Adapter:
    """A PEFT folder whose settings are understood.

    Attributes:
        checkpoint: where it lies, and the tensors of its adapter_model.safetensors.
        base: the base model that it names: a local folder or a Hub id; None where it names none.
        base_revision: of a Hub id.
        settings: adapter_config.json.
    """

    checkpoint: Checkpoint
    base: str | None
    base_revision: str | None
    settings: dict[str, Any]


def read_adapter(checkpoint: Checkpoint) -> Adapter:
    """Read a PEFT folder's adapter_config.json.

    Raises:
        CheckpointError: it is damaged, or says something that would change the forward and is not understood.
    """
    path = checkpoint.folder / ADAPTER_CONFIG
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        names = [settings.get("base_model_name_or_path"), settings.get("revision")]
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as a JSON object; save the adapter again") from error
    if settings.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: peft_type is {settings.get('peft_type')!r}, and only 'LORA' is known; {MERGE}")
    refused = sorted(key for key, value in settings.items() if value and key not in READ | WITHOUT_EFFECT)
    if refused:
        shown = repr(settings[refused[0]])[:80]
        raise CheckpointError(f"{path}: {refused[0]} is {shown}, which changes the model in a way not known; {MERGE}")
    if settings.get("bias", "none") != "none":
        raise CheckpointError(
            f"{path}: bias is {settings['bias']!r}: its biases would change the reference too, as PEFT loads them into "
            f"the base model; {MERGE}"
        )
    if not any(settings.get("init_lora_weights") is known for known in INITIALISATIONS[:3]) and (
        settings.get("init_lora_weights") not in INITIALISATIONS[3:]
    ):
        raise CheckpointError(
            f"{path}: init_lora_weights is {settings['init_lora_weights']!r}, which changes the base model's weights "
            f"as PEFT loads it; {MERGE}"
        )
    if any(name is not None and not isinstance(name, str) for name in names):
        raise CheckpointError(f"{path}: base_model_name_or_path or revision is no text; save the adapter again")
    replaced = settings.get("modules_to_save") or []
    if not isinstance(replaced, list) or not all(isinstance(module, str) and module for module in replaced):
        raise CheckpointError(f"{path}: modules_to_save is {replaced!r}, no list of names; save the adapter again")
    return Adapter(checkpoint, names[0], names[1], settings)


def open_base(adapter: Adapter, base: str | None, *, trust_remote_code: bool) -> Checkpoint:
    """Open the model that an adapter was trained on.

    Args:
        adapter: the adapter.
        base: a local folder or a Hub id instead of the one that the adapter names.
        trust_remote_code: whether the base's Python files are taken along.

    Raises:
        CheckpointError: it cannot be found, or is an adapter itself.
    """
    path = adapter.checkpoint.folder / ADAPTER_CONFIG
    name = base or adapter.base
    if not name:
        raise CheckpointError(f"{path}: base_model_name_or_path is {adapter.base!r}: name the base model with --base")
    revision = None if base else adapter.base_revision
    try:
        found = open_checkpoint(name, revision, trust_remote_code=trust_remote_code)
    except CheckpointError as error:
        if base:
            raise
        raise CheckpointError(
            f"{path}: base_model_name_or_path is {name!r}: {error}; if the base model lies elsewhere, name it with "
            "--base"
        ) from error
    if found.is_adapter:
        raise CheckpointError(f"{name}: is an adapter itself, and the base of {adapter.checkpoint.source}; {MERGE}")
    return found


def match_modules(
    adapter: Adapter, model: PreTrainedModel, base: Checkpoint, base_bindings: dict[str, Binding]
) -> AdaptedModules:
    """Say which modules of the base model an adapter changes, and by which tensors.

    Args:
        adapter: from `read_adapter`.
        model: the base model; its parameters need no values.
        base: the base model's checkpoint.
        base_bindings: what each parameter of the base is bound to (`dpo_fast.export.weights.match_parameters`).

    Raises:
        CheckpointError: a tensor is not understood, has another shape than its module asks for, or is missing.
    """
    checkpoint, settings = adapter.checkpoint, adapter.settings
    modules = dict(model.named_modules(remove_duplicate=False))
    low_rank: dict[str, dict[str, str]] = {}
    whole: dict[str, dict[str, str]] = {}
    for name in checkpoint.tensors:
        path = name.removeprefix(PREFIX)
        ending = next((ending for ending in LOW_RANK_ENDINGS if path.endswith(f".{ending}")), None)
        owner = _replaced_module(path, modules, settings)
        if path == name:
            raise CheckpointError(f"{checkpoint.folder}: the tensor {name!r} does not begin with {PREFIX!r}; {MERGE}")
        if ending is not None:
            low_rank.setdefault(path.removesuffix(f".{ending}"), {})[ending] = name
        elif owner is not None:
            whole.setdefault(owner, {})[path.removeprefix(f"{owner}.")] = name
        else:
            _check_copy_of_base(checkpoint, name, path, base, base_bindings)
    if not low_rank and not whole:
        raise CheckpointError(f"{checkpoint.folder}: adapts nothing: {checkpoint.weight_files} holds no LoRA tensor")
    changes: AdaptedModules = {}
    for path, tensors in low_rank.items():
        changes[path] = _low_rank(adapter, path, tensors, modules.get(path))
    for path, tensors in whole.items():
        inside = [other for other in changes if f"{other}.".startswith(f"{path}.") or path.startswith(f"{other}.")]
        if inside:
            raise CheckpointError(
                f"{checkpoint.folder}: {path!r} is replaced (modules_to_save), and {inside[0]!r} is adapted; {MERGE}"
            )
        _check_replacement(checkpoint, path, tensors, modules[path])
        changes[path] = Replacement(tensors)
    return changes


def bind_adapter(changes: AdaptedModules, checkpoint: Checkpoint, folder: str, index: int) -> dict[str, Stored]:
    """Say which stored tensor each parameter of an adapter's branches is.

    Args:
        changes: from `match_modules`.
        checkpoint: the adapter's.
        folder: the adapter's folder relative to the graph's file, such as "policy".
        index: of the adapter among those of the graph.
    """
    return {
        f"{path}.adapter_{index}.{parameter}": Stored(folder, name, checkpoint.tensors[name])
        for path, change in changes.items()
        for parameter, name in change.tensors.items()
    }


def _low_rank(adapter: Adapter, path: str, tensors: dict[str, str], module: nn.Module | None) -> LowRank:
    """One module's LoRA or DoRA, with its tensors checked against the module."""
    checkpoint, settings = adapter.checkpoint, adapter.settings
    place = f"{checkpoint.folder / next(iter(checkpoint.tensors.values())).file}"
    if not isinstance(module, (nn.Linear, Conv1D, nn.Embedding)):
        found = "has no such module" if module is None else f"has {type(module).__name__} there"
        raise CheckpointError(
            f"{place}: adapts {path!r}, and the base model {found}: only linear layers and embeddings can be; {MERGE}"
        )
    endings = {"lora_embedding_A", "lora_embedding_B"}
    if not isinstance(module, nn.Embedding):
        endings = {"lora_A.weight", "lora_B.weight"} | ({"lora_B.bias"} if settings.get("lora_bias") else set())
    endings |= {"lora_magnitude_vector"} if settings.get("use_dora") else set()
    if set(tensors) != endings:
        raise CheckpointError(
            f"{place}: has {', '.join(sorted(tensors))} of {path!r}, and {ADAPTER_CONFIG} (lora_bias, use_dora) and "
            f"the base model's {type(module).__name__} ask for {', '.join(sorted(endings))}; save the adapter again"
        )
    rank = _number(adapter, "r", "rank_pattern", path)
    alpha = _number(adapter, "lora_alpha", "alpha_pattern", path)
    if rank < 1 or rank != int(rank):
        raise CheckpointError(
            f"{checkpoint.folder / ADAPTER_CONFIG}: r of {path!r} is {rank}, no rank; save the adapter again"
        )
    scaling = alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank
    change = LowRank(int(rank), scaling, {LOW_RANK_ENDINGS[ending]: tensors[ending] for ending in sorted(tensors)})
    for parameter, shape in change.shapes(*features(module)).items():
        _check_tensor(checkpoint, change.tensors[parameter], shape)
    return change


def features(module: nn.Module) -> tuple[int, int]:
    """Sizes of what goes into a linear layer or an embedding, and of what comes out."""
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    if isinstance(module, Conv1D):
        return int(module.nx), int(module.nf)
    assert isinstance(module, nn.Linear)
    return module.in_features, module.out_features


def _number(adapter: Adapter, key: str, pattern_key: str, path: str) -> float:
    """A setting of a module: of the first pattern that the end of its path matches, or else the general one.

    As PEFT's `get_pattern_key` (peft/utils/other.py) finds it.
    """
    file, settings = adapter.checkpoint.folder / ADAPTER_CONFIG, adapter.settings
    value = settings.get(key)
    try:
        for pattern, special in (settings.get(pattern_key) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", path):
                value = special
                break
    except (re.error, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file}: {pattern_key} holds no patterns ({error}); save the adapter again") from error
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise CheckpointError(f"{file}: {key} of {path!r} is {value!r}, no number; save the adapter again")
    return float(value)


def _replaced_module(parameter: str, modules: dict[str, nn.Module], settings: dict[str, Any]) -> str | None:
    """The module that modules_to_save names and that a parameter belongs to; the outermost, or None.

    A name stands for every module whose path ends with it, as in PEFT's `_set_trainable` (peft/utils/other.py).
    """
    names = settings.get("modules_to_save") or []
    parts = parameter.split(".")
    for length in range(1, len(parts)):
        path = ".".join(parts[:length])
        if path in modules and any(path.endswith(name) for name in names):
            return path
    return None


def _check_replacement(checkpoint: Checkpoint, path: str, tensors: dict[str, str], module: nn.Module) -> None:
    """Refuse a replacement that is not complete, or whose tensors are not the module's."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    if parameters.keys() != tensors.keys():
        missing, other = sorted(parameters.keys() - tensors.keys()), sorted(tensors.keys() - parameters.keys())
        raise CheckpointError(
            f"{checkpoint.folder}: modules_to_save replaces {path!r}, whose tensors differ from the base model's: "
            f"missing {missing}, unknown {other}; save the adapter again, or {MERGE}"
        )
    for parameter, name in tensors.items():
        _check_tensor(checkpoint, name, tuple(parameters[parameter].shape))


def _check_copy_of_base(
    checkpoint: Checkpoint, name: str, parameter: str, base: Checkpoint, base_bindings: dict[str, Binding]
) -> None:
    """Refuse a tensor that is neither the adapter's nor, to the value, the base model's.

    PEFT saves an embedding that is adapted along with its adapter, and loads it into the base model.
    """
    place = checkpoint.folder / checkpoint.tensors[name].file
    bound = base_bindings.get(parameter.replace(".base_layer.", "."))
    if not isinstance(bound, Stored):
        raise CheckpointError(f"{place}: the tensor {name!r} is not understood; {MERGE}")
    if not _same_values(checkpoint, checkpoint.tensors[name], base, bound.tensor):
        raise CheckpointError(
            f"{place}: the tensor {name!r} is not the base model's {bound.name!r}, and modules_to_save does not name "
            f"it (a resized vocabulary, or another base?): it would change the reference too; {MERGE}"
        )


def _check_tensor(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> None:
    """Refuse a stored tensor of another shape than its module asks for, or of a dtype that no graph can point at."""
    tensor = checkpoint.tensors[name]
    if tensor.shape != shape:
        raise CheckpointError(
            f"{checkpoint.folder / tensor.file}: the tensor {name!r} has shape {list(tensor.shape)}, and "
            f"{ADAPTER_CONFIG} and the base model ask for {list(shape)}"
        )
    if tensor.dtype not in FLOAT_SIZES:
        raise CheckpointError(
            f"{checkpoint.folder / tensor.file}: the tensor {name!r} is stored as {tensor.dtype}; save the adapter in "
            f"one of {', '.join(FLOAT_SIZES)}"
        )


def _same_values(one: Checkpoint, first: StoredTensor, other: Checkpoint, second: StoredTensor) -> bool:
    """Whether two stored tensors hold the same numbers, whatever they are stored as."""
    if first.shape != second.shape:
        return False
    pairs = zip(_values(one, first), _values(other, second), strict=True)
    return all(np.array_equal(mine, theirs) for mine, theirs in pairs)


def _values(checkpoint: Checkpoint, tensor: StoredTensor) -> Iterator[np.ndarray[Any, np.dtype[np.float32]]]:
    """A stored tensor's numbers as float32, some at a time."""
    kinds: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
    if tensor.dtype not in kinds:
        raise CheckpointError(f"{checkpoint.folder / tensor.file}: holds a tensor of {tensor.dtype}; {MERGE}")
    kind = np.dtype(kinds[tensor.dtype])
    count = math.prod(tensor.shape)
    for start in range(0, count, COMPARED):
        stop = min(start + COMPARED, count)
        offset = tensor.offset + start * kind.itemsize
        stored = np.fromfile(checkpoint.folder / tensor.file, kind, stop - start, offset=offset)
        # bfloat16 is the upper half of a float32
        yield (stored.astype(np.uint32) << 16).view(np.float32) if tensor.dtype == "BF16" else stored.astype(np.float32)
