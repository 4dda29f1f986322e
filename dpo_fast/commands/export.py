"""Commands that make bundles: export, build, refit."""

import json
from pathlib import Path
from typing import Annotated

import typer

from dpo_fast.commands.options import (
    AsJson,
    BundleArgument,
    Calibration,
    HardwareCompatible,
    LayoutChoice,
    Link,
    NoSelfCheck,
    Overwrite,
    ProfileFrom,
    Profiles,
    ProfileSplit,
    Refittable,
    Target,
    TrustRemoteCode,
    VersionCompatible,
    Workspace,
)
from dpo_fast.commands.output import print_json, say
from dpo_fast.errors import UsageError
from dpo_fast.recipes import DEFAULT


def export_command(
    policy: Annotated[
        str, typer.Option(help="The trained model or PEFT adapter: local folder or Hub id.", show_default=False)
    ],
    output: Annotated[Path, typer.Option(help="The bundle to write.", show_default=False)],
    reference: Annotated[
        str,
        typer.Option(
            help="The model it was trained from: local folder, Hub id, none, or base: what an adapter was trained on."
        ),
    ] = "base",
    base: Annotated[
        str | None,
        typer.Option(help="An adapter's base model, if it is not where adapter_config.json says.", show_default=False),
    ] = None,
    policy_revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")] = None,
    reference_revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")] = None,
    recipe: Annotated[str, typer.Option(help="What to make it for: a shipped recipe, or a TOML file.")] = DEFAULT,
    max_length: Annotated[
        int | None,
        typer.Option(
            help="Default truncation of evaluations, in tokens; 1024, or the model's positions if fewer.",
            show_default=False,
        ),
    ] = None,
    layout: Annotated[
        LayoutChoice,
        typer.Option(
            help="Whether completions share their prompt's computation; auto lets the self-check choose, and is plain "
            "without one."
        ),
    ] = "auto",
    trust_remote_code: TrustRemoteCode = False,
    calibration: Calibration = None,
    target: Target = None,
    profile_from: ProfileFrom = None,
    profile_split: ProfileSplit = None,
    profiles: Profiles = 4,
    workspace: Workspace = None,
    refittable: Refittable = None,
    version_compatible: VersionCompatible = False,
    hardware_compatible: HardwareCompatible = False,
    no_self_check: NoSelfCheck = False,
    link: Link = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Turn a policy and its reference into a bundle of log-prob graphs and the weights they point into."""
    from dpo_fast.bundle import MANIFEST
    from dpo_fast.export.exporter import ExportOptions, export
    from dpo_fast.tensorrt.options import BuildOptions

    build = BuildOptions(
        targets=_targets(target),
        profile_from=profile_from,
        profile_split=profile_split,
        profiles=profiles,
        workspace_gib=workspace,
        refittable=refittable,
        version_compatible=version_compatible,
        hardware_compatible=hardware_compatible,
    )
    options = ExportOptions(
        policy_revision=policy_revision,
        reference_revision=reference_revision,
        recipe=recipe,
        max_length=max_length,
        layout=None if layout == "auto" else layout,
        calibration=calibration,
        build=build,
        self_check=not no_self_check,
        link=link,
        base=base,
        trust_remote_code=trust_remote_code,
        overwrite=overwrite,
    )
    export(policy, None if reference == "none" else reference, output, options, say)
    if as_json:
        print_json(json.loads((output / MANIFEST).read_text(encoding="utf-8")))
    else:
        typer.echo(f"bundle: {output}")


def build_command(
    bundle: BundleArgument,
    target: Target = None,
    profile_from: ProfileFrom = None,
    profile_split: ProfileSplit = None,
    profiles: Profiles = 4,
    workspace: Workspace = None,
    refittable: Refittable = None,
    version_compatible: VersionCompatible = False,
    hardware_compatible: HardwareCompatible = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Build the TensorRT plans of a bundle, on the machine that is to run them or, for TensorRT-RTX, on any."""
    from dpo_fast.bundle import MANIFEST
    from dpo_fast.tensorrt.bundle_plans import build
    from dpo_fast.tensorrt.options import BuildOptions

    options = BuildOptions(
        targets=_targets(target),
        profile_from=profile_from,
        profile_split=profile_split,
        profiles=profiles,
        workspace_gib=workspace,
        refittable=refittable,
        version_compatible=version_compatible,
        hardware_compatible=hardware_compatible,
    )
    build(bundle, options, trust_remote_code=trust_remote_code, report=say)
    if as_json:
        print_json(json.loads((bundle / MANIFEST).read_text(encoding="utf-8")))
    else:
        typer.echo(f"bundle: {bundle}")


def refit_command(
    bundle: BundleArgument,
    policy: Annotated[
        str, typer.Option(help="The new checkpoint, of the same architecture: folder or Hub id.", show_default=False)
    ],
    output: Annotated[
        Path | None, typer.Option(help="The bundle to write; the old one is replaced if left out.", show_default=False)
    ] = None,
    policy_revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    calibration: Calibration = None,
    no_self_check: NoSelfCheck = False,
    link: Link = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Put a new checkpoint of the policy into a bundle: nothing is traced again."""
    from dpo_fast.bundle import MANIFEST
    from dpo_fast.export.refit import RefitOptions, refit

    if output is None and overwrite:
        raise UsageError("--overwrite goes with --output; without it the bundle itself is replaced")
    options = RefitOptions(
        policy_revision=policy_revision,
        calibration=calibration,
        self_check=not no_self_check,
        link=link,
        trust_remote_code=trust_remote_code,
        overwrite=overwrite,
    )
    written = refit(bundle, policy, output, options, say)
    if as_json:
        print_json(json.loads((written / MANIFEST).read_text(encoding="utf-8")))
    else:
        typer.echo(f"bundle: {written}")


def _targets(value: str | None) -> tuple[str, ...]:
    """Compute capabilities, as they are named: sm86,sm89."""
    return () if value is None else tuple(target.strip().lower() for target in value.split(","))
