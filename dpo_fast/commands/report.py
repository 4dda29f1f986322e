"""The command that makes a run's page: report."""

from pathlib import Path
from typing import Annotated

import typer

from dpo_fast.commands.options import Overwrite, TrustRemoteCode
from dpo_fast.commands.output import say


def report_command(
    run: Annotated[Path, typer.Argument(help="Folder that `dpo-fast evaluate` wrote.", show_default=False)],
    bundle: Annotated[
        Path | None,
        typer.Option(help="The bundle that it was evaluated with, whose tokenizer gives the texts."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder to write into.  [default: the run]", show_default=False)
    ] = None,
    verification: Annotated[Path | None, typer.Option(help="Folder that `dpo-fast verify` wrote.")] = None,
    samples: Annotated[
        Path | None, typer.Option(help="JSON Lines that `dpo-fast generate` wrote; the run's own if it has any.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Overwrite = False,
) -> None:
    """Write a run's report: a page with figures and every pair, token by token, that opens without a network."""
    from dpo_fast.report.write import write_report

    page = write_report(
        run,
        output,
        bundle=bundle,
        verification=verification,
        samples=samples,
        trust_remote_code=trust_remote_code,
        overwrite=overwrite,
        report=say,
    )
    typer.echo(f"report: {page}")
