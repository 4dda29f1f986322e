"""Options and arguments that several commands share."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from dpo_fast.types import LOSS_TYPES, Aggregate, FDivergence

LayoutChoice = Literal["auto", "shared", "plain"]

BundleArgument = Annotated[Path, typer.Argument(help="Folder that `dpo-fast export` wrote.", show_default=False)]
DatasetOption = Annotated[
    str, typer.Option(help="JSONL, JSON, Parquet or CSV file, a folder, or a Hub id.", show_default=False)
]
Split = Annotated[str | None, typer.Option(help="Split of the data set; test if there is one.")]
Limit = Annotated[int | None, typer.Option(help="Only the first rows.")]
MaxLength = Annotated[
    int | None, typer.Option(help="Truncation of prompt and completion, in tokens; the bundle's by default.")
]
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

# The loss, as TRL's DPOConfig names it.
Beta = Annotated[float, typer.Option(help="Strength of the reference.")]
LossType = Annotated[
    list[str] | None, typer.Option(help=f"One of {', '.join(LOSS_TYPES)}; repeat it for a sum.  [default: sigmoid]")
]
LossWeight = Annotated[list[float] | None, typer.Option(help="One for each --loss-type, in the same order.")]
LabelSmoothing = Annotated[float, typer.Option(help="For robust, exo_pair, aot and aot_unpaired.")]
LdAlpha = Annotated[
    float | None, typer.Option(help="Weight of tokens beyond the shorter completion's length (LD-DPO).")
]
FDivergenceType = Annotated[FDivergence, typer.Option(help="Regulariser between policy and reference (f-DPO).")]
FAlphaDivergenceCoef = Annotated[float, typer.Option(help="Alpha of alpha_divergence.")]
UseWeighting = Annotated[
    bool, typer.Option("--use-weighting", help="Weight pairs by the policy's probabilities (WPO).")
]
DiscopopTau = Annotated[float, typer.Option(help="Temperature of discopop.")]

AggregateChoice = Annotated[
    Aggregate, typer.Option(help="exact: over all pairs. trl: the mean of batch means, as TRL logs it.")
]
BatchSize = Annotated[int, typer.Option(help="Pairs a batch of --aggregate trl; changes no other number.")]
BootstrapSeed = Annotated[int, typer.Option(help="Of the bootstrapped intervals.")]

ReportTo = Annotated[
    list[str] | None,
    typer.Option(
        help="Trackers: mlflow, wandb, trackio, tensorboard, comet_ml, with commas between them; or all that are "
        "installed, or none.  [default: none]",
        metavar="NAME,…",
        show_default=False,
    ),
]
TrainRun = Annotated[
    Path | None,
    typer.Option(
        help="A run of the same policy on training pairs, or a checkpoint of its training with its trainer_state.json.",
        show_default=False,
    ),
]
Earlier = Annotated[
    list[Path] | None,
    typer.Option(help="A run on the same pairs at an earlier step; repeat it, oldest first.", show_default=False),
]
Step = Annotated[
    int | None,
    typer.Option(
        help="The trainer's step, for the trackers.  [default: N where the policy came from checkpoint-N, else 0]",
        show_default=False,
    ),
]
