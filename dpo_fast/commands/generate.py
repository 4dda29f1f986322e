"""The command that lets policy and reference answer prompts: generate."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from dpo_fast.commands.options import (
    AsJson,
    BundleArgument,
    DatasetOption,
    Limit,
    Overwrite,
    ReportTo,
    Split,
    Step,
    TrustRemoteCode,
)
from dpo_fast.commands.output import console, print_json, say
from dpo_fast.types import OnError


def generate_command(
    bundle: BundleArgument,
    dataset: DatasetOption,
    num_samples: Annotated[int, typer.Option(help="Prompts that are answered; --seed chooses them.")] = 8,
    output: Annotated[
        Path | None, typer.Option(help="Folder to write samples.jsonl and samples.json to.", show_default=False)
    ] = None,
    split: Split = None,
    limit: Limit = None,
    max_length: Annotated[
        int | None,
        typer.Option(help="Truncation of prompt and completion as evaluated, in tokens; the bundle's by default."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens after which a completion is cut off.")] = 128,
    temperature: Annotated[
        float | None, typer.Option(help="0 is greedy.  [default: the policy's generation config]", show_default=False)
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="[default: the policy's generation config]", show_default=False)
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(help="0 takes every token.  [default: the policy's generation config]", show_default=False),
    ] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always the most probable token.")] = False,
    seed: Annotated[int, typer.Option(help="Of the prompts, and of the draws.")] = 0,
    on_error: Annotated[
        OnError, typer.Option(help="What a row that cannot be used does: stop, or be skipped.")
    ] = "stop",
    report_to: ReportTo = None,
    step: Step = None,
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Let policy and reference answer the same prompts, side by side, with the saved weights."""
    from dpo_fast import trackers
    from dpo_fast.files import new_folder, refuse_existing
    from dpo_fast.generate import GenerateOptions, generate
    from dpo_fast.generation.completion import Sampling
    from dpo_fast.generation.files import PROVENANCE, SAMPLES, write_samples
    from dpo_fast.generation.table import print_samples
    from dpo_fast.trackers.finished_run import step_of

    names = trackers.check_trackers(report_to or ())
    options = GenerateOptions(
        num_samples=num_samples,
        sampling=Sampling(max_new_tokens, temperature, top_p, top_k, greedy),
        seed=seed,
        split=split,
        limit=limit,
        on_error=on_error,
        max_length=max_length,
        trust_remote_code=trust_remote_code,
    )
    if output is not None:  # rather now than after the work
        refuse_existing(output, overwrite=overwrite, marker=PROVENANCE)
    generated = generate(bundle, dataset, options, say)
    if output is not None:
        with new_folder(output, overwrite=overwrite, marker=PROVENANCE) as folder:
            write_samples(folder, generated.samples, generated.provenance)
    samples = [asdict(sample) for sample in generated.samples]
    if as_json:
        print_json({"samples": samples, "provenance": generated.provenance})
    else:
        print_samples(generated.samples, console())
        if output is not None:
            typer.echo(f"samples: {output} ({SAMPLES}, {PROVENANCE})")
    trackers.report_to(
        names,
        metrics={},
        step=step_of(generated.provenance) if step is None else step,
        samples=samples,
        artifacts=() if output is None else (output / SAMPLES,),
        run_name=(output or bundle).resolve().name,
        say=say,
    )
