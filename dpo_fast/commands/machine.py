"""Commands about this machine: doctor, demo."""

from pathlib import Path
from typing import Annotated

import typer

from dpo_fast.commands.options import AsJson, Overwrite
from dpo_fast.commands.output import console, print_json, say
from dpo_fast.errors import CheckFailedError


def doctor_command(
    no_self_test: Annotated[bool, typer.Option("--no-self-test", help="Only look; export and run nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say what this machine has, which recipes it runs and what mends the others, and test the engines that it runs."""
    from dpo_fast.doctor import examine
    from dpo_fast.doctor_table import print_examination, print_outcomes
    from dpo_fast.self_test import self_test

    examined = examine()
    if not as_json:
        print_examination(examined, console())
    outcomes = [] if no_self_test else self_test(examined["recipes"], say)
    if as_json:
        print_json({**examined, "self_test": outcomes})
    elif outcomes:
        print_outcomes(outcomes, console())
    failed = [outcome["recipe"] for outcome in outcomes if not outcome["passed"]]
    if failed:
        raise CheckFailedError(f"the self-test failed for {', '.join(failed)}; the reasons stand above")


def demo_command(
    output: Annotated[Path, typer.Option(help="Folder for data, models, bundle and run.")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="Of data and training.")] = 0,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Make data, train a tiny model with TRL's DPO, export it, evaluate it, and compare with the trainer."""
    from rich.console import Console

    from dpo_fast.demo import run_demo

    result = run_demo(output, seed=seed, overwrite=overwrite, console=Console(stderr=as_json))
    if as_json:
        print_json(result)
