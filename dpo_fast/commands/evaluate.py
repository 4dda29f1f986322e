"""The command that scores a preference set."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from dpo_fast.commands.options import (
    AggregateChoice,
    AsJson,
    BatchSize,
    Beta,
    BootstrapSeed,
    BundleArgument,
    DatasetOption,
    DiscopopTau,
    Earlier,
    FAlphaDivergenceCoef,
    FDivergenceType,
    LabelSmoothing,
    LdAlpha,
    Limit,
    LossType,
    LossWeight,
    MaxLength,
    Overwrite,
    ReportTo,
    Split,
    Step,
    TrainRun,
    TrustRemoteCode,
    UseWeighting,
)
from dpo_fast.commands.output import console, print_json, say
from dpo_fast.errors import UsageError
from dpo_fast.types import LossSettings, OnError, ReferenceFree

if TYPE_CHECKING:
    from dpo_fast.cluster.options import ClusterOptions
    from dpo_fast.evaluate import EvaluateOptions
    from dpo_fast.generation.files import Sample


def evaluate_command(
    bundle: BundleArgument,
    dataset: DatasetOption,
    output: Annotated[Path, typer.Option(help="The run to write.", show_default=False)],
    split: Split = None,
    limit: Limit = None,
    beta: Beta = 0.1,
    loss_type: LossType = None,
    loss_weight: LossWeight = None,
    label_smoothing: LabelSmoothing = 0.0,
    ld_alpha: LdAlpha = None,
    f_divergence_type: FDivergenceType = "reverse_kl",
    f_alpha_divergence_coef: FAlphaDivergenceCoef = 0.5,
    use_weighting: UseWeighting = False,
    discopop_tau: DiscopopTau = 0.05,
    reference_free: Annotated[ReferenceFree | None, typer.Option(help="Score by the policy's log-probs alone.")] = None,
    group_by: Annotated[str | None, typer.Option(help="Column whose values get metrics of their own.")] = None,
    aggregate: AggregateChoice = "exact",
    batch_size: BatchSize = 8,
    max_length: MaxLength = None,
    token_budget: Annotated[
        str | None,
        typer.Option(
            help="Tokens of an engine's batch, or auto: measured at the start; the recipe's by default. Changes no "
            "number.",
            metavar="INTEGER|auto",
        ),
    ] = None,
    part_size: Annotated[
        int, typer.Option(help="Rows that are scored, and kept, at a time. Changes no number.")
    ] = 1024,
    shard: Annotated[
        str | None,
        typer.Option(help="Only the i-th of n shares of the set, such as 2/8; see `dpo-fast merge`.", metavar="i/n"),
    ] = None,
    reference_scores: Annotated[
        Path | None, typer.Option(help="Take the reference's scores from this run; the cache is looked at anyway.")
    ] = None,
    engines: Annotated[
        Literal["auto", "together", "in-turn", "apart"],
        typer.Option(
            help="Whether policy and reference are in memory together; in workers apart, on a cluster; auto goes by "
            "what is free."
        ),
    ] = "auto",
    threads: Annotated[int, typer.Option(help="Threads of the engine; 0 takes every core.")] = 0,
    scores: Annotated[
        str | None,
        typer.Option(
            help="Where the parts are written, if not in the run: a folder, or a URL such as s3://BUCKET/RUN.",
            metavar="DIR|URL",
        ),
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            help="Score with a Ray cluster's workers: ray (one that is there, else local), local (this machine), auto, "
            "HOST:PORT, or ray://HOST:PORT.",
            metavar="ray|local|auto|ADDRESS",
        ),
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Of the cluster; by default as many as it has room for.")] = None,
    resources_per_worker: Annotated[
        str | None,
        typer.Option(
            help="What a worker takes, such as '{\"GPU\": 1}'; by default a GPU where the engine runs on one, else its "
            "share of the cores.",
            metavar="JSON",
        ),
    ] = None,
    worker_timeout: Annotated[
        float | None,
        typer.Option(
            help="Seconds without a batch after which a worker is killed, and its part repeated.  [default: 600]"
        ),
    ] = None,
    attempts: Annotated[
        int | None, typer.Option(help="How often the cluster tries a part before it counts as failed.  [default: 3]")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Say what it would take: parts, tokens, time, memory; a few seconds are measured."
        ),
    ] = False,
    on_error: Annotated[
        OnError, typer.Option(help="What a row that cannot be used does: stop the run, or be skipped.")
    ] = "stop",
    generate: Annotated[
        int | None,
        typer.Option(help="Samples of policy and reference, into the run; see `dpo-fast generate`.", metavar="N"),
    ] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Write the run's report.html too; see `dpo-fast report`.")
    ] = False,
    train_run: TrainRun = None,
    earlier: Earlier = None,
    report_to: ReportTo = None,
    step: Step = None,
    seed: BootstrapSeed = 0,
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Score a preference set and print TRL's metrics; the run keeps every token's log-prob."""
    from dpo_fast.advice.advise import advise
    from dpo_fast.advice.hints import hints_as_json, print_hints
    from dpo_fast.evaluate import METRICS, EvaluateOptions, evaluate
    from dpo_fast.generation.files import remove_samples
    from dpo_fast.report.charts import plotly_script
    from dpo_fast.report.write import remove_report, write_report
    from dpo_fast.trackers import check_trackers
    from dpo_fast.trackers.finished_run import report_run

    check_trackers(report_to or ())  # rather now than after the work
    if generate is not None and generate < 1:
        raise UsageError(f"--generate {generate} must be at least 1")
    if generate is not None and shard is not None:
        raise UsageError("--generate answers prompts of the whole set: leave --shard out, or use `dpo-fast generate`")
    if report and shard is not None:
        raise UsageError("--report is of the whole set: leave --shard out, then `dpo-fast merge` and `dpo-fast report`")
    if report:
        plotly_script()  # is it installed? rather now than after the work
    for name, folder in [("--train-run", train_run), *(("--earlier", each) for each in earlier or ())]:
        if folder is not None and not folder.is_dir():  # rather now than after the work
            raise UsageError(f"{name} {folder}: no such folder; name one that `dpo-fast evaluate` wrote")
    loss = LossSettings(
        beta=beta,
        loss_type=tuple(loss_type or ("sigmoid",)),
        loss_weights=tuple(loss_weight) if loss_weight else None,
        label_smoothing=label_smoothing,
        ld_alpha=ld_alpha,
        f_divergence_type=f_divergence_type,
        f_alpha_divergence_coef=f_alpha_divergence_coef,
        use_weighting=use_weighting,
        discopop_tau=discopop_tau,
        reference_free=reference_free,
    )
    options = EvaluateOptions(
        split=split,
        limit=limit,
        group_by=group_by,
        on_error=on_error,
        max_length=max_length,
        loss=loss,
        aggregate=aggregate,
        batch_size=batch_size,
        token_budget=_token_budget(token_budget),
        part_size=part_size,
        shard=_shard(shard),
        threads=threads,
        engines=engines,
        reference_scores=reference_scores,
        scores=scores,
        cluster=_cluster(cluster, workers, resources_per_worker, worker_timeout, attempts),
        seed=seed,
        trust_remote_code=trust_remote_code,
        overwrite=overwrite,
        progress=sys.stderr.isatty(),
    )
    if dry_run:
        _plan(bundle, dataset, output, options, as_json=as_json)
        return
    metrics = evaluate(bundle, dataset, output, options, say)
    if overwrite:  # what is left of another run
        remove_samples(output)
        remove_report(output)
    if generate is not None:
        samples = _generate(bundle, dataset, output, options, generate)
        metrics |= {"samples": [asdict(sample) for sample in samples]}
    # A shard is no whole set; `dpo-fast advise` takes the merged run.
    hints = [] if shard is not None else advise(output, train_run=train_run, earlier=earlier or ())
    page = None
    if report:
        page = write_report(output, bundle=bundle, trust_remote_code=trust_remote_code, overwrite=True, report=say)
    if as_json:
        print_json(metrics | {"hints": hints_as_json(hints)})
    else:
        from dpo_fast.table import print_metrics

        print_metrics(metrics, console())
        if options.cluster is not None:
            from dpo_fast.plan_table import print_workers

            print_workers(metrics, console())
        if generate is not None:
            from dpo_fast.generation.table import print_samples

            print_samples(samples, console())
        print_hints(hints, console())
        if page is not None:
            typer.echo(f"report: {page}")
        card = "" if shard is not None else f"; model card: {bundle / 'policy' / 'README.md'}"
        typer.echo(f"run: {output} ({METRICS}){card}")
    report_run(report_to or (), output, bundle=bundle, step=step, say=say)


def _plan(bundle: Path, dataset: str, output: Path, options: "EvaluateOptions", *, as_json: bool) -> None:
    """Print what an evaluation would take."""
    from dpo_fast.plan import plan

    planned = plan(bundle, dataset, output, options)
    if as_json:
        print_json(asdict(planned))
        return
    from dpo_fast.plan_table import print_plan

    print_plan(planned, console())


def _cluster(
    address: str | None,
    workers: int | None,
    resources: str | None,
    worker_timeout: float | None,
    attempts: int | None,
) -> "ClusterOptions | None":
    """The options of a cluster; None for this process."""
    from dpo_fast.cluster.options import ClusterOptions, parse_address, parse_resources

    given = {
        "--workers": workers,
        "--resources-per-worker": resources,
        "--worker-timeout": worker_timeout,
        "--attempts": attempts,
    }
    if address is None:
        for name, value in given.items():
            if value is not None:
                raise UsageError(
                    f"{name} {value} is of a cluster's workers: say --cluster too, such as --cluster local"
                )
        return None
    default = ClusterOptions()
    return ClusterOptions(
        address=parse_address(address),
        workers=workers,
        resources=parse_resources(resources) if resources is not None else None,
        patience=worker_timeout if worker_timeout is not None else default.patience,
        attempts=attempts if attempts is not None else default.attempts,
    )


def _generate(bundle: Path, dataset: str, output: Path, options: "EvaluateOptions", num_samples: int) -> "list[Sample]":
    """Samples of the data that were evaluated, written into the run."""
    from dpo_fast.generate import GenerateOptions, generate
    from dpo_fast.generation.files import write_samples

    same = GenerateOptions(
        num_samples=num_samples,
        seed=options.seed,
        split=options.split,
        limit=options.limit,
        on_error=options.on_error,
        max_length=options.max_length,
        trust_remote_code=options.trust_remote_code,
    )
    generated = generate(bundle, dataset, same, say)
    write_samples(output, generated.samples, generated.provenance)
    return generated.samples


def _token_budget(value: str | None) -> int | Literal["auto"] | None:
    """The number, "auto" or nothing."""
    if value is None:
        return None
    if value == "auto":
        return "auto"
    try:
        return int(value)
    except ValueError as error:
        raise UsageError(f"--token-budget {value!r} is neither a number of tokens nor auto") from error


def _shard(value: str | None) -> tuple[int, int] | None:
    """i/n as two numbers."""
    if value is None:
        return None
    try:
        shard, shards = map(int, value.split("/"))
    except ValueError as error:
        raise UsageError(f"--shard {value!r} is not written i/n, such as 2/8") from error
    return shard, shards
