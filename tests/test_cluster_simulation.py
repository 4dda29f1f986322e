"""The simulation of a cluster run: cases derived by hand, and what must hold for all of them."""

import json
import math
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # as the script itself has it

import cluster_simulation
from cluster_simulation import (
    BEGIN,
    END,
    REMEDIES,
    Outcome,
    Parameters,
    change,
    cost,
    load_calibration,
    merge_seconds,
    simulate,
    speed_of_model,
)

# Parts of 10 pairs that take the engine 10 s; everything else costs nothing.
FREE = Parameters(
    tokens_per_pair=1, tokens_per_second=1, rows_per_part=10, part_spread=0,
    driver_start_seconds=0, fingerprint_seconds_per_pair=0, seconds_per_block=0, seconds_per_block_and_worker=0,
    worker_start_seconds=0, parallel_starts=1000, prepare_seconds_per_pair=0, prepare_seconds_per_cached_pair=0,
    engine_seconds_per_part=0, encode_seconds_per_pair=0, read_bytes_per_pair=0, part_bytes_per_pair=0,
    request_seconds=0, worker_bytes_per_second=math.inf, store_requests_per_second=math.inf,
    store_bytes_per_second=math.inf, ledger_seconds_per_message=0, merge_seconds_per_pair=0, seconds_until_restart=0,
)  # fmt: skip
IDLE_ENGINE = change(FREE, {"tokens_per_second": math.inf})


def approx(value: float) -> object:
    """Equal but for the rounding of some thousand sums of float64."""
    return pytest.approx(value, rel=1e-9, abs=1e-9)


def check(outcome: Outcome) -> None:
    """What holds for every run."""
    assert outcome.times_written.tolist() == [1] * outcome.parts
    assert outcome.times_begun >= outcome.parts
    assert outcome.parts * outcome.deaths >= outcome.times_begun - outcome.parts
    assert outcome.efficiency + sum(outcome.losses.values()) == approx(1)
    assert min(outcome.losses.values()) > -1e-9
    assert max(outcome.busy.values()) < 1 + 1e-9
    assert outcome.limit in REMEDIES


@pytest.mark.parametrize(("workers", "seconds"), [(1, 25), (2, 15), (3, 10), (4, 10)])
def test_engines_alone(workers: int, seconds: float) -> None:
    """Three parts, of 10, 10 and 5 pairs: one after the other; 10 and 5 beside 10; each by its own worker."""
    outcome = simulate(FREE, 25, workers)

    check(outcome)
    assert (outcome.parts, outcome.blocks) == (3, 3)
    assert outcome.wall_seconds == approx(seconds)
    assert outcome.efficiency == approx(25 / (workers * seconds))


def test_one_part_pays_for_everything_once() -> None:
    """By hand, in seconds, for one part of 10 pairs::

    driver start 1, fingerprints 10 x 0.2 = 2, worker start 3, block 4 + 1 worker x 0.5
    read: 3 requests x 0.1 + 10 x 100 bytes / 500 = 2.3, prepare 10 x 0.6 = 6
    engine 10 + 0.7, write: encode 10 x 0.3 = 3, 2 requests x 0.1 + 10 x 200 bytes / 500 = 4.2
    merge: 1 request x 0.1 + 4, 10 x 0.8 = 8, two requests, two at a time: 0.1
    """
    parameters = change(
        FREE,
        {
            "driver_start_seconds": 1, "fingerprint_seconds_per_pair": 0.2, "worker_start_seconds": 3,
            "seconds_per_block": 4, "seconds_per_block_and_worker": 0.5, "request_seconds": 0.1,
            "read_bytes_per_pair": 100, "part_bytes_per_pair": 200, "worker_bytes_per_second": 500,
            "prepare_seconds_per_pair": 0.6, "prepare_seconds_per_cached_pair": 0.1, "engine_seconds_per_part": 0.7,
            "encode_seconds_per_pair": 0.3, "merge_seconds_per_pair": 0.8, "parallel_finish_requests": 2,
        },
    )  # fmt: skip
    begin = 1 + 2 + 3 + 4.5 + 2.3 + 6
    outcome = simulate(parameters, 10, 1)

    check(outcome)
    assert outcome.start_seconds == approx(begin)
    assert outcome.steady_seconds == approx(10.7)
    assert outcome.tail_seconds == approx(3 + 4.2)
    assert outcome.merge_seconds == approx(4.1 + 8 + 0.1)
    assert simulate(parameters, 10, 1, cached=True).wall_seconds == approx(outcome.wall_seconds - 5)


def test_what_goes_on_beside_the_engine_is_hidden() -> None:
    """Five parts: 6 s to prepare the first, 5 x 10 s on the engine, 3 s to write the last."""
    parameters = change(FREE, {"prepare_seconds_per_pair": 0.6, "encode_seconds_per_pair": 0.3})

    assert simulate(parameters, 50, 1).wall_seconds == approx(6 + 50 + 3)


def test_two_threads_can_be_the_limit() -> None:
    """Prepare 14 s, engine 10 s, write 6 s: a thread takes 30 s a part, and two of them cannot fill the engine::

    A  prepare 0-14, engine 14-24, write 24-30, prepare 30-44, engine 44-54, write 54-60
    B  prepare 0-14, engine 24-34, write 34-40, prepare 40-54, engine 54-64, write 64-70
    """
    parameters = change(FREE, {"prepare_seconds_per_cached_pair": 1.4, "encode_seconds_per_pair": 0.6})

    assert simulate(parameters, 40, 1, cached=True).wall_seconds == approx(70)
    assert simulate(parameters, 4000, 1, cached=True).limit == "threads"
    assert simulate(change(parameters, {"blocks_in_flight": 4}), 4000, 1, cached=True).limit == "engines"


def test_a_worker_tokenises_one_part_at_a_time() -> None:
    """The same where tokens are made: the tokenizer's 14 s a part are the limit, and the last part is written::

    A  prepare 0-14, engine 14-24, write 24-30; prepare 30-44, engine 44-54, write 54-60
    B  prepare 14-28, engine 28-38, write 38-44; prepare 44-58, engine 58-68, write 68-74
    """
    parameters = change(FREE, {"prepare_seconds_per_pair": 1.4, "encode_seconds_per_pair": 0.6})

    assert simulate(parameters, 40, 1).wall_seconds == approx(74)
    assert simulate(change(parameters, {"blocks_in_flight": 4}), 4000, 1).limit == "threads"


def test_the_driver_can_be_the_limit() -> None:
    """50 blocks, one a second, whoever takes them; with two workers at 0.5 s each, two a second."""
    parameters = change(IDLE_ENGINE, {"seconds_per_block": 1})
    outcome = simulate(parameters, 500, 2)

    assert outcome.wall_seconds == approx(50)
    assert outcome.limit == "driver loop"
    assert outcome.busy["driver loop"] == 1
    by_worker = change(IDLE_ENGINE, {"seconds_per_block_and_worker": 0.5})
    assert simulate(by_worker, 500, 2).wall_seconds == approx(50)
    assert simulate(by_worker, 500, 4).wall_seconds == approx(100)


def test_parts_share_a_block_where_there_are_too_many() -> None:
    """25 parts in at most 10 blocks: blocks of 3, and one of 1."""
    outcome = simulate(change(IDLE_ENGINE, {"most_blocks": 10, "seconds_per_block": 1}), 250, 1)

    check(outcome)
    assert (outcome.parts, outcome.blocks) == (25, 9)
    assert outcome.wall_seconds == approx(9)


@pytest.mark.parametrize(
    ("limits", "limit"),
    [
        ({"requests_per_read": 3, "requests_per_write": 2, "store_requests_per_second": 10}, "store requests"),
        ({"read_bytes_per_pair": 30, "part_bytes_per_pair": 20, "store_bytes_per_second": 1000}, "store bytes"),
    ],
)
def test_the_store_can_be_the_limit(limits: dict[str, float], limit: str) -> None:
    """0.3 s to read a part and 0.2 s to write it: 40 parts take 20 s, however many workers there are."""
    outcome = simulate(change(IDLE_ENGINE, {**limits, "finish_requests_per_part": 0}), 400, 8)

    check(outcome)
    assert outcome.wall_seconds - outcome.merge_seconds == approx(20)
    assert outcome.limit == limit


def test_the_ledger_can_be_the_limit() -> None:
    """A message for each of 3 parts, 10 s each; and none beside."""
    parameters = change(FREE, {"ledger_seconds_per_message": 10, "progress_per_second": 0})

    assert simulate(parameters, 25, 1).wall_seconds == approx(30)
    assert simulate(parameters, 25, 3).wall_seconds == approx(30)


def test_the_merge() -> None:
    """Three parts, each read in 2 s and summed in 3: 2 + 3 x 3; summed in 1: 3 x 2 + 1; two ahead: 2 + 2 x 1 + 1."""
    one_ahead = {"request_seconds": 2, "finish_requests_per_part": 0, "merge_parts_ahead": 1}
    parameters = change(FREE, {**one_ahead, "merge_seconds_per_pair": 0.3})
    assert merge_seconds(parameters, 30) == approx(11)
    quick = change(parameters, {"merge_seconds_per_pair": 0.1})
    assert merge_seconds(quick, 30) == approx(7)
    assert merge_seconds(change(quick, {"merge_parts_ahead": 2}), 30) == approx(5)
    finishing = change(quick, {"finish_requests_per_part": 2, "parallel_finish_requests": 4})
    assert merge_seconds(finishing, 30) == approx(7 + 3 * 2 * 2 / 4)


def test_workers_start_so_many_at_a_time() -> None:
    """Three workers, two at a time, 5 s each: engines begin at 5, 5 and 10 s."""
    parameters = change(FREE, {"worker_start_seconds": 5, "parallel_starts": 2})
    outcome = simulate(parameters, 30, 3)

    assert outcome.start_seconds == approx(5)  # the third has nothing left to do: each of the others holds two
    assert outcome.wall_seconds == approx(5 + 20)
    assert simulate(parameters, 50, 3).start_seconds == approx(20 / 3)


def test_a_straggler_makes_a_tail() -> None:
    """Two workers, one ten times slower; 22 parts of 10 s, or 100 s.

    At 100 s the slow one has written one, has one on the engine, and takes a third, which ends at 300 s; the fast one
    writes the other 19 by 190 s.
    """
    outcome = simulate(change(FREE, {"straggler_share": 0.5, "straggler_factor": 10}), 220, 2)

    check(outcome)
    assert outcome.wall_seconds == approx(300)
    assert outcome.tail_seconds == approx(300 - (190 + 300) / 2)
    assert simulate(FREE, 220, 2).wall_seconds == approx(110)


def test_a_worker_that_dies_loses_what_it_had_in_hand() -> None:
    parameters = change(FREE, {"deaths_per_worker_hour": 20, "worker_start_seconds": 5, "seconds_until_restart": 7})
    outcome = simulate(parameters, 2000, 4)

    check(outcome)
    assert outcome.deaths > 0
    assert 0 < outcome.times_begun - outcome.parts <= 2 * outcome.deaths  # a part for each of two threads
    assert outcome.losses["work"] > 0
    with pytest.raises(ValueError, match="die faster than they finish"):
        simulate(change(parameters, {"deaths_per_worker_hour": 1e5}), 100, 1)


def test_ten_to_the_eighth() -> None:
    outcome = simulate(Parameters(tokens_per_second=20_000), 10**8, 256)

    check(outcome)
    assert outcome.parts == 97_657
    assert outcome.blocks == math.ceil(97_657 / 10)
    assert outcome.wall_seconds > outcome.useful_seconds / 256
    assert outcome.merge_bytes == 4e9


PARAMETERS = st.fixed_dictionaries(
    {
        "seconds_per_block": st.sampled_from([0, 0.1, 3]),
        "prepare_seconds_per_pair": st.sampled_from([0, 0.3, 2]),
        "encode_seconds_per_pair": st.sampled_from([0, 0.2]),
        "request_seconds": st.sampled_from([0, 0.5]),
        "store_requests_per_second": st.sampled_from([math.inf, 20, 1]),
        "worker_start_seconds": st.sampled_from([0, 20]),
        "parallel_starts": st.integers(1, 4),
        "blocks_in_flight": st.integers(1, 3),
        "most_blocks": st.sampled_from([3, 10_000]),
        "part_spread": st.sampled_from([0, 0.3]),
        "straggler_share": st.sampled_from([0, 0.3]),
        "deaths_per_worker_hour": st.sampled_from([0, 5, 30]),
    }
)


@settings(max_examples=150)
@given(PARAMETERS, st.integers(1, 400), st.integers(1, 9), st.integers(0, 3))
def test_each_part_is_written_once(values: dict[str, float], pairs: int, workers: int, seed: int) -> None:
    parameters = change(FREE, values)
    outcome = simulate(parameters, pairs, workers, seed=seed)

    check(outcome)
    fastest = outcome.useful_seconds / workers
    assert outcome.wall_seconds >= max(fastest, outcome.blocks * parameters.seconds_per_block) - 1e-9
    again = simulate(parameters, pairs, workers, seed=seed)
    assert again.wall_seconds == outcome.wall_seconds
    assert again.times_begun == outcome.times_begun


@settings(max_examples=150)
@given(PARAMETERS, st.integers(1, 400), st.integers(1, 9))
def test_more_workers_that_cost_nothing_to_start_are_never_slower(
    values: dict[str, float], pairs: int, workers: int
) -> None:
    """Of equal parts: where they differ, the one that is taken last may be the longest, and then it is chance."""
    nothing = {"worker_start_seconds": 0, "deaths_per_worker_hour": 0, "straggler_share": 0, "part_spread": 0}
    parameters = change(FREE, {**values, **nothing, "parallel_starts": 1000, "store_requests_per_second": math.inf})
    pairs = max(10, pairs - pairs % 10)

    assert (
        simulate(parameters, pairs, workers + 1).wall_seconds
        <= simulate(parameters, pairs, workers).wall_seconds + 1e-9
    )


def test_seeds_differ() -> None:
    parameters = change(FREE, {"part_spread": 0.3})
    assert simulate(parameters, 100, 2, seed=0).wall_seconds != simulate(parameters, 100, 2, seed=1).wall_seconds


def test_the_spread_is_of_mean_one() -> None:
    """20,000 parts: their mean is off by 0.3 / sqrt(20,000) = 0.002, one standard error; six are allowed."""
    useful = simulate(change(FREE, {"part_spread": 0.3}), 200_000, 8).useful_seconds
    assert useful == pytest.approx(200_000, rel=6 * 0.3 / np.sqrt(20_000))


def test_cost_and_speed_by_hand() -> None:
    """Two workers for 150 s at 24 an hour are 2; 8e9 weights at 30 % of 1e15 operations/s are 18,750 tokens/s."""
    assert cost(simulate(FREE, 300, 2), 24) == approx(2)
    assert speed_of_model(8e9, 1e15, 0.3) == approx(18_750)


# The command, and its calibration.


def write_calibration(path: Path, **changed: object) -> Path:
    entry = {"value": 0.5, "unit": "s", "how": "1,000 empty blocks"} | changed
    path.write_text(json.dumps({"hardware": "a laptop", "parameters": {"seconds_per_block": entry}}))
    return path


def test_a_calibration_replaces_defaults(tmp_path: Path) -> None:
    parameters, origins = load_calibration(write_calibration(tmp_path / "measured.json"))

    assert parameters == change(Parameters(), {"seconds_per_block": 0.5})
    assert origins["seconds_per_block"] == "measured: 1,000 empty blocks"
    assert origins["request_seconds"] == "assumed"
    assert origins.keys() == {field.name for field in fields(Parameters)}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (
            '{"parameters": {"seconds_per_blok": {"value": 1, "unit": "s", "how": ""}}}',
            "'seconds_per_blok' is not known",
        ),
        (
            '{"parameters": {"seconds_per_block": {"value": 1, "unit": "ms", "how": ""}}}',
            "is in 'ms', and must be in 's'",
        ),
        ('{"parameters": {"seconds_per_block": {"value": -1, "unit": "s", "how": ""}}}', "must be at least 0"),
        ('{"parameters": {"seconds_per_block": 1}}', "is no calibration"),
        ('{"parameters": [', "is no calibration"),
        ("[]", "is no calibration"),
    ],
)
def test_a_damaged_calibration_is_refused(content: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=says):
        load_calibration(path)


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["cluster_simulation.py", *arguments])
    cluster_simulation.main()


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    calibration = ("--calibration", str(write_calibration(tmp_path / "measured.json")))
    common = ("--pairs", "1e5,2e5", "--workers", "1,4", "--tokens-per-second", "20000", *calibration)
    command(monkeypatch, *common, "--price-per-hour", "2", "--json")
    printed = json.loads(capsys.readouterr().out)
    expected = simulate(change(Parameters(), {"seconds_per_block": 0.5, "tokens_per_second": 20_000}), 100_000, 4)

    assert [(result["pairs"], result["workers"]) for result in printed["results"]] == [
        (100_000, 1), (100_000, 4), (200_000, 1), (200_000, 4),
    ]  # fmt: skip
    assert printed["results"][1]["wall_seconds"] == expected.wall_seconds
    assert printed["results"][1]["cost"] == approx(cost(expected, 2.0))
    assert printed["origins"]["tokens_per_second"] == "given"

    command(monkeypatch, *common, "--price-per-hour", "2", "--set", "deaths_per_worker_hour=1")
    shown = capsys.readouterr().out
    assert shown.count("\n|") == 2 + 4  # head, rule, rows
    for words in ("efficiency", "a million pairs", "begun again", "limit "):
        assert words in shown
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\n{END}\nafter\n")
    command(monkeypatch, *common, "--write", str(page))
    written = page.read_text()
    assert written.startswith(f"before\n{BEGIN}\n\n500 tokens a pair, 20000 tokens/s a worker:\n\n| ")
    assert written.endswith(f"\n\n{END}\nafter\n")
    command(monkeypatch, "--parameters", "--parameters-of-model", "8e9", "--peak-flops", "1e15")
    shown = capsys.readouterr().out
    assert "tokens_per_second = 18750 tokens/s" in shown
    assert "assumed: 30% of 1e+15 FLOP/s" in shown


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--pairs", "0"], "0: must be a whole number of at least 1"),
        (["--workers", "1.5"], "1.5: must be a whole number"),
        (["--set", "request_seconds"], "must be NAME=VALUE"),
        (["--set", "latency=1"], "'latency' is not known"),
        (["--set", "request_seconds=nan"], "must be at least 0"),
        (["--set", "blocks_in_flight=0"], "a whole number of at least 1"),
        (["--tokens-per-second", "0"], "must be above 0"),
        (["--parameters-of-model", "8e9"], "goes with --peak-flops"),
        (["--pairs", "10", "--workers", "1", "--write", "nowhere/page.md"], "cannot be read"),
        (["--calibration", "nowhere.json"], "is no calibration"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as caught:
        command(monkeypatch, *arguments)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_parameter_says_what_it_is() -> None:
    for field in fields(Parameters):
        assert field.metadata["meaning"]
        assert field.metadata["origin"]
