"""The command that follows a training: watch."""

from pathlib import Path
from typing import Annotated, Any

import typer

from dpo_fast.commands.options import (
    AggregateChoice,
    AsJson,
    BatchSize,
    Beta,
    BundleArgument,
    DatasetOption,
    DiscopopTau,
    FAlphaDivergenceCoef,
    FDivergenceType,
    LabelSmoothing,
    LdAlpha,
    Limit,
    LossType,
    LossWeight,
    MaxLength,
    NoSelfCheck,
    Overwrite,
    ReportTo,
    Split,
    TrustRemoteCode,
    UseWeighting,
)
from dpo_fast.commands.output import LONGEST_LINE, console, print_json, say
from dpo_fast.text import one_line
from dpo_fast.types import LossSettings, OnError


def watch_command(
    bundle: BundleArgument,
    checkpoints: Annotated[
        Path, typer.Option(help="The trainer's output_dir, where checkpoint-STEP appear.", show_default=False)
    ],
    dataset: DatasetOption,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder of watch.json, watch.html and a run for each checkpoint.  [default: CHECKPOINTS/watched]",
            show_default=False,
        ),
    ] = None,
    poll_seconds: Annotated[float, typer.Option(help="Seconds between two looks at the checkpoints.")] = 10.0,
    once: Annotated[bool, typer.Option("--once", help="Score what is there, and end.")] = False,
    stop_after: Annotated[
        int | None,
        typer.Option(
            help="End with so many checkpoints scored, those of earlier calls included.  [default: with the training's "
            "last step]",
            show_default=False,
        ),
    ] = None,
    report_to: ReportTo = None,
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
    aggregate: AggregateChoice = "exact",
    batch_size: BatchSize = 8,
    max_length: MaxLength = None,
    threads: Annotated[int, typer.Option(help="Threads of the engine; 0 takes every core.")] = 0,
    on_error: Annotated[
        OnError, typer.Option(help="What a row that cannot be used does: stop the watch, or be skipped.")
    ] = "stop",
    no_self_check: NoSelfCheck = False,
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Score each checkpoint of a training as it appears: margin, accuracy and drift over the steps."""
    from rich.live import Live
    from rich.text import Text

    from dpo_fast.evaluate import EvaluateOptions
    from dpo_fast.training.page import PAGE
    from dpo_fast.training.steps import WATCH
    from dpo_fast.training.table import watch_table
    from dpo_fast.training.watch import WatchOptions, watch

    options = WatchOptions(
        poll_seconds=poll_seconds,
        once=once,
        stop_after=stop_after,
        report_to=tuple(report_to or ()),
        self_check=not no_self_check,
        overwrite=overwrite,
        evaluate=EvaluateOptions(
            split=split,
            limit=limit,
            on_error=on_error,
            max_length=max_length,
            loss=LossSettings(
                beta=beta,
                loss_type=tuple(loss_type or ("sigmoid",)),
                loss_weights=tuple(loss_weight) if loss_weight else None,
                label_smoothing=label_smoothing,
                ld_alpha=ld_alpha,
                f_divergence_type=f_divergence_type,
                f_alpha_divergence_coef=f_alpha_divergence_coef,
                use_weighting=use_weighting,
                discopop_tau=discopop_tau,
            ),
            aggregate=aggregate,
            batch_size=batch_size,
            threads=threads,
            trust_remote_code=trust_remote_code,
        ),
    )
    output = output or checkpoints / "watched"
    where = console()
    if where.is_terminal and not as_json:
        with Live(console=where, auto_refresh=False) as live:

            def show(steps: dict[str, Any]) -> None:
                live.update(watch_table(steps, f"watching {checkpoints}; Ctrl-C ends"), refresh=True)

            def tell(line: str) -> None:  # as `say`, but above the table
                where.print(Text(one_line(line, LONGEST_LINE)))

            result = watch(bundle, checkpoints, dataset, output, options, tell, show)
            live.update(watch_table(result), refresh=True)
    else:
        result = watch(bundle, checkpoints, dataset, output, options, say)
        if as_json:
            print_json(result)
            return
        where.print(watch_table(result))
    typer.echo(f"watch: {output} ({WATCH}, {PAGE})")
