"""The command line: what is asked for, checked, and handed on."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bundles import DATA, WORK

from dpo_fast.errors import DpoFastError, UsageError
from gpu.contenders import DEFAULTS, DEVICES, Contender, Device, find_contender
from gpu.environment import default_gpu, describe, gather_facts
from gpu.families import FAMILIES
from gpu.processes import Surroundings
from gpu.results import FORMAT, SPEED, VERIFY, choose_path, read_result, write_result
from gpu.shapes import DEFAULTS as SHAPES
from gpu.shapes import LARGE
from gpu.speed import Settings, measure_peaks, measure_shape
from gpu.tables import make_tables, write_tables
from gpu.verify import all_passed, verify

TOKEN_BUDGETS = {"cuda": 16_384, "cpu": 2_048}  # of the tuned PyTorch loop
CHECK_FAILED = 3


def main(arguments: Sequence[str]) -> int:
    """Do what the command line says; returns the exit code, as dpo-fast has them.

    Args:
        arguments: of the command line, without the program.
    """
    verbs = {"table": run_table, "verify": run_verify}
    given = list(arguments)
    if "--verify" in given:
        given.remove("--verify")
        given.insert(0, "verify")
    try:
        if given and given[0] in verbs:
            return verbs[given[0]](given[1:])
        return run_speed(given)
    except DpoFastError as error:
        say(str(error))
        return error.exit_code


def run_table(arguments: Sequence[str]) -> int:
    """`table`: Markdown of results' files."""
    parser = argparse.ArgumentParser("benchmarks.gpu table", description="Markdown tables of results.")
    parser.add_argument("files", nargs="*", type=Path, help="of benchmarks/results")
    parser.add_argument("--write", type=Path, metavar="README", help="put them between its marks, instead of printing")
    given = parser.parse_args(arguments)
    # A shell leaves a pattern that nothing matches as it is.
    files = [path for path in given.files if not ("*" in path.name and not path.exists())]
    tables = make_tables([read_result(path) for path in files])
    if given.write is None:
        print(tables)
    else:
        write_tables(given.write, tables)
    return 0


def run_verify(arguments: Sequence[str]) -> int:
    """`--verify`: families with each recipe, against PyTorch."""
    parser = argparse.ArgumentParser("benchmarks.gpu --verify", description="Are the numbers right?")
    add_common(parser)
    parser.add_argument("--families", type=names, default=list(FAMILIES), help=f"of {','.join(FAMILIES)}")
    given = parser.parse_args(arguments)
    for family in given.families:
        if family not in FAMILIES:
            raise UsageError(f"--families {family}: is not known; choose from {', '.join(FAMILIES)}")
    surroundings, result, able, target = prepare(given, VERIFY)
    result["contenders"] = []
    path = output_path(given, result)
    for contender in able:
        result["contenders"].append(verify(contender, given.families, target, surroundings, say))
        write_result(path, result)
    print(make_tables([result]))
    say(f"written to {path}")
    return 0 if all_passed(result["contenders"]) else CHECK_FAILED


def run_speed(arguments: Sequence[str]) -> int:
    """Without a verb: how fast."""
    parser = argparse.ArgumentParser("benchmarks.gpu", description="How fast? With --verify: are the numbers right?")
    add_common(parser)
    parser.add_argument(
        "--shapes", type=names, default=list(SHAPES), help=f"of {','.join((*SHAPES, LARGE))}, or folders of two models"
    )
    parser.add_argument("--pairs", type=positive, default=512, help="rows of the preference set")
    parser.add_argument(
        "--check-pairs", type=positive, default=64, help="that PyTorch scores in float32 to compare with"
    )
    parser.add_argument("--turns", type=positive, default=3, help="timed ones, after one that sets everything up")
    parser.add_argument("--token-budget", type=positive, help="tokens of a batch of the tuned PyTorch loop")
    parser.add_argument("--batch-size", type=positive, default=8, help="pairs of a batch of TRL's")
    parser.add_argument("--data", type=Path, default=DATA, help="preference pairs, JSONL, gzipped or not")
    parser.add_argument("--keep-bundles", action="store_true", help="leave them for another run; they take much room")
    given = parser.parse_args(arguments)
    if not given.data.is_file():
        raise UsageError(f"--data {given.data}: not found; name a JSONL file of preference pairs")
    surroundings, result, able, target = prepare(given, SPEED)
    settings = Settings(
        given.device, given.shapes, given.data, given.pairs, min(given.check_pairs, given.pairs), given.turns,
        given.token_budget or TOKEN_BUDGETS[given.device], given.batch_size, given.keep_bundles, target,
    )  # fmt: skip
    path = output_path(given, result)
    say("the device's matrix peaks")
    peaks = measure_peaks((str(each.precision) for each in able), given.device, surroundings)
    result |= {"settings": {**asdict(settings), "data": given.data.name}, "peaks": peaks, "shapes": []}
    finished: list[dict[str, Any]] = []

    def keep(shape: dict[str, Any]) -> None:
        write_result(path, {**result, "shapes": [*finished, shape]})
        result["shapes"] = [*finished, shape]

    for shape in settings.shapes:
        measure_shape(shape, able, peaks, settings, surroundings, keep, say)
        finished = list(result["shapes"])
    print(make_tables([result]))
    say(f"written to {path}")
    return 0


def add_common(parser: argparse.ArgumentParser) -> None:
    """What both modes take."""
    parser.add_argument("--device", choices=DEVICES, default="cuda", help="cpu is for trying the benchmark out")
    parser.add_argument("--gpu", type=int, help="which one, as nvidia-smi counts; the first of CUDA_VISIBLE_DEVICES")
    parser.add_argument(
        "--contenders", type=names, help="trl-bf16, torch-bf16, …, or recipes, with commas between them"
    )
    parser.add_argument("--work", type=Path, default=WORK / "gpu", help="folder for models, bundles and logs")
    parser.add_argument("--timeout", type=float, default=7200, help="seconds that one process may take")
    parser.add_argument("--output", type=Path, help="the result's file; benchmarks/results/DATE-DEVICE.json by default")


def prepare(given: argparse.Namespace, kind: str) -> tuple[Surroundings, dict[str, Any], list[Contender], str | None]:
    """The processes' surroundings, the result's beginning, the contenders that can run here, and the GPU's target.

    Raises:
        UsageError: none of them can; the message has each one's reason.
    """
    device: Device = given.device
    gpu = default_gpu() if given.gpu is None else given.gpu
    facts = gather_facts(gpu)
    wanted = given.contenders or DEFAULTS[device]
    contenders = [find_contender(name, device, facts) for name in dict.fromkeys(wanted)]
    if kind == VERIFY:
        peers = [each.name for each in contenders if each.peer is not None]
        if given.contenders and peers:
            raise UsageError(f"--contenders {','.join(peers)}: --verify compares recipes with PyTorch; leave it out")
        contenders = [each for each in contenders if each.peer is None]
    able = [each for each in contenders if each.missing is None]
    missing = [{"name": each.name, "reason": each.missing} for each in contenders if each.missing is not None]
    for each in missing:
        say(f"not run here: {each['name']}: {each['reason']}")
    if not able:
        raise UsageError("nothing can be run here; mend what is said above, or try --device cpu")
    surroundings = Surroundings(given.work.resolve(), gpu if device == "cuda" else None, given.timeout)
    surroundings.work.mkdir(parents=True, exist_ok=True)
    result = {
        "format": FORMAT,
        "kind": kind,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "benchmarks.gpu", *sys.argv[1:]]),
        **describe(facts, device),
        "missing": missing,
    }
    return surroundings, result, able, facts.gpus[0].target if facts.gpus else None


def output_path(given: argparse.Namespace, result: dict[str, Any]) -> Path:
    """Where the result is written."""
    path: Path | None = given.output
    return path or choose_path(result["date"], result["device"]["name"], result["kind"])


def names(value: str) -> list[str]:
    """Names with commas between them."""
    found = [name.strip() for name in value.split(",") if name.strip()]
    if not found:
        raise argparse.ArgumentTypeError("name at least one")
    return found


def positive(value: str) -> int:
    """A whole number above 0."""
    try:
        number = int(value)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{value!r} is no whole number above 0")
    return number


def say(line: str) -> None:
    """Progress and errors go to standard error."""
    print(line, file=sys.stderr, flush=True)
