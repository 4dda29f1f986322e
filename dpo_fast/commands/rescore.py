"""Commands that compute metrics of finished runs anew: merge, rescore. No engine, no model."""

from pathlib import Path
from typing import Annotated

import typer

from dpo_fast.commands.options import AggregateChoice, AsJson, BatchSize, BootstrapSeed, Overwrite
from dpo_fast.commands.output import console, print_json
from dpo_fast.types import LOSS_TYPES, FDivergence, ReferenceFree


def merge_command(
    shards: Annotated[
        list[Path], typer.Argument(help="The runs of all shards, in any order.", metavar="RUN...", show_default=False)
    ],
    output: Annotated[Path, typer.Option(help="The run to write.", show_default=False)],
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Put the runs of all shards of a set together; the parts and the numbers are those of one run over all of it."""
    from dpo_fast.merge import merge
    from dpo_fast.run_folder import METRICS

    metrics = merge(shards, output, overwrite=overwrite)
    if as_json:
        print_json(metrics)
        return
    from dpo_fast.table import print_metrics

    print_metrics(metrics, console())
    typer.echo(f"run: {output} ({METRICS})")


def rescore_command(
    run: Annotated[Path, typer.Argument(help="Folder that `dpo-fast evaluate` wrote.", show_default=False)],
    beta: Annotated[
        list[str] | None,
        typer.Option(
            help="Strengths of the reference, with commas between them.  [default: the run's]", metavar="0.05,0.1,…"
        ),
    ] = None,
    loss_type: Annotated[
        list[str] | None,
        typer.Option(
            help=f"all, or some of {', '.join(LOSS_TYPES)}, each by itself.  [default: the run's]", metavar="all|NAME,…"
        ),
    ] = None,
    label_smoothing: Annotated[
        float | None, typer.Option(help="For robust, exo_pair, aot and aot_unpaired.  [default: the run's]")
    ] = None,
    ld_alpha: Annotated[
        float | None,
        typer.Option(help="Weight of tokens beyond the shorter completion's length (LD-DPO).  [default: the run's]"),
    ] = None,
    f_divergence_type: Annotated[
        FDivergence | None,
        typer.Option(help="Regulariser between policy and reference (f-DPO).  [default: the run's]"),
    ] = None,
    f_alpha_divergence_coef: Annotated[
        float | None, typer.Option(help="Alpha of alpha_divergence.  [default: the run's]")
    ] = None,
    use_weighting: Annotated[
        bool | None,
        typer.Option(
            "--use-weighting/--no-use-weighting",
            help="Weight pairs by the policy's probabilities (WPO).  [default: the run's]",
        ),
    ] = None,
    discopop_tau: Annotated[float | None, typer.Option(help="Temperature of discopop.  [default: the run's]")] = None,
    reference_free: Annotated[
        ReferenceFree | None,
        typer.Option(help="Score by the policy's log-probs alone, as a run without a reference must be."),
    ] = None,
    seed: BootstrapSeed = 0,
    aggregate: AggregateChoice = "exact",
    batch_size: BatchSize = 8,
    as_json: AsJson = False,
) -> None:
    """Compute a finished run's metrics for other betas and losses, from its scores alone."""
    from dpo_fast.rescore import open_run, rescore
    from dpo_fast.rescore_settings import make_settings

    settings, notes = make_settings(
        open_run(run)[1],
        beta or (),
        loss_type or (),
        label_smoothing=label_smoothing,
        ld_alpha=ld_alpha,
        f_divergence_type=f_divergence_type,
        f_alpha_divergence_coef=f_alpha_divergence_coef,
        use_weighting=use_weighting,
        discopop_tau=discopop_tau,
        reference_free=reference_free,
    )
    result = {**rescore(run, settings, aggregate=aggregate, batch_size=batch_size, seed=seed), "notes": notes}
    if as_json:
        print_json(result)
        return
    from dpo_fast.rescore_table import print_rescore

    print_rescore(result, console())
