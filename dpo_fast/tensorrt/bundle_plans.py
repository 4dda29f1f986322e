"""A bundle's plans: made when it is exported, built later or anew, and given new weights by a refit."""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from dpo_fast.batches import Layout, arrange, longest_row
from dpo_fast.bundle import (
    MANIFEST,
    POLICY,
    ModelEntry,
    hash_files,
    is_of_plan,
    open_bundle,
    write_manifest,
)
from dpo_fast.errors import UsageError
from dpo_fast.files import copy_file, new_folder, sha256
from dpo_fast.recipes import Recipe
from dpo_fast.store import PART_ROWS
from dpo_fast.tensorrt.builder import build_plans, check_graphs, why_not_here
from dpo_fast.tensorrt.graphs import make_graphs, write_graph
from dpo_fast.tensorrt.options import BuildOptions
from dpo_fast.tensorrt.package import PACKAGES, count_gpus, import_package
from dpo_fast.tensorrt.plans import Plans, Profile, read_plans, write_plans
from dpo_fast.tensorrt.profiles import BatchShapes, batch_shapes, choose_profiles, describe, uses_of
from dpo_fast.tensorrt.refit import refit_plan
from dpo_fast.token_cache import TokenCache, find_tokens, of_the_tokenizer


def check_build_options(recipe: Recipe, options: BuildOptions) -> None:
    """Refuse options of plans before anything is done: those that the recipe has no use for, or cannot have here.

    Raises:
        UsageError: the engine runs no plans, or its builder cannot do this.
        MissingDependencyError: the options ask for plans, and the package is not installed.
    """
    if options == BuildOptions():
        return
    if recipe.engine not in PACKAGES:
        raise UsageError(f"the recipe {recipe.name} has no plans to build; leave out what is said of them")
    options.check(PACKAGES[recipe.engine])
    import_package(PACKAGES[recipe.engine], "building plans")


def make_plans(
    folder: Path,
    entries: Mapping[str, ModelEntry],
    recipe: Recipe,
    max_length: int,
    options: BuildOptions,
    *,
    trust_remote_code: bool = False,
    report: Callable[[str], None] = lambda step: None,
) -> dict[str, ModelEntry]:
    """Make the plans of a bundle that is being exported, if its recipe wants any and this machine can build them.

    Args:
        folder: the bundle that is being made.
        entries: by role.
        recipe: what it is made for.
        max_length: of prompt and completion together, in tokens.
        options: how plans are built; any that is not the default says that they must be.
        trust_remote_code: whether the tokenizer's own Python code may be run.
        report: called with a line at each step.

    Returns:
        The entries, with `plan` filled in where plans were built.

    Raises:
        BuildError: TensorRT would refuse a graph, or did.
        UsageError: a data set that does not fit.
    """
    if recipe.engine not in PACKAGES:
        return dict(entries)
    package = PACKAGES[recipe.engine]
    report("checking the graphs' operators against TensorRT's")
    check_graphs(folder, entries)
    reason = why_not_here(package)
    if reason is not None and options == BuildOptions():
        report(f"no plans were built: {reason}; build them with `dpo-fast build`")
        return dict(entries)
    profiles = _choose(folder, entries, recipe, max_length, options, trust_remote_code, report)
    return build_plans(folder, entries, recipe, profiles, options, report)


def build(
    bundle: Path,
    options: BuildOptions,
    *,
    trust_remote_code: bool = False,
    report: Callable[[str], None] = lambda step: None,
) -> Path:
    """Build the plans of an exported bundle, in the place of any that it has.

    Args:
        bundle: what `dpo_fast.export` wrote, with a recipe for TensorRT.
        options: how plans are built.
        trust_remote_code: whether the tokenizer's own Python code may be run.
        report: called with a line at each step.

    Returns:
        The bundle's folder; it is replaced at once, and only when everything has gone well.

    Raises:
        InputError: as `make_plans`; the bundle is altered, or its recipe is for another engine.
    """
    opened = open_bundle(bundle)
    manifest = opened.manifest
    recipe = Recipe(**manifest.recipe)
    if recipe.engine not in PACKAGES:
        raise UsageError(f"{bundle}: was exported with the recipe {recipe.name}, which runs graphs and needs no plans")
    options.check(PACKAGES[recipe.engine])
    import_package(PACKAGES[recipe.engine], "building plans")
    report("checking the bundle's files")
    opened.verify()
    old = [entry.plan for entry in manifest.models.values() if entry.plan is not None]
    with new_folder(bundle, overwrite=True, marker=MANIFEST) as folder:
        kept = {name: at for name, at in manifest.files.items() if not any(is_of_plan(name, plan) for plan in old)}
        card = f"{POLICY}/README.md"  # which no manifest lists
        for name in [*kept, *([card] if (bundle / card).is_file() else [])]:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            copy_file(bundle / name, folder / name, link=True)
        entries = {role: replace(entry, plan=None) for role, entry in manifest.models.items()}
        profiles = _choose(folder, entries, recipe, manifest.max_length, options, trust_remote_code, report)
        entries = build_plans(folder, entries, recipe, profiles, options, report)
        report("hashing")
        write_manifest(folder, replace(manifest, models=entries, files=hash_files(folder, known=kept)))
    return bundle


def renew_plans(
    bundle: Path,
    folder: Path,
    entry: ModelEntry,
    recipe: Recipe,
    report: Callable[[str], None] = lambda step: None,
) -> ModelEntry:
    """Put a refitted graph's weights into its plans; where they take none, build them again as they were built.

    Args:
        bundle: the old one, whose plans are read.
        folder: the new one, which holds the new engine graph and weights.
        entry: of the role in the old manifest, with the new engine graph.
        recipe: what the bundle is made for.
        report: called with a line at each step.

    Returns:
        The entry; without plans where they can be neither refitted nor built here, which is reported.

    Raises:
        BundleError, BuildError: as `dpo_fast.tensorrt.refit.refit_plan` and `build_plans`.
    """
    assert entry.plan is not None
    plans = read_plans(bundle / entry.plan)
    if plans.refittable and count_gpus():
        _refit(bundle, folder, entry, plans, report)
        return entry
    reason = why_not_here(plans.package)
    if reason is not None:
        report(f"its plans were left out, for they hold the old weights: {reason}; build them with `dpo-fast build`")
        return replace(entry, plan=None)
    options = BuildOptions(**{**plans.options, "targets": tuple(plans.options["targets"])})
    made = build_plans(folder, {POLICY: entry}, recipe, {entry.layout: plans.profiles}, options, report)
    return made[POLICY]


def _refit(bundle: Path, folder: Path, entry: ModelEntry, plans: Plans, report: Callable[[str], None]) -> None:
    """New weights in both plans of a role."""
    assert entry.plan is not None
    package = import_package(plans.package, "refitting plans")
    target = (folder / entry.plan).parent
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target, prefix="refitting-") as working:
        for part, model in make_graphs(folder / entry.engine_graph).items():
            name = {"body": plans.body, "head": plans.head}[part]
            graph = write_graph(model, Path(working), part)
            old = (bundle / entry.plan).parent / name
            refit_plan(package, old, graph, target / name, host_code=bool(plans.options.get("version_compatible")))
            report(f"{name}: refitted")
    write_plans(folder / entry.plan, plans)


def _choose(
    folder: Path,
    entries: Mapping[str, ModelEntry],
    recipe: Recipe,
    max_length: int,
    options: BuildOptions,
    trust_remote_code: bool,
    report: Callable[[str], None],
) -> dict[Layout, list[Profile]]:
    """The optimisation profiles of each layout that a role has; what they have to do is reported before any build."""
    chosen: dict[Layout, list[Profile]] = {}
    for layout in {entry.layout for entry in entries.values()}:
        shapes = None
        if options.profile_from is not None:
            shapes = _read_shapes(folder, entries, recipe, max_length, layout, options, trust_remote_code)
        chosen[layout] = choose_profiles(
            shapes,
            token_budget=recipe.token_budget,
            longest_row=longest_row(layout, max_length),
            count=options.profiles,
        )
        if shapes is None:
            widths = ", ".join(f"{profile.width[0]}…{profile.width[2]}" for profile in chosen[layout])
            report(f"profiles of {widths} tokens; name a data set with --profile-from to fit them to it")
        else:
            for line in describe(uses_of(chosen[layout], shapes)):
                report(line)
    return chosen


def _read_shapes(
    folder: Path,
    entries: Mapping[str, ModelEntry],
    recipe: Recipe,
    max_length: int,
    layout: Layout,
    options: BuildOptions,
    trust_remote_code: bool,
) -> BatchShapes:
    """The batches that a data set makes, part by part as an evaluation does.

    Raises:
        UsageError: no row of it can be used.
    """
    assert options.profile_from is not None
    files = [path for path in sorted((folder / POLICY).iterdir()) if path.is_file() and of_the_tokenizer(path.name)]
    source = find_tokens(
        options.profile_from,
        folder / POLICY,
        {f"{POLICY}/{path.name}": sha256(path) for path in files},
        max_length=max_length,
        vocabulary=entries[POLICY].vocabulary,
        split=options.profile_split,
        on_error="skip",
        trust_remote_code=trust_remote_code,
    )
    tokens = TokenCache(source)
    limit = min(recipe.token_budget, longest_row(layout, max_length))
    try:
        tokens.make_ahead(0, tokens.rows)
        parts = [(start, min(start + PART_ROWS, tokens.rows)) for start in range(0, tokens.rows, PART_ROWS)]
        arrangements = (arrange(tokens.read(*rows)[0], layout, limit) for rows in parts)
        shapes = batch_shapes(arrangements, recipe.token_budget)
    finally:
        tokens.close()
    if not len(shapes.width):
        raise UsageError(f"--profile-from {options.profile_from}: none of its {tokens.rows} rows can be used")
    return shapes
