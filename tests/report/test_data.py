"""What the page loads: the same numbers as the run holds, and text that can do nothing but be read."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_engines import FakeEngines, make_fake_bundle, write_rows

from dpo_fast.evaluate import EvaluateOptions, evaluate
from dpo_fast.report.data import pair_columns, script_json, write_script, write_tokens
from dpo_fast.report.pairs import read_pairs
from dpo_fast.report.texts import TokenTexts, token_numbers
from dpo_fast.store import ScoreStore
from dpo_fast.token_table import TokenTable
from dpo_fast.tokens import load_tokenizer
from dpo_fast.types import LossSettings

from .made_runs import make_run, make_table

HOSTILE = "</script><!--<script>&amp;\u2028\u2029\ud800 \u202e \x00 \"'\\"


def read_script(path: Path) -> Any:
    """The value that a data file hands over."""
    text = path.read_text(encoding="utf-8")
    assert text.startswith(f'dpoFastReport.receive("{path.stem}",')
    return json.loads(text.removeprefix(f'dpoFastReport.receive("{path.stem}",').removesuffix(")\n"))


def test_json_in_a_script_means_the_same_and_ends_no_script(tmp_path: Path) -> None:
    text = script_json({HOSTILE: [HOSTILE, 1.5, None]})

    assert json.loads(text) == {HOSTILE: [HOSTILE, 1.5, None]}
    assert not set(text) & set("<>&\u2028\u2029\ud800")
    write_script(tmp_path, "hostile", HOSTILE)
    assert read_script(tmp_path / "hostile.js") == HOSTILE


def test_no_nan_reaches_the_page() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        script_json(float("nan"))


def test_each_pair_has_its_texts_and_the_rounded_log_ratios_of_its_tokens(tmp_path: Path) -> None:
    """150 pairs in parts of 40 and files of 64: every pair is where the page looks for it."""
    rows = [
        {"prompt": f"Question {i}?", "chosen": f" It is {i}.", "rejected": " I do not know" + "!" * (i % 3)}
        for i in range(150)
    ]
    bundle, run = make_fake_bundle(tmp_path / "bundle"), tmp_path / "run"
    evaluate(
        bundle, write_rows(tmp_path / "pairs.jsonl", rows), run, EvaluateOptions(part_size=40), engine=FakeEngines()
    )
    folder = tmp_path / "data"
    folder.mkdir()
    tokenizer = load_tokenizer(bundle / "policy")
    found = write_tokens(folder, run, 150, TokenTexts(tokenizer), excerpts=True)

    opened = [pair for path in sorted(folder.glob("tokens-*.js")) for pair in read_script(path)]
    excerpts = [pair for path in sorted(folder.glob("excerpts-*.js")) for pair in read_script(path)]
    assert len(read_script(folder / "tokens-00000.js")) == 64
    assert len(opened) == len(excerpts) == 150
    for row, pair, shown in zip(rows, opened, excerpts, strict=True):
        assert pair["prompt"] == shown[0] == row["prompt"]
        for place, name in enumerate(("chosen", "rejected"), start=1):
            text = row[name] + tokenizer.eos_token
            assert "".join(pair[name]["tokens"]) == shown[place] == text
            assert len(pair[name]["values"]) == len(pair[name]["tokens"])

    sizes = []
    position = 0
    for part in ScoreStore(run / "scores").read():
        for name, policy, reference in (
            ("chosen", part.policy_chosen, part.reference_chosen),
            ("rejected", part.policy_rejected, part.reference_rejected),
        ):
            assert reference is not None
            ratios = policy.log_probs.astype(float) - reference.log_probs
            of_part = opened[position : position + len(part.rows)]
            scored = np.array([value for pair in of_part for value in pair[name]["values"]])
            np.testing.assert_allclose(scored / 100, ratios, atol=0.005 + 1e-9, rtol=0)  # half of the last decimal
            sizes += np.abs(scored).tolist()
        position += len(part.rows)
    assert np.mean(np.array(sizes) <= 100 * found.scale) >= 0.99
    assert np.mean(np.array(sizes) < 100 * found.scale) < 0.99


def test_a_first_token_that_nothing_precedes_has_no_value(tmp_path: Path) -> None:
    table = TokenTable(
        rows=np.array([1, 2]),
        lengths=np.array([[0, 3, 2], [2, 2, 1]]),
        tokens=np.arange(10, 20, dtype=np.int32),
        truncated=np.zeros(2, np.bool_),
        groups=[None, None],
    )
    run = make_run(tmp_path / "run", make_fake_bundle(tmp_path / "bundle"), table)
    (tmp_path / "data").mkdir()
    write_tokens(tmp_path / "data", run, 2, token_numbers, excerpts=False)

    first, second = read_script(tmp_path / "data" / "tokens-00000.js")
    assert first["prompt"] == ""
    assert first["chosen"]["tokens"] == ["[10]", "[11]", "[12]"]
    assert [value is None for value in first["chosen"]["values"]] == [True, False, False]
    assert [value is None for value in first["rejected"]["values"]] == [True, False]
    assert second["prompt"] == "[15][16]"
    assert None not in second["chosen"]["values"] + second["rejected"]["values"]


def test_the_tables_columns_are_the_runs_numbers(tmp_path: Path) -> None:
    bundle = make_fake_bundle(tmp_path / "bundle")
    run = make_run(tmp_path / "run", bundle, make_table(300, np.arange(1, 400)))
    pairs = read_pairs(run)
    columns = pair_columns(pairs)

    np.testing.assert_allclose(columns["margin"], pairs.margins, rtol=5e-5)  # five digits
    assert columns["row"] == list(range(1, 301))
    assert [columns["subsets"][place] for place in columns["subset"]] == pairs.sums.groups
    assert {type(value) for value in columns["truncated"]} == {int}


def test_without_a_reference_a_token_has_the_policys_log_prob(tmp_path: Path) -> None:
    bundle = make_fake_bundle(tmp_path / "bundle", reference=False)
    run = tmp_path / "run"
    evaluate(
        bundle,
        write_rows(tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": " b", "rejected": " c"}]),
        run,
        EvaluateOptions(loss=LossSettings(reference_free="sum")),
        engine=FakeEngines(),
    )
    (tmp_path / "data").mkdir()
    write_tokens(tmp_path / "data", run, 1, token_numbers, excerpts=False)

    [pair] = read_script(tmp_path / "data" / "tokens-00000.js")
    log_probs = next(ScoreStore(run / "scores").read()).policy_chosen.log_probs
    assert pair["chosen"]["values"] == np.rint(100 * log_probs).tolist()
    assert not list((tmp_path / "data").glob("excerpts-*"))
