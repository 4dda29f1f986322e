"""What several benchmarks start from: random models of a real one's shape, their bundles, real pairs, and processes."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_fast.bundle import POLICY, Bundle, open_bundle
from dpo_fast.preferences import load_preferences
from dpo_fast.token_table import TokenTable, make_table
from dpo_fast.tokens import load_tokenizer, tokenize
from dpo_fast.types import TokenizedPair

PROJECT = Path(__file__).parents[1]
WORK = PROJECT / "build"
BASELINES = PROJECT.parent / "shared" / "bench"
DATA = PROJECT.parent / "shared" / "data" / "hh-harmless-base-test.jsonl.gz"


def find_models(work: Path, shape: str, data: Path) -> tuple[str, str]:
    """The folders of a random policy and reference of a shape; they are made if they are not there."""
    for needed in (data, BASELINES / "make_model.py"):
        if not needed.exists():
            sys.exit(f"{needed}: not found; the preference pairs and baseline scripts lie beside the project")
    models = work / shape
    if not models.exists():
        call([BASELINES / "make_model.py", "--shape", shape, "--data", data, "--out", models])
    return str(models / "policy"), str(models / "reference")


def find_bundles(work: Path, recipes: Sequence[str], roles: Sequence[str]) -> dict[str, Bundle]:
    """A bundle of a policy and a reference for each recipe; those that are not there are made."""
    bundles = {}
    for recipe in recipes:
        folder = work / f"{Path(roles[0]).resolve().parent.name}-{Path(recipe).stem}"
        if not folder.exists():
            ours = ["--policy", roles[0], "--reference", roles[1], "--output", folder, "--recipe", recipe]
            call(["-m", "dpo_fast.export", *ours])
        bundles[recipe] = open_bundle(folder)
    return bundles


def read_table(bundle: Bundle, data: Path, limit: int) -> TokenTable:
    """The first pairs of a data set as token ids."""
    tokenizer = load_tokenizer(bundle.model_folder(POLICY))
    rows = load_preferences(str(data), limit=limit).rows()
    tokenized = tokenize(rows, tokenizer, max_length=bundle.manifest.max_length)
    return make_table([pair for pair in tokenized if isinstance(pair, TokenizedPair)])


def call(arguments: Sequence[Any], environment: Mapping[str, str] | None = None) -> tuple[float, dict[str, Any]]:
    """Run Python with arguments, or stop with what it says.

    Returns:
        Its wall seconds, and the JSON of its last line, if it is one.
    """
    shown = " ".join(Path(str(part)).name for part in arguments)
    print(f"running {shown} …", file=sys.stderr, flush=True)
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | dict(environment or {}),
        check=False,
    )
    seconds = time.perf_counter() - started
    if done.returncode != 0:
        sys.exit(f"{done.stderr.decode()}\nfailed: {shown}")
    lines = done.stdout.decode().strip().splitlines()
    return seconds, json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}
