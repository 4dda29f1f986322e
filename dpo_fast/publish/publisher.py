"""A bundle's policy to the Hub: everything is looked at and made first, on this machine; then it is uploaded."""

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpo_fast.bundle import POLICY, Bundle, open_bundle
from dpo_fast.errors import DpoFastError, MissingDependencyError, UsageError, VerificationError
from dpo_fast.files import write_text
from dpo_fast.publish import eval_results
from dpo_fast.publish.card import NO_PLOTS, adapter_base_model, card_of_folder, read_card, render_card_use
from dpo_fast.publish.graphs import GraphFiles, collect_graphs
from dpo_fast.publish.hub import check_repo_id, find_token, push
from dpo_fast.publish.metadata import problems_of_card
from dpo_fast.publish.model_folder import model_files, problems_of
from dpo_fast.publish.values import is_model_id
from dpo_fast.publish.verified import Verified, find_verification, is_of
from dpo_fast.run_folder import METRICS
from dpo_fast.text import one_line

CARD = "README.md"
MARGINS_PLOT, SUBSETS_PLOT = "plots/margin_histogram.png", "plots/accuracy_by_subset.png"


@dataclass(frozen=True, slots=True)
class PushOptions:
    """What a user can choose about a push.

    Attributes:
        private: whether a new repository is private.
        run: a run of this bundle whose numbers and plots go on the card; None takes the card as the last evaluation
            left it.
        include_graph: whether the exact graph goes too, so that it runs from the repository's root.
        include_engines: whether the recipe's graph, its quantised weights and its plans go.
        verification: the folder that `dpo-fast verify` wrote; None takes the bundle's attestation.json.
        allow_failed_verification: whether a bundle goes whose verdict is not "pass".
        eval_task: id of the task in the benchmark data set that `.eval_results` names.
        revision: the branch to commit to; the main one by default.
        create_pr: whether a pull request is opened instead.
        commit_message: the commit's title.
    """

    private: bool = False
    run: Path | None = None
    include_graph: bool = False
    include_engines: bool = False
    verification: Path | None = None
    allow_failed_verification: bool = False
    eval_task: str = eval_results.TASK
    revision: str | None = None
    create_pr: bool = False
    commit_message: str | None = None


@dataclass(slots=True)
class Plan:
    """What a push would do.

    Attributes:
        files: on this disk, by path in the repository; those that were made lie in a temporary folder.
        warnings: what the user should know, a sentence each.
        refusals: what keeps the push from being made.
    """

    files: dict[str, Path] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    refusals: list[DpoFastError] = field(default_factory=list)

    def sizes(self) -> dict[str, int]:
        """The bytes of each file, by path in the repository."""
        return {name: self.files[name].stat().st_size for name in sorted(self.files)}

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Within the block an error of ours is one more refusal, and the plan goes on behind it."""
        try:
            yield
        except DpoFastError as error:
            self.refusals.append(error)


@dataclass(frozen=True, slots=True)
class Pushed:
    """What a push did, or would do.

    Attributes:
        url: the commit's or the pull request's; None for a dry run.
        files: bytes by path in the repository.
        warnings: a sentence each.
        refusals: what would be refused; empty after a push.
    """

    url: str | None
    files: dict[str, int]
    warnings: list[str]
    refusals: list[DpoFastError]


def push_bundle(
    folder: Path,
    repo_id: str,
    options: PushOptions = PushOptions(),
    *,
    dry_run: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> Pushed:
    """Upload a bundle's policy: the original weights or the adapter alone, the tokenizer, the card, and what is asked.

    The bundle stays as it is.

    Args:
        folder: the bundle.
        repo_id: ``user/name``.
        options: see `PushOptions`.
        dry_run: whether it is only said what would go, and what would be refused; the Hub is not asked.
        report: called with a line for each warning, before anything is sent.

    Returns:
        What was uploaded.

    Raises:
        BundleError: the bundle is damaged, was altered, or is not the one that was verified.
        CheckpointError: its policy is not a whole model, or holds what should not be published.
        UsageError: the run or the verification is not of this bundle, or the repository's name cannot be one.
        VerificationError: the verdict is not "pass".
        HubError: the Hub refused, or could not be reached.
    """
    with tempfile.TemporaryDirectory(prefix="dpo-fast-card-") as working:
        plan = _plan(folder, repo_id, options, Path(working))
        with plan.noting():
            find_token(repo_id)
        if plan.refusals and not dry_run:
            raise plan.refusals[0]
        for warning in plan.warnings:
            report(f"warning: {warning}")
        url = None
        if not dry_run:
            url = push(
                plan.files,
                repo_id,
                private=options.private,
                revision=options.revision,
                commit_message=options.commit_message,
                create_pr=options.create_pr,
            )
        return Pushed(url, plan.sizes(), plan.warnings, plan.refusals)


def _plan(folder: Path, repo_id: str, options: PushOptions, working: Path) -> Plan:
    """Make what is to be made, in the folder `working`, and note whatever speaks against the push."""
    plan = Plan()
    with plan.noting():
        check_repo_id(repo_id)
    if options.create_pr and options.revision is not None:
        plan.refusals.append(UsageError(f"--create-pr goes to main: leave --revision {options.revision} out"))
    bundle = open_bundle(folder)
    policy = bundle.model_folder(POLICY)
    verified: Verified | None = None
    with plan.noting():
        verified = _verified(bundle, options, plan.warnings)
    metrics: dict[str, Any] | None = None
    if options.run is not None:
        with plan.noting():
            metrics = _metrics_of(options.run, bundle)
    problems = list(problems_of(policy))
    plan.refusals += problems
    if problems:
        return plan
    plan.files |= model_files(policy)
    with plan.noting():
        _warn_of_local_base(policy, plan.warnings)
    graphs = GraphFiles()
    if options.include_graph or options.include_engines:
        with plan.noting():
            graphs = collect_graphs(bundle, working, exact=options.include_graph, engines=options.include_engines)
            plan.files |= graphs.files
            _warn_of_graphs(bundle, graphs, options, plan.warnings)
    plots = _draw(options.run, metrics, working, plan) if options.run is not None and metrics is not None else NO_PLOTS
    with plan.noting():
        card = read_card(policy)
        if metrics is not None or card is None:
            card = card_of_folder(policy, metrics, base_model=bundle.base_model, repo_id=repo_id, plots=plots)
        card = render_card_use(card, repo_id=repo_id, verified=verified, graphs=graphs.graphs)
        write_text(working / CARD, card)
        plan.files[CARD] = working / CARD
        plan.warnings += [f"{CARD}: {problem}" for problem in problems_of_card(card)]
    results = eval_results.render_eval_results(metrics, task=options.eval_task) if metrics is not None else None
    if results is not None:
        (working / eval_results.PATH).parent.mkdir()
        write_text(working / eval_results.PATH, results)
        plan.files[eval_results.PATH] = working / eval_results.PATH
    return plan


def _verified(bundle: Bundle, options: PushOptions, warnings: list[str]) -> Verified | None:
    """What is known of the bundle's engine, if that lets it be published; the bundle's files are hashed on the way.

    Raises:
        VerificationError: the verdict is not "pass", and nobody has said that it need not be.
    """
    verified = find_verification(bundle, options.verification)
    if verified is None:
        warnings.append(
            f"{bundle.folder}: its engine has not been verified; `dpo-fast verify {bundle.folder} --dataset … "
            "--output …` says whether it makes the original weights' decisions"
        )
    elif verified.verdict != "pass" and not options.allow_failed_verification:
        way_out = "verify it with more pairs" if verified.verdict == "cannot tell" else "mend the engine, verify again"
        raise VerificationError(
            f"{bundle.folder}: the verdict of its verification is {verified.verdict!r}; {way_out}, or say "
            "--allow-failed-verification"
        )
    elif verified.verdict != "pass":
        warnings.append(
            f"{bundle.folder}: the verdict of its verification is {verified.verdict!r}, and the card says so"
        )
    elif verified.limits:
        warnings.append(
            f"{bundle.folder}: was verified with limits by choice, and the card says so: {'; '.join(verified.limits)}"
        )
    return verified


def _metrics_of(run: Path, bundle: Bundle) -> dict[str, Any]:
    """A finished run's metrics, if they are this bundle's."""
    path = run / METRICS
    try:
        metrics: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        shard = metrics["provenance"].get("shard")
        scored = {role: each["weights_and_graph_sha256"] for role, each in metrics["provenance"]["models"].items()}
        of_policy = scored[POLICY]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"--run {run}: holds no readable {METRICS}; name a folder that `evaluate` wrote") from error
    if of_policy != bundle.role_hashes(POLICY):
        raise UsageError(f"--run {run}: was made with other weights than this bundle's; evaluate this bundle")
    if not is_of(bundle, scored):
        raise UsageError(f"--run {run}: was made with another reference than this bundle's; evaluate this bundle")
    if shard is not None:
        raise UsageError(f"--run {run}: is of a share of the rows; name what `dpo-fast merge` makes of all shards")
    return metrics


def _draw(run: Path, metrics: dict[str, Any], working: Path, plan: Plan) -> dict[str, str]:
    """Draw a run's plots; their paths in the repository, by what they show."""
    from dpo_fast.report.images import accuracy_by_subset_png, margin_histogram_png

    wanted = {"Reward margins of the pairs": (MARGINS_PLOT, margin_histogram_png)}
    if metrics.get("groups"):
        wanted["Reward accuracy by subset"] = (SUBSETS_PLOT, accuracy_by_subset_png)
    plots: dict[str, str] = {}
    with plan.noting():
        (working / "plots").mkdir()
        for title, (name, draw) in wanted.items():
            try:
                draw(run, working / name)
            except MissingDependencyError as error:
                plan.warnings.append(f"the card goes without plots: {error}")
                break
            plan.files[name] = working / name
            plots[title] = name
    return plots


def _warn_of_local_base(policy: Path, warnings: list[str]) -> None:
    """An adapter whose base is named by a path is of no use elsewhere, and says where it was made."""
    if not (policy / "adapter_config.json").is_file():
        return
    base = adapter_base_model(policy)
    if base is None or not is_model_id(base) or Path(base).exists():
        warnings.append(
            f"adapter_config.json names the base model {one_line(repr(base))}, which others cannot load: put its id on "
            "the Hub into the adapter's base_model_name_or_path, and export again"
        )


def _warn_of_graphs(bundle: Bundle, graphs: GraphFiles, options: PushOptions, warnings: list[str]) -> None:
    """What a user may not expect of the graphs."""
    if graphs.foreign_weights:
        size = sum(graphs.files[name].stat().st_size for name in graphs.foreign_weights)
        warnings.append(
            f"the graph needs weights beneath the policy's own, which go too, {size:,} bytes: "
            f"{', '.join(graphs.foreign_weights)}"
        )
    entry = bundle.manifest.models[POLICY]
    if options.include_engines and entry.engine_graph == entry.graph and entry.plan is None:
        recipe = bundle.manifest.recipe["name"]
        warnings.append(f"--include-engines: the recipe {recipe} runs the exact graph itself; that is --include-graph")
