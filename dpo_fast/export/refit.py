"""A new checkpoint of the same architecture in an exported bundle: new places of the same tensors, no new trace.

A graph points at a tensor by file and offset. The old checkpoint's headers say which tensor lies there, the new one's
where a tensor of that name lies now.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from dpo_fast.bundle import MANIFEST, POLICY, Bundle, hash_files, is_of_plan, open_bundle, write_manifest
from dpo_fast.errors import BundleError, CheckpointError
from dpo_fast.export.calibration import read_calibration
from dpo_fast.export.checkpoint import (
    ADAPTER_CONFIG,
    Checkpoint,
    StoredTensor,
    check_finite,
    copy_folder,
    copy_tokenizer,
    open_checkpoint,
    read_adapter_tensors,
    read_tensors,
)
from dpo_fast.export.engine_graphs import make_engine_graphs
from dpo_fast.export.roles import architecture, check_same_tokenizer, has_tokenizer, read_config
from dpo_fast.export.self_check import self_check
from dpo_fast.files import copy_file, new_folder
from dpo_fast.publish.card import start_card
from dpo_fast.recipes import Recipe
from dpo_fast.tensorrt.bundle_plans import renew_plans

# What an adapter's settings say of where it came from and how it was trained, not of what it computes.
ADAPTER_PROVENANCE_KEYS = frozenset(
    {"base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version", "lora_dropout",
     "init_lora_weights", "task_type", "eva_config", "corda_config", "loftq_config", "runtime_config"}
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class RefitOptions:
    """What a user can choose about a refit.

    Attributes:
        policy_revision: branch, tag or commit of a Hub id.
        calibration: data set whose first pairs the scales of activations are chosen from, for recipes that need it.
        self_check: whether the graph is compared with PyTorch, on one probe.
        link: whether files are hard-linked into a new bundle instead of copied, where the disk allows.
        trust_remote_code: whether the checkpoint's own Python code may be run.
        overwrite: whether an existing output is replaced.
    """

    policy_revision: str | None = None
    calibration: str | None = None
    self_check: bool = True
    link: bool = False
    trust_remote_code: bool = False
    overwrite: bool = False


def refit(
    bundle: Path,
    policy: str,
    output: Path | None = None,
    options: RefitOptions = RefitOptions(),
    report: Callable[[str], None] = lambda step: None,
) -> Path:
    """Put a new checkpoint of the policy into a bundle.

    Args:
        bundle: what `dpo_fast.export` wrote.
        policy: the new checkpoint: local folder or Hub id.
        output: the bundle to write; None replaces `bundle`, at once and only when everything has gone well.
        options: see `RefitOptions`.
        report: called with a line at each step.

    Returns:
        The new bundle's folder.

    Raises:
        InputError: the checkpoint is of another architecture, or its tensors have other names, shapes or dtypes.
        SelfCheckError: the graph does not say what the new PyTorch weights say.
    """
    old = open_bundle(bundle)
    trust = options.trust_remote_code
    entry = old.manifest.models[POLICY]
    target, overwrite, link = (bundle, True, True) if output is None else (output, options.overwrite, options.link)
    with new_folder(target, overwrite=overwrite, marker=MANIFEST) as folder:
        report("checking the checkpoint")
        new = open_checkpoint(policy, options.policy_revision, trust_remote_code=trust)
        _check_same_model(old, new, trust_remote_code=trust)
        recipe = Recipe(**old.manifest.recipe)
        tokenizer = new.folder if has_tokenizer(new.folder) else bundle / POLICY
        calibration = read_calibration(
            options.calibration, recipe, tokenizer, old.manifest.max_length, trust_remote_code=trust
        )
        renewed = _renewed_files(old)
        report(f"{POLICY}: copying {new.source}")
        for name in old.manifest.files:
            if name not in renewed:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                copy_file(bundle / name, folder / name, link=link)
        copy_folder(new, folder / POLICY, trust_remote_code=trust, link=options.link)
        if not has_tokenizer(new.folder):  # an adapter may be read with its base's, which export put beside it
            copy_tokenizer(bundle / POLICY, folder / POLICY)
        start_card(folder / POLICY, new.folder)
        repoint(bundle / entry.graph, _policy_tensors(old), new.tensors, folder / entry.graph)
        checked = entry.self_check
        if options.self_check:
            report(f"{POLICY}: comparing the graph with PyTorch")
            result = self_check(
                folder / entry.graph,
                folder / POLICY,
                layout=entry.layout,
                probes=1,
                trust_remote_code=trust,
                base=folder / entry.weights[0] if new.is_adapter else None,
                gates=entry.adapter_gates,
            )
            report(f"{POLICY}: {result}")
            checked = result.as_dict()
        entry = replace(
            entry,
            source=new.source,
            revision=new.revision,
            weights=[name for name in entry.weights if not name.startswith("engines/")],
            self_check=checked if options.self_check else None,
        )
        made = make_engine_graphs(
            folder, {POLICY: entry}, recipe, calibration=calibration, check=options.self_check, report=report
        )
        made = {
            role: renew_plans(bundle, folder, made_entry, recipe, report) if made_entry.plan else made_entry
            for role, made_entry in made.items()
        }
        for role, other in old.manifest.models.items():
            if role != POLICY and other.engine_graph == entry.engine_graph:  # an adapter's base: the plans are its too
                made[role] = replace(other, plan=made[POLICY].plan)
        report("hashing")
        kept = {name: value for name, value in old.manifest.files.items() if name not in renewed}
        files = hash_files(folder, known=kept)
        write_manifest(folder, replace(old.manifest, models={**old.manifest.models, **made}, files=files))
    return target


def repoint(graph: Path, old: dict[str, StoredTensor], new: dict[str, StoredTensor], target: Path) -> None:
    """Write a graph whose initializers point at the tensors of a new checkpoint.

    Args:
        graph: points into the folder `policy` beside it.
        old: the tensors of the checkpoint that it points at.
        new: the tensors that it shall point at.
        target: the file to write, in another folder.

    Raises:
        BundleError: the graph points at something that is no tensor of the old checkpoint.
    """
    model = ir.load(graph)
    names = {(f"{POLICY}/{tensor.file}", tensor.offset, tensor.length): name for name, tensor in old.items()}
    for value in model.graph.initializers.values():
        place = value.const_value
        if not isinstance(place, ir.ExternalTensor) or not str(place.location).startswith(f"{POLICY}/"):
            continue
        name = names.get((str(place.location), place.offset or 0, place.length or 0))
        if name is None:
            raise BundleError(
                f"{graph}: {value.name!r} points at {place.location}, byte {place.offset}, where no tensor begins; "
                "export the bundle again"
            )
        tensor = new[name]
        value.const_value = ir.ExternalTensor(
            f"{POLICY}/{tensor.file}", tensor.offset, tensor.length, place.dtype, shape=place.shape, name=place.name
        )
    ir.save(model, target)


def _policy_tensors(bundle: Bundle) -> dict[str, StoredTensor]:
    """The tensors of a bundle's policy: a model's, or an adapter's alone."""
    folder = bundle.model_folder(POLICY)
    return read_adapter_tensors(folder) if (folder / ADAPTER_CONFIG).is_file() else read_tensors(folder)


def _check_same_model(old: Bundle, new: Checkpoint, *, trust_remote_code: bool) -> None:
    """Refuse a checkpoint that the bundle's graph was not traced for, or whose weights are not finite."""
    folder, entry = old.model_folder(POLICY), old.manifest.models[POLICY]
    is_adapter = (folder / ADAPTER_CONFIG).is_file()
    if new.is_adapter != is_adapter:
        kinds = {True: "a PEFT adapter", False: "a whole model"}
        raise CheckpointError(
            f"{new.source}: is {kinds[new.is_adapter]}, and the bundle's policy is {kinds[is_adapter]}; export it anew"
        )
    if not is_adapter and entry.adapter_gates is not None:
        raise CheckpointError(
            f"{old.folder}: its policy is the base of the reference's adapter, which belongs to these weights alone; "
            "export the new checkpoint anew"
        )
    if is_adapter:
        file = ADAPTER_CONFIG
        before, after = (_adapter_settings(path) for path in (folder / file, new.folder / file))
    else:
        file = "config.json"
        before, after = (
            architecture(read_config(path, name, trust_remote_code=trust_remote_code))
            for path, name in ((folder, str(folder)), (new.folder, new.source))
        )
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            raise CheckpointError(
                f"{new.source}: {file} has {key} = {after.get(key)!r}, and the bundle was exported for "
                f"{before.get(key)!r}; export it anew"
            )
    stored, found = _policy_tensors(old), new.tensors
    for name in sorted(stored.keys() | found.keys()):
        if name not in found or name not in stored:
            lacking = new.source if name not in found else old.folder
            raise CheckpointError(f"{lacking}: has no tensor {name!r}, and the other checkpoint has; export it anew")
        if (stored[name].shape, stored[name].dtype) != (found[name].shape, found[name].dtype):
            raise CheckpointError(
                f"{new.source}: the tensor {name!r} has shape {list(found[name].shape)} and dtype "
                f"{found[name].dtype}, and the bundle's has {list(stored[name].shape)} and {stored[name].dtype}; "
                "export it anew"
            )
    check_finite(new)
    if has_tokenizer(new.folder):
        check_same_tokenizer(new.folder, folder, new.source, trust_remote_code=trust_remote_code)
    elif not is_adapter:
        raise CheckpointError(f"{new.source}: holds no tokenizer; save the policy's beside its weights")


def _adapter_settings(path: Path) -> dict[str, Any]:
    """What decides an adapter's graph: its settings without their provenance.

    Raises:
        CheckpointError: the file holds no settings.
    """
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        # Lists of modules are sets, which PEFT saves in any order.
        return {
            key: sorted(value) if isinstance(value, list) and all(isinstance(item, str) for item in value) else value
            for key, value in settings.items()
            if key not in ADAPTER_PROVENANCE_KEYS
        }
    except (ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: is no adapter's configuration ({error}); save the adapter again") from error


def _renewed_files(old: Bundle) -> set[str]:
    """The files of a bundle that a new policy replaces: its folder, its graph, and what was made of them."""
    entry = old.manifest.models[POLICY]
    made = {name for name in entry.weights if name.startswith("engines/")}
    return {
        name
        for name in old.manifest.files
        if name.startswith(f"{POLICY}/")
        or name in {entry.graph, entry.engine_graph} | made
        or (entry.plan is not None and is_of_plan(name, entry.plan))
    }
