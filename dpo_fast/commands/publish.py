"""Commands that hand results on: push."""

from pathlib import Path
from typing import Annotated

import typer

from dpo_fast.commands.options import AsJson, BundleArgument
from dpo_fast.commands.output import print_json, say
from dpo_fast.text import one_line


def push_command(
    bundle: BundleArgument,
    repo_id: Annotated[str, typer.Option(help="The repository: user/name.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    run: Annotated[
        Path | None, typer.Option(help="Put this run's numbers and plots on the card, instead of the latest's numbers.")
    ] = None,
    include_graph: Annotated[
        bool, typer.Option("--include-graph", help="Upload the exact graph, to be run from the repository's root.")
    ] = False,
    include_engines: Annotated[
        bool, typer.Option("--include-engines", help="Upload the recipe's graph, its quantised weights and its plans.")
    ] = False,
    verification: Annotated[
        Path | None,
        typer.Option(help="Folder that `dpo-fast verify` wrote.  [default: the bundle's]", show_default=False),
    ] = None,
    allow_failed_verification: Annotated[
        bool, typer.Option("--allow-failed-verification", help="Push although the verdict is not 'pass'.")
    ] = False,
    eval_task: Annotated[
        str, typer.Option(help="Task of a benchmark data set that the file in .eval_results names.")
    ] = "default",
    revision: Annotated[str | None, typer.Option(help="Branch to commit to.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of committing.")] = False,
    commit_message: Annotated[str | None, typer.Option(help="Title of the commit.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would go, and what would be refused; ask no Hub.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Upload the policy's original weights, its tokenizer and its model card to the Hugging Face Hub."""
    from dpo_fast.publish.publisher import PushOptions, push_bundle

    options = PushOptions(
        private=private,
        run=run,
        include_graph=include_graph,
        include_engines=include_engines,
        verification=verification,
        allow_failed_verification=allow_failed_verification,
        eval_task=eval_task,
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message,
    )
    pushed = push_bundle(bundle, repo_id, options, dry_run=dry_run, report=say)
    refusals = [str(refusal) for refusal in pushed.refusals]
    if as_json:
        print_json({"url": pushed.url, "files": pushed.files, "warnings": pushed.warnings, "refusals": refusals})
    elif dry_run:
        for name, size in pushed.files.items():
            typer.echo(f"{size:>16,}  {one_line(name)}")
        typer.echo(f"{sum(pushed.files.values()):>16,}  bytes in {len(pushed.files)} files, for {one_line(repo_id)}")
    else:
        typer.echo(pushed.url)
    for refusal in refusals:
        say(f"would be refused: {refusal}")
    if refusals:
        raise typer.Exit(pushed.refusals[0].exit_code)
