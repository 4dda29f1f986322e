"""Commands that hold a bundle against what it came from: verify, check-signature."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from dpo_fast.commands.options import (
    AsJson,
    BootstrapSeed,
    BundleArgument,
    DatasetOption,
    Limit,
    MaxLength,
    Overwrite,
    Split,
    TrustRemoteCode,
)
from dpo_fast.commands.output import console, print_json, say
from dpo_fast.errors import UsageError, VerificationError
from dpo_fast.types import OnError, ReferenceFree


def verify_command(
    bundle: BundleArgument,
    dataset: DatasetOption,
    output: Annotated[Path, typer.Option(help="The folder to write.", show_default=False)],
    engine: Annotated[
        Literal["recipe", "onnxruntime", "openvino"],
        typer.Option(help="The recipe's engine; or another, on the exact float32 graph."),
    ] = "recipe",
    endpoint: Annotated[
        str | None,
        typer.Option(help="URL of an OpenAI-compatible server that is verified instead.", show_default=False),
    ] = None,
    model: Annotated[str | None, typer.Option(help="The policy's name there.", show_default=False)] = None,
    endpoint_dialect: Annotated[
        Literal["auto", "openai", "vllm"], typer.Option(help="How the server is asked for log-probs.")
    ] = "auto",
    api_key_variable: Annotated[
        str, typer.Option(help="Environment variable that holds the server's key.")
    ] = "OPENAI_API_KEY",
    endpoint_timeout: Annotated[float, typer.Option(help="Seconds that one request to the server may take.")] = 60.0,
    endpoint_tokens: Annotated[int, typer.Option(help="Tokens of one request at most.")] = 8192,
    precision: Annotated[
        str | None,
        typer.Option(help="What the engine claims to compute in.  [default: the recipe's]", show_default=False),
    ] = None,
    split: Split = None,
    limit: Limit = None,
    group_by: Annotated[str | None, typer.Option(help="Column whose values get numbers of their own.")] = None,
    beta: Annotated[float, typer.Option(help="Strength of the reference.")] = 0.1,
    reference_free: Annotated[ReferenceFree | None, typer.Option(help="Score by the policy's log-probs alone.")] = None,
    max_length: MaxLength = None,
    floor: Annotated[
        Literal["float32", "checkpoint"] | None,
        typer.Option(
            help="What is meant by noise; float32 leaves the original's own rounding out.  [default: by the precision]",
            show_default=False,
        ),
    ] = None,
    max_multiple: Annotated[
        float | None, typer.Option(help="Noise floors that an error may be.  [default: by the precision]")
    ] = None,
    max_accuracy_change: Annotated[
        float | None, typer.Option(help="Share of pairs.  [default: 0.01]", show_default=False)
    ] = None,
    near_tie: Annotated[
        float | None, typer.Option(help="Noise floors up to which a margin is a near-tie.  [default: 4]")
    ] = None,
    max_growth: Annotated[
        float | None, typer.Option(help="Factor by which errors may grow along the sequence.  [default: 4]")
    ] = None,
    bisect: Annotated[
        bool, typer.Option("--bisect", help="Look for the layers that drift comes from; try them in exact precision.")
    ] = False,
    sign: Annotated[
        Path | None,
        typer.Option(help="Sign a bundle that passes with this private key (EC, PEM).", show_default=False),
    ] = None,
    signature: Annotated[
        Path | None, typer.Option(help="The signature's file.  [default: BUNDLE/model.sig]", show_default=False)
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads of the engine; 0 takes every core.")] = 0,
    on_error: Annotated[
        OnError, typer.Option(help="What a row that cannot be used does: stop, or be skipped.")
    ] = "stop",
    seed: BootstrapSeed = 0,
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Compare the engine's decisions with the original PyTorch weights' own, in multiples of their own noise."""
    from dpo_fast.bundle import SIGNATURE
    from dpo_fast.verification.attestation import write_attestation
    from dpo_fast.verification.signing import load_signer
    from dpo_fast.verification.signing import sign as sign_bundle
    from dpo_fast.verify import RESULT, VerifyOptions, verify

    if signature is not None and sign is None:
        raise UsageError(f"--signature {signature} goes with --sign")
    signature = signature or bundle / SIGNATURE
    options = VerifyOptions(
        engine=engine,
        endpoint=endpoint,
        model=model,
        endpoint_dialect=endpoint_dialect,
        endpoint_timeout=endpoint_timeout,
        endpoint_tokens=endpoint_tokens,
        api_key_variable=api_key_variable,
        precision=precision,
        split=split,
        limit=limit,
        group_by=group_by,
        on_error=on_error,
        max_length=max_length,
        beta=beta,
        reference_free=reference_free,
        floor=floor,
        max_multiple=max_multiple,
        max_accuracy_change=max_accuracy_change,
        near_tie=near_tie,
        max_growth=max_growth,
        bisect=bisect,
        threads=threads,
        seed=seed,
        trust_remote_code=trust_remote_code,
        overwrite=overwrite,
        progress=sys.stderr.isatty(),
    )
    if sign is not None:
        if not options.of_recipe:
            raise UsageError(
                f"--sign {sign}: what is signed for is the bundle's own engine in its recipe's precision; leave "
                "--engine, --endpoint and --precision out"
            )
        load_signer(bundle, sign, signature)  # a key that cannot be used is refused before the pairs are scored
    result = verify(bundle, dataset, output, options, say)
    if options.of_recipe:
        write_attestation(bundle, result)
        if sign is not None and result["verdict"] == "pass":  # a signature reads as approval
            sign_bundle(bundle, sign, signature)
            say(f"signed: {signature}")
    if as_json:
        print_json(result)
    else:
        from dpo_fast.verification.table import print_verification

        print_verification(result, console())
        typer.echo(f"verification: {output} ({RESULT}, verify.html)")
    if result["verdict"] != "pass":
        raise VerificationError(f"verification: {result['verdict']}; the reasons are in {output / RESULT}")


def check_signature_command(
    bundle: BundleArgument,
    public_key: Annotated[Path, typer.Option(help="The signer's public key (PEM).", show_default=False)],
    signature: Annotated[
        Path | None, typer.Option(help="The signature's file.  [default: BUNDLE/model.sig]", show_default=False)
    ] = None,
) -> None:
    """Check that a key's owner has signed exactly this bundle's files, and say what was verified of them."""
    from dpo_fast.bundle import ATTESTATION, SIGNATURE
    from dpo_fast.text import one_line
    from dpo_fast.verification.attestation import check_attestation
    from dpo_fast.verification.signing import check_signature
    from dpo_fast.verification.summary import chosen_limits

    check_signature(bundle, public_key, signature or bundle / SIGNATURE)
    typer.echo(f"signed by the owner of {public_key}: every file of {bundle}")
    if not (bundle / ATTESTATION).exists():
        typer.echo(f"verified: nothing, for there is no {ATTESTATION}")
        return
    attested = check_attestation(bundle)
    data = f"{one_line(attested.dataset['name'])} ({one_line(attested.dataset['rows'])} rows)"
    engine = f"{one_line(attested.engine)}, {one_line(attested.precision)}"
    typer.echo(f"verified: {one_line(attested.verdict)}, for {engine}, on {data}")
    for limit in chosen_limits(attested.tolerance, attested.precision):
        typer.echo(f"limit by choice: {limit}")
