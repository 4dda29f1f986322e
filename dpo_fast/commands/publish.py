"""Commands that hand results on: push."""

from pathlib import Path
from typing import Annotated

import typer

from dpo_fast.commands.options import AsJson, BundleArgument
from dpo_fast.commands.output import print_json


def push_command(
    bundle: BundleArgument,
    repo_id: Annotated[str, typer.Option(help="The repository: user/name.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    run: Annotated[
        Path | None, typer.Option(help="Put this run's numbers on the card, instead of the latest's.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to.")] = None,
    commit_message: Annotated[str | None, typer.Option(help="Title of the commit.")] = None,
    as_json: AsJson = False,
) -> None:
    """Upload the policy's original weights, its tokenizer and its model card to the Hugging Face Hub."""
    from dpo_fast.publish.publisher import push_bundle

    url = push_bundle(bundle, repo_id, private=private, run=run, revision=revision, commit_message=commit_message)
    if as_json:
        print_json({"url": url})
    else:
        typer.echo(url)
