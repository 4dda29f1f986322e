"""The command line: arguments in, a table or JSON out, errors as one line and an exit code.

Exit codes: 0 done; 2 the input is at fault; 3 a check failed; 1 a bug. Results go to standard output, everything else
to standard error. Heavy packages are imported by the command that needs them, so that --help is at once there.
"""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dpo_fast import __version__
from dpo_fast.errors import CheckFailedError, DpoFastError, UsageError, VerificationError
from dpo_fast.publish.card import one_line
from dpo_fast.recipes import DEFAULT
from dpo_fast.types import LOSS_TYPES, Aggregate, FDivergence, LossSettings, OnError, ReferenceFree

if TYPE_CHECKING:
    from rich.console import Console

INTERRUPTED = 130  # as shells have it: 128 + SIGINT
LONGEST_LINE = 2000  # characters on standard error, whatever an error quotes

app = typer.Typer(
    name="dpo-fast",
    help="Evaluate DPO-trained language models on inference engines, with TRL's numbers.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

LayoutChoice = Literal["auto", "shared", "plain"]

BundleArgument = Annotated[Path, typer.Argument(help="Folder that `dpo-fast export` wrote.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that a checkpoint brings along.")
]
Calibration = Annotated[
    str | None,
    typer.Option(help="Data set for the scales of activations; recipes in fp8 need it.", show_default=False),
]
NoSelfCheck = Annotated[bool, typer.Option("--no-self-check", help="Do not compare the graphs with PyTorch.")]
Link = Annotated[bool, typer.Option("--link", help="Hard-link the weights into the bundle instead of copying them.")]


Target = Annotated[
    str | None,
    typer.Option(
        help="GPUs that TensorRT-RTX plans are built for, on any machine, such as sm86,sm89.  [default: all]",
        metavar="smNN,…",
        show_default=False,
    ),
]
ProfileFrom = Annotated[
    str | None,
    typer.Option(help="Data set whose lengths TensorRT's profiles are chosen from.", show_default=False),
]
ProfileSplit = Annotated[str | None, typer.Option(help="Split of --profile-from.", show_default=False)]
Profiles = Annotated[int, typer.Option(help="Optimisation profiles, beside one for the longest rows.")]
Workspace = Annotated[
    float | None, typer.Option(help="GiB that TensorRT's kernels may use as they run.", show_default=False)
]
Refittable = Annotated[
    bool | None,
    typer.Option(
        "--refittable/--no-refittable",
        help="Whether new weights can be put into the plans.  [default: where that can be built]",
        show_default=False,
    ),
]
VersionCompatible = Annotated[
    bool, typer.Option("--version-compatible", help="TensorRT plans that later versions can run.")
]
HardwareCompatible = Annotated[
    bool, typer.Option("--hardware-compatible", help="TensorRT plans that other GPUs can run, from Ampere on.")
]

AggregateChoice = Annotated[
    Aggregate, typer.Option(help="exact: over all pairs. trl: the mean of batch means, as TRL logs it.")
]
BatchSize = Annotated[int, typer.Option(help="Pairs a batch of --aggregate trl; changes no other number.")]
BootstrapSeed = Annotated[int, typer.Option(help="Of the bootstrapped intervals.")]


def show_version(wanted: bool) -> None:
    """Print the version and leave."""
    if wanted:
        typer.echo(f"dpo-fast {__version__}")
        raise typer.Exit


@app.callback()
def options_of_all(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Evaluate DPO-trained language models on inference engines, with TRL's numbers."""


@app.command("export")
def export_command(
    policy: Annotated[
        str, typer.Option(help="The trained model or PEFT adapter: local folder or Hub id.", show_default=False)
    ],
    output: Annotated[Path, typer.Option(help="The bundle to write.", show_default=False)],
    reference: Annotated[
        str,
        typer.Option(
            help="The model it was trained from: local folder, Hub id, none, or base: what an adapter was trained on."
        ),
    ] = "base",
    base: Annotated[
        str | None,
        typer.Option(help="An adapter's base model, if it is not where adapter_config.json says.", show_default=False),
    ] = None,
    policy_revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")] = None,
    reference_revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")] = None,
    recipe: Annotated[str, typer.Option(help="What to make it for: a shipped recipe, or a TOML file.")] = DEFAULT,
    max_length: Annotated[
        int | None,
        typer.Option(
            help="Default truncation of evaluations, in tokens; 1024, or the model's positions if fewer.",
            show_default=False,
        ),
    ] = None,
    layout: Annotated[
        LayoutChoice, typer.Option(help="Whether completions share their prompt's computation.")
    ] = "auto",
    trust_remote_code: TrustRemoteCode = False,
    calibration: Calibration = None,
    target: Target = None,
    profile_from: ProfileFrom = None,
    profile_split: ProfileSplit = None,
    profiles: Profiles = 4,
    workspace: Workspace = None,
    refittable: Refittable = None,
    version_compatible: VersionCompatible = False,
    hardware_compatible: HardwareCompatible = False,
    no_self_check: NoSelfCheck = False,
    link: Link = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Turn a policy and its reference into a bundle of log-prob graphs and the weights they point into."""
    from dpo_fast.bundle import MANIFEST
    from dpo_fast.export.exporter import ExportOptions, export
    from dpo_fast.tensorrt.options import BuildOptions

    build = BuildOptions(
        targets=_targets(target),
        profile_from=profile_from,
        profile_split=profile_split,
        profiles=profiles,
        workspace_gib=workspace,
        refittable=refittable,
        version_compatible=version_compatible,
        hardware_compatible=hardware_compatible,
    )
    options = ExportOptions(
        policy_revision=policy_revision,
        reference_revision=reference_revision,
        recipe=recipe,
        max_length=max_length,
        layout=None if layout == "auto" else layout,
        calibration=calibration,
        build=build,
        self_check=not no_self_check,
        link=link,
        base=base,
        trust_remote_code=trust_remote_code,
        overwrite=overwrite,
    )
    if reference == "none" and reference_revision is not None:
        raise UsageError("--reference-revision goes with a reference, and --reference is none")
    export(policy, None if reference == "none" else reference, output, options, _say)
    if as_json:
        _print_json(json.loads((output / MANIFEST).read_text(encoding="utf-8")))
    else:
        typer.echo(f"bundle: {output}")


@app.command("build")
def build_command(
    bundle: BundleArgument,
    target: Target = None,
    profile_from: ProfileFrom = None,
    profile_split: ProfileSplit = None,
    profiles: Profiles = 4,
    workspace: Workspace = None,
    refittable: Refittable = None,
    version_compatible: VersionCompatible = False,
    hardware_compatible: HardwareCompatible = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Build the TensorRT plans of a bundle, on the machine that is to run them or, for TensorRT-RTX, on any."""
    from dpo_fast.bundle import MANIFEST
    from dpo_fast.tensorrt.bundle_plans import build
    from dpo_fast.tensorrt.options import BuildOptions

    options = BuildOptions(
        targets=_targets(target),
        profile_from=profile_from,
        profile_split=profile_split,
        profiles=profiles,
        workspace_gib=workspace,
        refittable=refittable,
        version_compatible=version_compatible,
        hardware_compatible=hardware_compatible,
    )
    build(bundle, options, trust_remote_code=trust_remote_code, report=_say)
    if as_json:
        _print_json(json.loads((bundle / MANIFEST).read_text(encoding="utf-8")))
    else:
        typer.echo(f"bundle: {bundle}")


@app.command("refit")
def refit_command(
    bundle: BundleArgument,
    policy: Annotated[
        str, typer.Option(help="The new checkpoint, of the same architecture: folder or Hub id.", show_default=False)
    ],
    output: Annotated[
        Path | None, typer.Option(help="The bundle to write; the old one is replaced if left out.", show_default=False)
    ] = None,
    policy_revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    calibration: Calibration = None,
    no_self_check: NoSelfCheck = False,
    link: Link = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Put a new checkpoint of the policy into a bundle: nothing is traced again."""
    from dpo_fast.bundle import MANIFEST
    from dpo_fast.export.refit import RefitOptions, refit

    if output is None and overwrite:
        raise UsageError("--overwrite goes with --output; without it the bundle itself is replaced")
    options = RefitOptions(
        policy_revision=policy_revision,
        calibration=calibration,
        self_check=not no_self_check,
        link=link,
        trust_remote_code=trust_remote_code,
        overwrite=overwrite,
    )
    written = refit(bundle, policy, output, options, _say)
    if as_json:
        _print_json(json.loads((written / MANIFEST).read_text(encoding="utf-8")))
    else:
        typer.echo(f"bundle: {written}")


@app.command("evaluate")
def evaluate_command(
    bundle: BundleArgument,
    dataset: Annotated[
        str, typer.Option(help="JSONL, JSON, Parquet or CSV file, a folder, or a Hub id.", show_default=False)
    ],
    output: Annotated[Path, typer.Option(help="The run to write.", show_default=False)],
    split: Annotated[str | None, typer.Option(help="Split of the data set; test if there is one.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first rows.")] = None,
    beta: Annotated[float, typer.Option(help="Strength of the reference.")] = 0.1,
    loss_type: Annotated[
        list[str] | None, typer.Option(help=f"One of {', '.join(LOSS_TYPES)}; repeat it for a sum.  [default: sigmoid]")
    ] = None,
    loss_weight: Annotated[
        list[float] | None, typer.Option(help="One for each --loss-type, in the same order.")
    ] = None,
    label_smoothing: Annotated[float, typer.Option(help="For robust, exo_pair, aot and aot_unpaired.")] = 0.0,
    ld_alpha: Annotated[
        float | None, typer.Option(help="Weight of tokens beyond the shorter completion's length (LD-DPO).")
    ] = None,
    f_divergence_type: Annotated[
        FDivergence, typer.Option(help="Regulariser between policy and reference (f-DPO).")
    ] = "reverse_kl",
    f_alpha_divergence_coef: Annotated[float, typer.Option(help="Alpha of alpha_divergence.")] = 0.5,
    use_weighting: Annotated[
        bool, typer.Option("--use-weighting", help="Weight pairs by the policy's probabilities (WPO).")
    ] = False,
    discopop_tau: Annotated[float, typer.Option(help="Temperature of discopop.")] = 0.05,
    reference_free: Annotated[ReferenceFree | None, typer.Option(help="Score by the policy's log-probs alone.")] = None,
    group_by: Annotated[str | None, typer.Option(help="Column whose values get metrics of their own.")] = None,
    aggregate: AggregateChoice = "exact",
    batch_size: BatchSize = 8,
    max_length: Annotated[
        int | None, typer.Option(help="Truncation of prompt and completion, in tokens; the bundle's by default.")
    ] = None,
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
        Literal["auto", "together", "in-turn"],
        typer.Option(help="Whether policy and reference are in memory together; auto goes by what is free."),
    ] = "auto",
    threads: Annotated[int, typer.Option(help="Threads of the engine; 0 takes every core.")] = 0,
    on_error: Annotated[
        OnError, typer.Option(help="What a row that cannot be used does: stop the run, or be skipped.")
    ] = "stop",
    seed: BootstrapSeed = 0,
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Score a preference set and print TRL's metrics; the run keeps every token's log-prob."""
    from dpo_fast.evaluate import METRICS, EvaluateOptions, evaluate

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
        seed=seed,
        trust_remote_code=trust_remote_code,
        overwrite=overwrite,
        progress=sys.stderr.isatty(),
    )
    metrics = evaluate(bundle, dataset, output, options, _say)
    if as_json:
        _print_json(metrics)
        return
    from dpo_fast.table import print_metrics

    print_metrics(metrics, _console())
    typer.echo(f"run: {output} ({METRICS}); model card: {bundle / 'policy' / 'README.md'}")


@app.command("merge")
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
        _print_json(metrics)
        return
    from dpo_fast.table import print_metrics

    print_metrics(metrics, _console())
    typer.echo(f"run: {output} ({METRICS})")


@app.command("rescore")
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
        _print_json(result)
        return
    from dpo_fast.rescore_table import print_rescore

    print_rescore(result, _console())


@app.command("verify")
def verify_command(
    bundle: BundleArgument,
    dataset: Annotated[
        str, typer.Option(help="JSONL, JSON, Parquet or CSV file, a folder, or a Hub id.", show_default=False)
    ],
    output: Annotated[Path, typer.Option(help="The folder to write.", show_default=False)],
    engine: Annotated[
        Literal["recipe", "exact"], typer.Option(help="The recipe's engine, or the exact graph on ONNX Runtime.")
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
    precision: Annotated[
        str | None,
        typer.Option(help="What the engine claims to compute in.  [default: the recipe's]", show_default=False),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Split of the data set; test if there is one.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first rows.")] = None,
    group_by: Annotated[str | None, typer.Option(help="Column whose values get numbers of their own.")] = None,
    beta: Annotated[float, typer.Option(help="Strength of the reference.")] = 0.1,
    reference_free: Annotated[ReferenceFree | None, typer.Option(help="Score by the policy's log-probs alone.")] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Truncation of prompt and completion, in tokens; the bundle's by default.")
    ] = None,
    floor: Annotated[
        Literal["float32", "checkpoint"] | None,
        typer.Option(help="What is meant by noise.  [default: by the precision]", show_default=False),
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
    from dpo_fast.verification.signing import sign as sign_bundle
    from dpo_fast.verify import RESULT, VerifyOptions, verify

    own = engine == "recipe" and endpoint is None and precision is None
    if sign is not None and not own:
        raise UsageError(
            f"--sign {sign}: what is signed for is the bundle's own engine by the recipe's own limits; leave --engine, "
            "--endpoint and --precision out"
        )
    if signature is not None and sign is None:
        raise UsageError(f"--signature {signature} goes with --sign")
    options = VerifyOptions(
        engine=engine,
        endpoint=endpoint,
        model=model,
        endpoint_dialect=endpoint_dialect,
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
    result = verify(bundle, dataset, output, options, _say)
    if own:
        write_attestation(bundle, result)
        if sign is not None and result["verdict"] == "pass":  # a signature reads as approval
            sign_bundle(bundle, sign, signature or bundle / SIGNATURE)
            _say(f"signed: {signature or bundle / SIGNATURE}")
    if as_json:
        _print_json(result)
    else:
        from dpo_fast.verification.table import print_verification

        print_verification(result, _console())
        typer.echo(f"verification: {output} ({RESULT}, verify.html)")
    if result["verdict"] != "pass":
        raise VerificationError(f"verification: {result['verdict']}; the reasons are in {output / RESULT}")


@app.command("check-signature")
def check_signature_command(
    bundle: BundleArgument,
    public_key: Annotated[Path, typer.Option(help="The signer's public key (PEM).", show_default=False)],
    signature: Annotated[
        Path | None, typer.Option(help="The signature's file.  [default: BUNDLE/model.sig]", show_default=False)
    ] = None,
) -> None:
    """Check that a key's owner has signed exactly this bundle's files."""
    from dpo_fast.bundle import SIGNATURE
    from dpo_fast.verification.signing import check_signature

    check_signature(bundle, public_key, signature or bundle / SIGNATURE)
    typer.echo(f"signed by the owner of {public_key}: every file of {bundle}")


@app.command("push")
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
        _print_json({"url": url})
    else:
        typer.echo(url)


@app.command("doctor")
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
        print_examination(examined, _console())
    outcomes = [] if no_self_test else self_test(examined["recipes"], _say)
    if as_json:
        _print_json({**examined, "self_test": outcomes})
    elif outcomes:
        print_outcomes(outcomes, _console())
    failed = [outcome["recipe"] for outcome in outcomes if not outcome["passed"]]
    if failed:
        raise CheckFailedError(f"the self-test failed for {', '.join(failed)}; the reasons stand above")


@app.command("demo")
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
        _print_json(result)


def main() -> None:
    """Run the command line of this process."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run a command line, and turn errors into one line and an exit code.

    Args:
        arguments: what follows the program's name; the help is shown where nothing does.

    Returns:
        The exit code; see the module's docstring.
    """
    try:
        code = app(arguments or ["--help"], prog_name="dpo-fast", standalone_mode=False)
    except DpoFastError as error:
        _say(f"dpo-fast: {error}")
        return error.exit_code
    except typer.TyperException as error:  # an option that does not exist, or a value that is not of its type
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "dpo-fast"
        _say(f"dpo-fast: {error.format_message().rstrip('.')}; see `{command} --help`")
        return error.exit_code
    except KeyboardInterrupt:
        code = INTERRUPTED
    if code == INTERRUPTED:  # which Typer makes of a KeyboardInterrupt
        _say("dpo-fast: interrupted; an evaluation goes on from where it was when the same command is run again")
    return code or 0


def _targets(value: str | None) -> tuple[str, ...]:
    """Compute capabilities, as they are named: sm86,sm89."""
    return () if value is None else tuple(target.strip().lower() for target in value.split(","))


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


def _say(line: str) -> None:
    """A line on standard error, without line breaks and control characters that data might have smuggled in."""
    typer.echo(one_line(line, LONGEST_LINE), err=True)


def _print_json(value: Any) -> None:
    """JSON on standard output, in ASCII, so that no terminal obeys what data say; NaN is a bug, not a value."""
    typer.echo(json.dumps(value, indent=2, allow_nan=False))


def _console() -> "Console":
    from rich.console import Console

    # In a pipe there is no width to fit into: keep every column.
    return Console(width=None if sys.stdout.isatty() else 120)
