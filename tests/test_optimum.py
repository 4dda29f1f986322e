"""`optimum-cli export dpo` is `dpo-fast export`: found by optimum, with the same options, the same bundle."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from tiny_models import write_recipe

from dpo_fast.cli import app


def optimum_cli(*arguments: object) -> subprocess.CompletedProcess[str]:
    # The script's own entry, without depending on where scripts are installed.
    entry = "import sys; from optimum.commands.optimum_cli import main; sys.exit(main())"
    command = [sys.executable, "-c", entry, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_it_is_found_and_has_every_option_of_the_command() -> None:
    assert "dpo " in optimum_cli("export", "--help").stdout
    shown = optimum_cli("export", "dpo", "--help").stdout
    for option in typer.main.get_command(app).commands["export"].params:
        assert option.opts[0] in shown


@pytest.mark.slow
def test_it_makes_the_same_bundle(tiny_pair: tuple[Path, Path], tiny_bundle: Path, tmp_path: Path) -> None:
    policy, reference = tiny_pair
    recipe, output = write_recipe(tmp_path), tmp_path / "bundle"
    arguments = ["--policy", policy, "--reference", reference, "--output", output, "--recipe", recipe]
    done = optimum_cli("export", "dpo", *arguments, "--no-self-check", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["files"] == json.loads((tiny_bundle / "bundle.json").read_text())["files"]


def test_errors_are_one_line_and_an_exit_code(tmp_path: Path) -> None:
    done = optimum_cli("export", "dpo", "--policy", tmp_path / "no", "--reference", "none", "--output", tmp_path / "b")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("dpo-fast: ")
    assert "Traceback" not in done.stderr
