"""Do engines in lower precisions still make a trained model's decisions? One table, on real pairs.

A small Llama learns the language of the training pairs, then TRL's DPO makes a policy of it. Each recipe exports both,
and `dpo_fast.verify` holds its engine against the PyTorch weights on pairs that neither has seen. Models and bundles
stay under build/decisions.

    python benchmarks/decisions.py [--data FILE] [--held-out 800] [--json] [--write README.md]
"""

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bundles import DATA, WORK
from readme import write_between

from dpo_fast.demo_data import Row
from dpo_fast.demo_training import DemoSettings, train_policy, train_reference
from dpo_fast.export.exporter import ExportOptions, export
from dpo_fast.preferences import load_preferences
from dpo_fast.types import PreferenceRow
from dpo_fast.verify import VerifyOptions, verify

RECIPES = ("cpu-fp32", "openvino-bf16", "cpu-int8", "cpu-int4")
LONGEST = 1000  # characters of a pair, so that a short training sees many pairs whole
MAX_LENGTH = 256  # tokens: the positions that the model has; longer pairs are cut, as in training
# Small enough to be trained from nothing in some minutes on two cores; beta is TRL's own.
SETTINGS = DemoSettings(
    vocab_size=1024,
    hidden_size=192,
    layers=4,
    reference_epochs=3,
    policy_epochs=2,
    policy_learning_rate=1e-4,
    beta=0.1,
)
BEGIN, END = "<!-- decisions -->", "<!-- end of decisions -->"
COLUMNS = (
    "recipe", "precision", "error of a token, nats: mean / p99 / largest", "noise floors: token / margin",
    "flips: all / clear", "accuracy (original)", "change, 95 %", "verdict", "× PyTorch's speed",
)  # fmt: skip


def read_pairs(data: Path) -> list[Row]:
    """The pairs that are short enough, in the data's order."""
    rows = [
        {"prompt": str(row.prompt), "chosen": str(row.chosen), "rejected": str(row.rejected)}
        for row in load_preferences(str(data)).rows()
        if isinstance(row, PreferenceRow)
    ]
    return [row for row in rows if sum(map(len, row.values())) <= LONGEST]


def find_models(folder: Path, data: Path, held_out: int) -> dict[str, Any]:
    """Train the two models, unless they are there; the last `held_out` pairs are kept from them.

    Returns:
        How many pairs there were, and parameters.
    """
    known = folder / "training.json"
    if not known.exists():
        rows = read_pairs(data)
        train, held = rows[:-held_out], rows[-held_out:]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "held-out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held), encoding="utf-8")
        train_reference(train, folder / "reference", SETTINGS, seed=0)
        trainer = train_policy(train, held, folder / "reference", folder / "policy", SETTINGS, seed=0)
        parameters = sum(each.numel() for each in trainer.model.parameters())
        said = {"train_pairs": len(train), "held_out_pairs": len(held), "parameters": parameters}
        known.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
    training: dict[str, Any] = json.loads(known.read_text(encoding="utf-8"))
    return training


def measure(folder: Path, recipe: str) -> dict[str, Any]:
    """The content of a recipe's verify.json."""
    bundle = folder / recipe
    if not bundle.exists():
        policy, reference = str(folder / "policy"), str(folder / "reference")
        export(policy, reference, bundle, ExportOptions(recipe=recipe, max_length=MAX_LENGTH))
    output = folder / f"{recipe}-verification"
    return verify(bundle, str(folder / "held-out.jsonl"), output, VerifyOptions(overwrite=True, on_error="skip"))


def make_row(recipe: str, result: dict[str, Any]) -> list[str]:
    """A row of the table."""
    checks = {check["name"]: check["value"] for check in result["checks"]}
    tokens, decisions = result["drift"]["tokens"], result["decisions"]
    low, high = (100 * end for end in decisions["change_interval"])
    seconds = result["timing"]["scoring_seconds"]
    return [
        f"`{recipe}`",
        result["provenance"]["precision"],
        " / ".join(f"{abs(tokens[name]):.1g}" for name in ("mean_absolute", "p99_absolute", "largest")),
        f"{checks['token error']:.2g} / {checks['margin error']:.2g}",
        f"{len(decisions['flips'])} / {decisions['clear_flips']}",
        f"{decisions['accuracy']:.3f} ({decisions['original_accuracy']:.3f})",
        f"{low:+.1f} … {high:+.1f} points",
        result["verdict"],
        f"{seconds['original'] / seconds['engine']:.1f}",
    ]


def make_table(rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Train, export, verify, and print the table."""
    parser = argparse.ArgumentParser(description="Do engines in lower precisions still make the same decisions?")
    parser.add_argument("--data", type=Path, default=DATA, help="preference pairs, in text")
    parser.add_argument("--held-out", type=int, default=800, help="pairs to verify on")
    parser.add_argument("--work", type=Path, default=WORK / "decisions", help="folder for models and bundles")
    parser.add_argument("--json", action="store_true", help="print what was measured as JSON")
    parser.add_argument("--write", type=Path, metavar="README", help="put the table between its marks")
    given = parser.parse_args()
    if not given.data.exists():
        sys.exit(f"{given.data}: not found; the preference pairs lie beside the project")
    training = find_models(given.work, given.data, given.held_out)
    results = {recipe: measure(given.work, recipe) for recipe in RECIPES}
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    if given.json:
        print(json.dumps({"machine": machine, "training": training, "recipes": results}))
        return
    table = make_table([make_row(recipe, result) for recipe, result in results.items()])
    about = (
        f"{training['parameters'] / 1e6:.1f} million weights, {training['train_pairs']:,} pairs to train on, "
        f"{training['held_out_pairs']:,} held out"
    )
    print(f"{about}\n\n{table}")
    if given.write is not None:
        write_between(given.write, BEGIN, END, table)


if __name__ == "__main__":
    main()
