"""What is to be exported where a role is a PEFT adapter: roles of one base model share its weights and one graph.

::

    policy    reference           folders of the bundle             graphs, gates
    adapter   its base            policy/ reference/                policy.onnx [1], [0]
    adapter   adapter, same base  policy/ reference/ base/          policy.onnx [1, 0], [0, 1]
    adapter   another model       policy/ reference/ base/          policy.onnx [1], reference.onnx
    model     adapter             policy/ reference/ base/          policy.onnx, reference.onnx [1]
"""

from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from dpo_fast.bundle import POLICY, REFERENCE
from dpo_fast.errors import CheckpointError, UsageError
from dpo_fast.export.adapters import Adapter, bind_adapter, match_modules, open_base, read_adapter
from dpo_fast.export.checkpoint import (
    ADAPTER_CONFIG,
    Checkpoint,
    check_finite,
    open_checkpoint,
    read_adapter_tensors,
)
from dpo_fast.export.roles import RoleModel, check_role
from dpo_fast.quiet import quiet

BASE = "base"  # the bundle's folder of the base's weights, where no role is the base; and what --reference calls it
TRAINED_FROM = "ref"  # the adapter that TRL keeps beside a policy trained on top of another adapter


def open_roles(
    policy: str,
    reference: str | None,
    *,
    policy_revision: str | None = None,
    reference_revision: str | None = None,
    base: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, RoleModel]:
    """Find the roles' checkpoints, and refuse what cannot be exported, before anything is traced or copied.

    Args:
        policy: local folder or Hub id of a model or of a PEFT adapter.
        reference: the same; "base" for what an adapter was trained from, as TRL takes it: the adapter in its subfolder
            ``ref``, or else its base model; None for no reference.
        policy_revision: branch, tag or commit of a Hub id.
        reference_revision: the same.
        base: the adapters' base model, where it is not what their adapter_config.json names.
        trust_remote_code: whether the checkpoints' own Python code may be run.

    Raises:
        CheckpointError: a checkpoint cannot be exported.
        UsageError: the policy is no adapter, and the reference is to be its base; or a base is named for no adapter.
    """
    found = {POLICY: open_checkpoint(policy, policy_revision, trust_remote_code=trust_remote_code)}
    if reference == BASE and not found[POLICY].is_adapter:
        raise UsageError(f"--policy {policy} is no adapter that names its base: name the model it was trained from")
    if reference == BASE:
        trained_from = find_trained_from(found[POLICY])
        found[REFERENCE] = trained_from or open_base(
            read_adapter(found[POLICY]), base, trust_remote_code=trust_remote_code
        )
    elif reference is not None:
        found[REFERENCE] = open_checkpoint(reference, reference_revision, trust_remote_code=trust_remote_code)
    adapters = {role: read_adapter(checkpoint) for role, checkpoint in found.items() if checkpoint.is_adapter}
    if base is not None and not adapters:
        raise UsageError(
            f"--base {base} is what an adapter was trained on, and neither role is an adapter; leave it out"
        )
    models = _adapted_roles(found, adapters, base, trust_remote_code=trust_remote_code) if adapters else {}
    for role, checkpoint in found.items():
        if role not in models:
            models[role] = check_role(checkpoint, role, trust_remote_code=trust_remote_code)
    return {role: models[role] for role in found}


def _adapted_roles(
    found: dict[str, Checkpoint], adapters: dict[str, Adapter], base: str | None, *, trust_remote_code: bool
) -> dict[str, RoleModel]:
    """The roles that are adapters or the base of one: they have one graph, and differ by their gates."""
    bases = {role: open_base(adapter, base, trust_remote_code=trust_remote_code) for role, adapter in adapters.items()}
    beneath, *others = bases.values()
    for other in others:
        if not _same_folder(other, beneath):
            raise CheckpointError(
                f"policy and reference are adapters of different base models ({beneath.source}, {other.source}), "
                "according to their adapter_config.json; if they are one, name it with --base, or else merge one: "
                "AutoPeftModelForCausalLM.from_pretrained(...).merge_and_unload().save_pretrained(...)"
            )
    of_base = [role for role, checkpoint in found.items() if _same_folder(checkpoint, beneath)]
    base_folder = of_base[0] if of_base else BASE
    model = check_role(beneath, base_folder, trust_remote_code=trust_remote_code)
    with quiet(), torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    changes, bindings = [], dict(model.bindings)
    for index, (role, adapter) in enumerate(adapters.items()):
        check_finite(adapter.checkpoint)
        changed = match_modules(adapter, empty, beneath, model.bindings)
        changes.append(changed)
        bindings |= bind_adapter(changed, adapter.checkpoint, role, index)
    shared = replace(
        model, bindings=bindings, adapters=tuple(changes), base=beneath, base_folder=base_folder,
        graph=f"{next(iter(adapters))}.onnx",
    )  # fmt: skip
    names = list(adapters)
    return {
        role: replace(shared, checkpoint=found[role], gates=tuple(float(role == name) for name in names))
        for role in (*names, *of_base)
    }


def find_trained_from(policy: Checkpoint) -> Checkpoint | None:
    """The adapter that a policy was trained on top of, which TRL names "ref" and PEFT saves in that subfolder."""
    folder: Path = policy.folder / TRAINED_FROM
    if not (folder / ADAPTER_CONFIG).is_file():
        return None
    return Checkpoint(folder, f"{policy.source}/{TRAINED_FROM}", None, read_adapter_tensors(folder))


def _same_folder(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether two checkpoints are the same on disk."""
    return one.folder.resolve() == other.folder.resolve()
