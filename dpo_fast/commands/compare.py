"""Commands that look at finished runs beside each other: compare, advise."""

from pathlib import Path
from typing import Annotated, Any

import typer

from dpo_fast.commands.options import AsJson, BootstrapSeed, Earlier, Overwrite, TrainRun
from dpo_fast.commands.output import console, print_json
from dpo_fast.errors import UsageError
from dpo_fast.types import LossType, ReferenceFree

COMPARISON, PAGE = "compare.json", "compare.html"


def compare_command(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="Folders that `dpo-fast evaluate` wrote, of the same pairs.", metavar="RUN...", show_default=False
        ),
    ],
    output: Annotated[
        Path | None, typer.Option(help=f"Folder to write {COMPARISON} and {PAGE} into.", show_default=False)
    ] = None,
    all_pairs: Annotated[
        bool, typer.Option("--all-pairs", help="Compare each run with each other, instead of all with the first.")
    ] = False,
    beta: Annotated[float | None, typer.Option(help="For all runs.  [default: theirs, if it is the same]")] = None,
    loss_type: Annotated[LossType | None, typer.Option(help="For all runs.  [default: theirs]")] = None,
    label_smoothing: Annotated[float | None, typer.Option(help="For all runs.  [default: theirs]")] = None,
    ld_alpha: Annotated[float | None, typer.Option(help="For all runs.  [default: theirs]")] = None,
    reference_free: Annotated[
        ReferenceFree | None, typer.Option(help="Compare by the policies' log-probs alone.")
    ] = None,
    seed: BootstrapSeed = 0,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Compare runs of the same pairs: McNemar's test, the paired bootstrap, Holm's correction, by subset."""
    from dpo_fast.compare.compare import compare
    from dpo_fast.compare.page import write_page
    from dpo_fast.compare.table import print_comparison
    from dpo_fast.files import new_folder, write_json

    given = {
        "beta": beta,
        "loss_type": None if loss_type is None else (loss_type,),
        "label_smoothing": label_smoothing,
        "ld_alpha": ld_alpha,
        "reference_free": reference_free,
    }
    changes = {name: value for name, value in given.items() if value is not None}

    def result_of() -> dict[str, Any]:
        return compare(runs, changes, all_pairs=all_pairs, seed=seed)

    if overwrite and output is None:
        raise UsageError("--overwrite replaces an --output, and none is given")
    if output is None:
        result = result_of()
    else:
        with new_folder(output, overwrite=overwrite, marker=COMPARISON) as folder:
            result = result_of()
            write_json(folder / COMPARISON, result)
            write_page(folder / PAGE, result)
    if as_json:
        print_json(result)
        return
    print_comparison(result, console())
    if output is not None:
        typer.echo(f"comparison: {output} ({COMPARISON}, {PAGE})")


def advise_command(
    run: Annotated[
        Path, typer.Argument(help="Folder that `dpo-fast evaluate` wrote, of held-out pairs.", show_default=False)
    ],
    train_run: TrainRun = None,
    earlier: Earlier = None,
    as_json: AsJson = False,
) -> None:
    """Say what a run's numbers speak for: overfitting, too high a beta, noisy labels, length, repeated pairs."""
    from dpo_fast.advice.advise import advise
    from dpo_fast.advice.hints import hints_as_json, print_hints

    hints = advise(run, train_run=train_run, earlier=earlier or ())
    if as_json:
        print_json(hints_as_json(hints))
        return
    print_hints(hints, console())
    if not hints:
        typer.echo("no hints: nothing in these numbers speaks for a cause of trouble")
