"""The command line: results on standard output, everything else in lines on standard error, and exit codes.

Every bad input must end with exit code 2 and one line that names the value and the way out.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_engines import ROWS, FakeEngine, make_fake_bundle, write_rows
from rich.console import Console

import dpo_fast.cli
import dpo_fast.evaluate
from dpo_fast.errors import EngineOutputError
from dpo_fast.table import print_metrics

HEAVY = ("torch", "onnxruntime", "transformers", "datasets", "pyarrow", "onnx", "trl", "rich.console")
# Colours, a new title for the window, a line break, a turned direction of writing, C1's control sequence.
HOSTILE = "[red]\x1b[31mred\x1b]0;title\x07\n\u202eleft\x9b31m[/red]:smile:"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_fake_bundle(tmp_path / "bundle")


@pytest.fixture
def fake_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default of `evaluate` is bound when it is defined."""
    evaluate = dpo_fast.evaluate.evaluate
    monkeypatch.setattr(
        dpo_fast.evaluate,
        "evaluate",
        lambda *arguments: evaluate(*arguments, engine=lambda bundle, role: FakeEngine(role)),
    )


class Result:
    def __init__(self, code: int, stdout: str, stderr: str) -> None:
        self.code, self.stdout, self.stderr = code, stdout, stderr


Command = Callable[..., Result]


@pytest.fixture
def dpo_fast_(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run a command line in this process, in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Result:
        capsys.readouterr()
        code = dpo_fast.cli.run(list(arguments))
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


def python(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **variables}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=120, check=False
    )


def assert_refused(result: Result, *says: str) -> None:
    """Exit code 2, nothing on standard output, and one line of a person's length that a terminal can show."""
    assert result.code == 2, result.stderr
    assert result.stdout == ""
    [line] = result.stderr.splitlines()
    assert line.startswith("dpo-fast: ")
    assert line.isprintable()
    assert len(line) < 500
    for text in says:
        assert text in line


# Light starts.


@pytest.mark.parametrize("arguments", [["--help"], ["evaluate", "--help"], ["export", "-h"], ["--version"], []])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys, dpo_fast.cli\n"
        f"code = dpo_fast.cli.run({arguments!r})\n"
        f"loaded = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "sys.exit(f'{code} {loaded}')"
    )
    done = python("-c", code)

    assert done.stderr.strip() == "0 []"
    assert "dpo-fast" in done.stdout


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = (*HEAVY, "numpy", "typer")
    done = python("-c", f"import sys, dpo_fast; sys.exit(str([name for name in {heavy!r} if name in sys.modules]))")

    assert done.stderr.strip() == "[]"


def test_both_modules_run() -> None:
    assert "Commands:" in python("-m", "dpo_fast", "--help").stdout
    assert "--reference" in python("-m", "dpo_fast.export", "--help").stdout


def test_a_subprocess_exits_with_the_same_code(tmp_path: Path) -> None:
    done = python("-m", "dpo_fast", "evaluate", "nowhere", "--dataset", "x.jsonl", "--output", str(tmp_path / "run"))
    assert_refused(Result(done.returncode, done.stdout, done.stderr), "nowhere: no such bundle")

    done = python("-m", "dpo_fast.export", "--policy", "nowhere")
    assert_refused(Result(done.returncode, done.stdout, done.stderr), "--output", "dpo-fast export --help")


# Bad input.

EVALUATE = ("evaluate", "bundle", "--dataset", "pairs.jsonl", "--output", "run")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["bogus"], ["'bogus'", "`dpo-fast --help`"]),
        (["--bogus"], ["--bogus", "`dpo-fast --help`"]),
        (["evaluate"], ["'bundle'", "`dpo-fast evaluate --help`"]),
        (["evaluate", "bundle", "--output", "run"], ["'--dataset'"]),
        ([*EVALUATE, "--bogus"], ["--bogus", "`dpo-fast evaluate --help`"]),
        ([*EVALUATE, "another"], ["another"]),
        ([*EVALUATE, "--limit", "ten"], ["'--limit'", "integer"]),
        ([*EVALUATE, "--limit", "0"], ["--limit 0"]),
        ([*EVALUATE, "--limit", "-1"], ["--limit -1"]),
        ([*EVALUATE, "--batch-size", "0"], ["--batch-size 0"]),
        ([*EVALUATE, "--token-budget", "0"], ["--token-budget 0"]),
        ([*EVALUATE, "--token-budget", "many"], ["--token-budget 'many'", "auto"]),
        ([*EVALUATE, "--part-size", "0"], ["--part-size 0"]),
        ([*EVALUATE, "--shard", "2"], ["--shard '2'", "i/n"]),
        ([*EVALUATE, "--shard", "3/2"], ["--shard 3/2"]),
        ([*EVALUATE, "--threads", "-1"], ["--threads -1"]),
        ([*EVALUATE, "--engines", "both"], ["'both'", "in-turn"]),
        ([*EVALUATE, "--engines", "apart"], ["--engines apart", "--cluster"]),
        ([*EVALUATE, "--engines", "in-turn", "--cluster", "local"], ["--engines in-turn", "apart"]),
        ([*EVALUATE, "--workers", "2"], ["--workers 2", "--cluster local"]),
        ([*EVALUATE, "--cluster", "slurm"], ["'slurm'", "ray://HOST:PORT"]),
        ([*EVALUATE, "--cluster", "local", "--workers", "0"], ["--workers 0", "at least 1"]),
        ([*EVALUATE, "--cluster", "local", "--resources-per-worker", "GPU"], ["'GPU'", '{"GPU": 1}']),
        ([*EVALUATE, "--scores", "s3://user:secret@bucket/run"], ["s3://…", "password"]),
        ([*EVALUATE, "--reference-scores", "nowhere"], ["--reference-scores nowhere", "holds no scores"]),
        (["merge", "nowhere", "--output", "run"], ["nowhere/metrics.json: is missing"]),
        (["merge", "--output", "run"], ["'RUN...'"]),
        ([*EVALUATE, "--max-length", "0"], ["--max-length 0"]),
        ([*EVALUATE, "--max-length", "100000"], ["--max-length 100000", "256"]),
        ([*EVALUATE, "--seed", "-1"], ["--seed -1"]),
        ([*EVALUATE, "--beta", "0"], ["--beta 0.0"]),
        ([*EVALUATE, "--beta", "nan"], ["--beta nan"]),
        ([*EVALUATE, "--loss-type", "dpo"], ["--loss-type 'dpo'", "sigmoid"]),
        ([*EVALUATE, "--loss-type", "exo_pair"], ["exo_pair", "--label-smoothing"]),
        ([*EVALUATE, "--loss-type", "aot", "--f-divergence-type", "js_divergence"], ["js_divergence", "aot"]),
        ([*EVALUATE, "--f-divergence-type", "js"], ["'js'", "js_divergence"]),
        ([*EVALUATE, "--loss-weight", "1", "--loss-weight", "2"], ["2 --loss-weight", "1 --loss-type"]),
        ([*EVALUATE, "--loss-type", "robust", "--label-smoothing", "0.5"], ["--label-smoothing 0.5", "robust"]),
        ([*EVALUATE, "--loss-type", "aot", "--use-weighting"], ["--use-weighting"]),
        ([*EVALUATE, "--ld-alpha", "2"], ["--ld-alpha 2.0"]),
        ([*EVALUATE, "--reference-free", "mean"], ["'mean'", "average"]),
        ([*EVALUATE, "--aggregate", "mean"], ["'mean'", "exact"]),
        ([*EVALUATE, "--on-error", "ignore"], ["'ignore'", "skip"]),
        ([*EVALUATE, "--group-by", "colour"], ["'colour'", "kind"]),
        ([*EVALUATE, "--split", "train"], ["'train'", "no splits"]),
        (["evaluate", "nowhere", "--dataset", "pairs.jsonl", "--output", "run"], ["nowhere: no such bundle", "export"]),
        (["evaluate", ".", "--dataset", "pairs.jsonl", "--output", "run"], ["bundle.json"]),
        (["evaluate", "bundle", "--dataset", "nowhere.jsonl", "--output", "run"], ["'nowhere.jsonl'"]),
        (["evaluate", "bundle", "--dataset", "", "--output", "run"], ["--dataset is empty"]),
        (["evaluate", "bundle", "--dataset", "pairs.jsonl", "--output", "bundle"], ["bundle: exists"]),
        (["evaluate", "bundle", "--dataset", "pairs.jsonl", "--output", "pairs.jsonl"], ["pairs.jsonl: exists"]),
        (["evaluate", "bundle", "--dataset", "pairs.jsonl", "--output", "pairs.jsonl/run"], ["is a file"]),
        (["push", "bundle", "--repo-id", "x"], ["'x'", "user/name"]),
        (["push", "nowhere", "--repo-id", "a/b"], ["nowhere: no such bundle"]),
        (["push", "bundle", "--repo-id", "a/b", "--run", "nowhere"], ["--run nowhere", "metrics.json"]),
        (
            ["export", "--policy", "x", "--reference", "none", "--reference-revision", "r", "--output", "b"],
            ["--reference-revision", "none"],
        ),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else None,
)
def test_bad_arguments(dpo_fast_: Command, bundle: Path, tmp_path: Path, arguments: list[str], says: list[str]) -> None:
    write_rows(tmp_path / "pairs.jsonl", ROWS)
    before = sorted(path.name for path in tmp_path.iterdir())

    assert_refused(dpo_fast_(*arguments), *says)

    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"prompt": ""}, ["row 2", "'prompt' is empty"]),
        ({"chosen": ""}, ["row 2", "'chosen' is empty"]),
        ({"rejected": None}, ["row 2", "'rejected' is missing or null"]),
        ({"prompt": "weather " * 80}, ["row 2", "no room for a completion in --max-length 64", "--on-error skip"]),
    ],
)
def test_bad_rows(dpo_fast_: Command, bundle: Path, tmp_path: Path, change: dict[str, Any], says: list[str]) -> None:
    write_rows(tmp_path / "pairs.jsonl", [ROWS[0], {**ROWS[1], **change}, ROWS[2]])

    assert_refused(dpo_fast_(*EVALUATE), *says)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", ["'pairs.jsonl' is empty"]),
        ("\n\n", ["'pairs.jsonl' has no rows"]),
        ('{"prompt": 1\n', ["'pairs.jsonl' cannot be read", "line 1 is not JSON"]),
        ('{"prompt": "a", "chosen": "b"}\n', ["no column 'rejected'", "prompt, chosen"]),
    ],
)
def test_bad_files(dpo_fast_: Command, bundle: Path, tmp_path: Path, content: str, says: list[str]) -> None:
    (tmp_path / "pairs.jsonl").write_text(content)

    assert_refused(dpo_fast_(*EVALUATE), *says)


def test_altered_bundle(dpo_fast_: Command, bundle: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "pairs.jsonl", ROWS)
    with (bundle / "policy" / "tokenizer.json").open("a") as file:
        file.write(" ")

    assert_refused(dpo_fast_(*EVALUATE), "bundle/policy/tokenizer.json: is not the file that was exported")


@pytest.mark.usefixtures("fake_engine")
def test_finished_run(dpo_fast_: Command, bundle: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "pairs.jsonl", ROWS)
    assert dpo_fast_(*EVALUATE).code == 0

    assert dpo_fast_(*EVALUATE).code == 0  # nothing is left to do
    other = (*EVALUATE, "--beta", "0.2")
    assert_refused(dpo_fast_(*other), "run: holds a finished run with other settings", "--overwrite", "rescore run")
    assert dpo_fast_(*other, "--overwrite").code == 0


@pytest.mark.usefixtures("fake_engine")
def test_shards_and_their_merging(dpo_fast_: Command, bundle: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "pairs.jsonl", ROWS)
    small = ("--part-size", "2", "--token-budget", "auto")
    for shard in ("1/2", "2/2"):
        arguments = ("evaluate", "bundle", "--dataset", "pairs.jsonl", "--output", f"run{shard[0]}", "--shard", shard)
        assert dpo_fast_(*arguments, *small).code == 0

    merged = dpo_fast_("merge", "run2", "run1", "--output", "run", "--json")

    assert merged.code == 0
    assert json.loads(merged.stdout)["counts"]["pairs"] == len(ROWS)
    assert_refused(dpo_fast_("merge", "run2", "run1", "--output", "run"), "run: exists already", "--overwrite")
    assert_refused(dpo_fast_("merge", "run1", "--output", "other"), "the shards 2/2 are missing")
    table = dpo_fast_("merge", "run1", "run2", "--output", "run", "--overwrite")
    assert "eval_loss" in table.stdout
    assert "run: run (metrics.json)" in table.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_no_bug(bundle: Path, tmp_path: Path, number: signal.Signals) -> None:
    """A process of its own, that sends itself the signal as its engine runs."""
    dataset = write_rows(tmp_path / "pairs.jsonl", ROWS)
    script = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import dpo_fast.cli, dpo_fast.local
from fake_engines import FakeEngine

class Signalled(FakeEngine):
    def score(self, batch):
        os.kill(os.getpid(), {int(number)})
        return super().score(batch)

dpo_fast.local.open_engine = lambda bundle, role, threads: Signalled(role)
sys.exit(dpo_fast.cli.run(sys.argv[1:]))
"""
    done = python("-c", script, "evaluate", str(bundle), "--dataset", dataset, "--output", str(tmp_path / "run"))

    assert done.returncode == 128 + number
    [line] = done.stderr.splitlines()
    assert line.startswith(f"dpo-fast: {number.name}: stopped in part 0 of 1; what is finished is in ")
    assert line.endswith("run the same command again, without --overwrite, to go on")
    assert done.stdout == ""


# Results.


@pytest.mark.usefixtures("fake_engine")
def test_json_is_all_that_is_printed(dpo_fast_: Command, bundle: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "pairs.jsonl", ROWS)

    result = dpo_fast_(*EVALUATE, "--json", "--loss-type", "sigmoid", "--loss-type", "sft", "--group-by", "kind")

    assert result.code == 0
    printed = json.loads(result.stdout, parse_constant=lambda name: pytest.fail(name))
    assert printed.pop("hints") == []
    assert printed == json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))
    assert printed["provenance"]["settings"]["loss_type"] == ["sigmoid", "sft"]


@pytest.mark.usefixtures("fake_engine")
def test_the_table_has_every_metric(dpo_fast_: Command, bundle: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "pairs.jsonl", ROWS)

    result = dpo_fast_(*EVALUATE, "--group-by", "kind", "--beta", "0.25")

    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))
    for key, value in metrics.items():
        if key.startswith("eval_"):
            [line] = [line for line in result.stdout.splitlines() if f" {key} " in line]
            assert f" {value:.4f} " in line
    assert "pairs.jsonl, 5 pairs, sigmoid, beta 0.25" in result.stdout
    assert "│ sea " in result.stdout
    assert "run: run (metrics.json); model card: bundle/policy/README.md" in result.stdout
    assert result.stderr == ""


def shows_nothing_hostile(text: str) -> bool:
    """No control character, nor one that a terminal might take for one, except for line breaks."""
    return all(character.isprintable() or character == "\n" for character in text)


@pytest.mark.usefixtures("fake_engine")
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_hostile_names_reach_no_terminal(dpo_fast_: Command, bundle: Path, tmp_path: Path, options: list[str]) -> None:
    # A file's name holds no "/"; its colour is another, so that each of the two must be shown as it is.
    name = HOSTILE.replace("/", "").replace("red", "blue").replace(":smile:", ":bug:") + ".jsonl"
    write_rows(tmp_path / name, [{**row, "kind": HOSTILE + "x" * 100} for row in ROWS])

    result = dpo_fast_("evaluate", "bundle", "--dataset", name, "--output", "run", "--group-by", "kind", *options)

    assert result.code == 0
    assert shows_nothing_hostile(result.stdout + result.stderr)
    for markup in ("[red]", "[blue]", ":smile:", ":bug:"):
        assert markup in result.stdout  # as text, not obeyed
    if options:
        assert list(json.loads(result.stdout)["groups"]) == [HOSTILE + "x" * 100]


def test_hostile_rows_and_arguments_reach_no_terminal(dpo_fast_: Command, bundle: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "pairs.jsonl", [{**ROWS[0], "chosen": [HOSTILE], "rejected": [HOSTILE]}])

    assert_refused(dpo_fast_(*EVALUATE), "row 1", "[red]")
    assert_refused(dpo_fast_("evaluate", "bundle", "--dataset", HOSTILE, "--output", "run"), "no such file")
    assert_refused(dpo_fast_("evaluate", HOSTILE, "--dataset", "pairs.jsonl", "--output", "run"), "no such bundle")
    assert_refused(dpo_fast_(HOSTILE))
    assert_refused(dpo_fast_(*EVALUATE, "--on-error", HOSTILE))
    assert_refused(dpo_fast_("push", "bundle", "--repo-id", HOSTILE))


def test_the_table_keeps_within_a_narrow_terminal(bundle: Path, tmp_path: Path) -> None:
    dataset = write_rows(tmp_path / "pairs.jsonl", ROWS)
    metrics = dpo_fast.evaluate.evaluate(
        bundle, dataset, tmp_path / "run", engine=lambda bundle, role: FakeEngine(role)
    )
    console = Console(width=60, record=True, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123

    print_metrics(metrics, console)

    assert max(map(len, console.export_text().splitlines())) <= 60


# What goes wrong underneath.


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (KeyboardInterrupt(), 130, "interrupted; an evaluation goes on"),
        (EngineOutputError("row 3: the engine returned log_prob nan"), 3, "row 3: the engine returned log_prob nan"),
    ],
)
def test_exit_codes(
    dpo_fast_: Command, bundle: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, says: str
) -> None:
    def fail(*arguments: object, **keywords: object) -> None:
        raise error

    monkeypatch.setattr(dpo_fast.evaluate, "evaluate", fail)

    result = dpo_fast_(*EVALUATE)

    assert result.code == code
    assert result.stdout == ""
    [line] = result.stderr.splitlines()
    assert line.startswith(f"dpo-fast: {says}")


def test_a_bug_is_no_input_error(dpo_fast_: Command, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes through with its traceback, and Python's exit code for that is 1."""

    def fail(*arguments: object, **keywords: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(dpo_fast.evaluate, "evaluate", fail)

    with pytest.raises(ZeroDivisionError):
        dpo_fast_(*EVALUATE)


def test_demo_with_json_keeps_its_table_off_standard_output(
    dpo_fast_: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_demo(output: Path, *, seed: int, overwrite: bool, console: Console) -> dict[str, Any]:
        console.print("table")
        return {"seed": seed}

    monkeypatch.setattr("dpo_fast.demo.run_demo", run_demo)

    assert json.loads(dpo_fast_("demo", "--json", "--seed", "3").stdout) == {"seed": 3}
    assert dpo_fast_("demo").stdout == "table\n"


@pytest.mark.slow  # exports a model
def test_the_whole_way_in_a_subprocess(tiny_bundle: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(tiny_bundle, tmp_path / "bundle")
    dataset = write_rows(tmp_path / "pairs.jsonl", ROWS)
    arguments = ("-m", "dpo_fast", "evaluate", str(tmp_path / "bundle"), "--dataset", dataset, "--output")

    table = python(*arguments, str(tmp_path / "run"))
    document = python(*arguments, str(tmp_path / "run2"), "--json")

    assert (table.returncode, document.returncode) == (0, 0), table.stderr + document.stderr
    assert table.stderr == document.stderr == ""
    metrics = json.loads(document.stdout)
    assert metrics["provenance"]["engine"].startswith("onnxruntime ")
    assert f"{metrics['eval_loss']:.4f}" in table.stdout
    assert "\x1b" not in table.stdout  # no colours into a pipe
