"""Runs whose parts lie elsewhere: everything that reads a run finds them, and nothing else is taken for them."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from fake_engines import ROWS, FakeEngines, make_fake_bundle, write_rows
from s3_server import S3Server, s3

from dpo_fast.compare.compare import compare
from dpo_fast.errors import EngineOutputError, OutputExistsError, PartsFailedError, StorageError, UsageError
from dpo_fast.evaluate import METRICS, EvaluateOptions, evaluate
from dpo_fast.merge import merge
from dpo_fast.plan import plan
from dpo_fast.reference_scores import ScoresOfRun
from dpo_fast.report.pairs import read_pairs
from dpo_fast.rescore import rescore
from dpo_fast.run_folder import FAILED, SCORES, SCORES_URL, check_output, make_scores, open_scores, removed_if_empty
from dpo_fast.store import ScoreStore, part_name
from dpo_fast.types import LossSettings

__all__ = ["s3"]  # a fixture

SMALL = EvaluateOptions(part_size=2, token_budget=1000)  # three parts of the five rows


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_fake_bundle(tmp_path_factory.mktemp("bundle") / "bundle")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_rows(tmp_path_factory.mktemp("data") / "pairs.jsonl", ROWS)


@pytest.fixture(params=["folder", "memory", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        server: S3Server = request.getfixturevalue("s3")
        return f"{server.make_bucket()}/runs/one"
    return str(tmp_path / "shared" / "parts") if request.param == "folder" else f"memory://{uuid4().hex}/parts"


def files(store: ScoreStore) -> dict[str, bytes | None]:
    return {name: store.storage.read(name) for name in store.storage.names()}


def numbers(metrics: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in metrics.items() if key.startswith("eval_") or key in ("counts", "intervals")}


def test_a_run_with_its_parts_elsewhere_is_the_same_run(bundle: Path, dataset: str, tmp_path: Path, url: str) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    local = evaluate(bundle, dataset, here, SMALL, engine=FakeEngines())
    shutil.rmtree(os.environ["DPO_FAST_CACHE"])  # or the reference's scores would be found there
    make_scores(there, url)

    metrics = evaluate(bundle, dataset, there, SMALL, engine=FakeEngines())

    assert numbers(metrics) == numbers(local)
    assert files(open_scores(there)) == files(open_scores(here))
    assert sorted(path.name for path in there.iterdir()) == [METRICS, SCORES_URL, "skipped.jsonl"]
    assert (there / SCORES_URL).read_text() == f"{url}\n"

    # Everything that reads runs.
    settings = [LossSettings(beta=beta) for beta in (0.1, 0.5)]
    found, wanted = ({**rescore(run, settings), "run": None} for run in (there, here))
    assert {key: found[key] for key in ("results", "by_beta", "of_all")} == {
        key: wanted[key] for key in ("results", "by_beta", "of_all")
    }
    assert compare([here, there])["comparisons"][0]["eval_rewards/accuracies"]["difference"] == 0
    assert read_pairs(there).margins.tolist() == read_pairs(here).margins.tolist()
    again = evaluate(bundle, dataset, there, SMALL, engine=FakeEngines())
    assert again["provenance"]["this_process"]["scored_pairs"] == 0
    assert ScoresOfRun(there).knows("whatever")


def test_damage_elsewhere_is_found_and_mended(bundle: Path, dataset: str, tmp_path: Path, url: str) -> None:
    run = tmp_path / "run"
    store = make_scores(run, url)
    evaluate(bundle, dataset, run, SMALL, engine=FakeEngines())
    before = files(store)
    content = bytearray(before[part_name(1)] or b"")
    content[len(content) // 2] ^= 1
    store.storage.write(part_name(1), bytes(content))

    with pytest.raises(StorageError, match=r"part-00001\.parquet: is not what was written"):
        rescore(run, [LossSettings()])
    metrics = evaluate(bundle, dataset, run, SMALL, engine=FakeEngines())

    assert metrics["provenance"]["this_process"]["scored_pairs"] == 2
    assert files(store) == before


def test_shards_elsewhere_are_merged(bundle: Path, dataset: str, tmp_path: Path, url: str) -> None:
    whole = evaluate(bundle, dataset, tmp_path / "whole", SMALL, engine=FakeEngines())
    shards = [tmp_path / "shard1", tmp_path / "shard2"]
    for number, shard in enumerate(shards, start=1):
        make_scores(shard, f"{url}-{number}")
        evaluate(
            bundle, dataset, shard, EvaluateOptions(part_size=2, token_budget=1000, shard=(number, 2)),
            engine=FakeEngines(),
        )  # fmt: skip

    merged = merge(shards, tmp_path / "merged")

    assert numbers(merged) == numbers(whole)
    assert files(open_scores(tmp_path / "merged")) == files(open_scores(tmp_path / "whole"))


def test_a_run_begun_in_one_place_does_not_go_on_in_another(tmp_path: Path, url: str) -> None:
    run = tmp_path / "run"
    store = make_scores(run, url)
    assert make_scores(run, None).name == make_scores(run, f"{url}/").name == store.name == url

    with pytest.raises(OutputExistsError, match="was begun with its parts in ") as caught:
        make_scores(run, f"{url}-other")
    assert f"in {url}, and --scores is {url}-other; leave --scores out" in str(caught.value)
    assert open_scores(run).name == url


def test_a_run_begun_in_its_own_folder_stays_there(tmp_path: Path, url: str) -> None:
    run = tmp_path / "run"
    store = make_scores(run, None)
    assert (run / SCORES).is_dir()
    store.storage.write(part_name(0), b"a part")

    with pytest.raises(OutputExistsError, match="was begun with its parts in ") as caught:
        make_scores(run, url)
    assert f"in {run / SCORES}, and --scores is {url}" in str(caught.value)
    assert not (run / SCORES_URL).exists()


def test_its_own_folder_by_name_is_no_other_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    monkeypatch.chdir(tmp_path)
    for name in (str(run / SCORES), f"file://{run / SCORES}", f"run/{SCORES}"):
        assert make_scores(run, name).name == str(run / SCORES)
    assert not (run / SCORES_URL).exists()


def test_a_folder_is_kept_by_its_whole_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_scores(tmp_path / "run", "shared/../parts")
    assert (tmp_path / "run" / SCORES_URL).read_text() == f"{tmp_path / 'parts'}\n"
    assert (tmp_path / "parts").is_dir()


def test_a_place_that_refuses_leaves_nothing(tmp_path: Path, s3: S3Server) -> None:
    with pytest.raises(StorageError, match="no such bucket"):
        make_scores(tmp_path / "run", "s3://none-of-ours/run")
    with pytest.raises(UsageError, match="holds a password"):
        make_scores(tmp_path / "run", "s3://KEY:hidden@bucket/run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "text",
    ["s3://KEY:hidden@bucket/run", "nowhere://bucket/run", "s3://bucket/\x1b[2J", "memory://a?hidden", "\xff\x00"],
)
def test_a_damaged_pointer_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / SCORES_URL).write_bytes(text.encode("latin-1"))
    with pytest.raises(StorageError, match=r"scores\.url: is damaged \(.*write the parts' place") as caught:
        open_scores(tmp_path)
    assert "hidden" not in str(caught.value)
    assert str(caught.value).isprintable()


def test_an_unfinished_run_elsewhere_is_a_run(tmp_path: Path, url: str) -> None:
    make_scores(tmp_path / "run", url)
    check_output(tmp_path / "run", {}, overwrite=False)

    (tmp_path / "run" / METRICS).write_text('{"provenance": {"limit": 3}}')
    check_output(tmp_path / "run", {"limit": 3}, overwrite=False)
    with pytest.raises(OutputExistsError, match="holds a finished run with other limit"):
        check_output(tmp_path / "run", {"limit": 4}, overwrite=False)
    check_output(tmp_path / "run", {"limit": 4}, overwrite=True)


def test_overwriting_removes_the_parts_elsewhere(bundle: Path, dataset: str, tmp_path: Path, url: str) -> None:
    run = tmp_path / "run"
    store = make_scores(run, url)
    evaluate(bundle, dataset, run, SMALL, engine=FakeEngines())

    options = EvaluateOptions(part_size=2, token_budget=1000, limit=2, overwrite=True)
    evaluate(bundle, dataset, run, options, engine=FakeEngines())

    assert store.storage.names() == ["SHA256SUMS", part_name(0)]


def test_a_run_that_fails_at_once_leaves_nothing(bundle: Path, dataset: str, tmp_path: Path, url: str) -> None:
    run = tmp_path / "run"
    store = make_scores(run, url)

    def broken(*arguments: Any) -> Any:
        raise EngineOutputError("NaN")

    with pytest.raises(EngineOutputError):
        evaluate(bundle, dataset, run, SMALL, engine=broken)

    assert not run.exists()
    assert store.storage.names() == []


@pytest.mark.parametrize("fails", [True, False], ids=["a run that fails", "a plan"])
def test_folders_that_were_made_are_gone_and_those_that_were_there_stay(
    bundle: Path, dataset: str, tmp_path: Path, fails: bool
) -> None:
    (tmp_path / "there").mkdir()
    run, options = tmp_path / "there" / "a" / "b" / "run", replace(SMALL, scores=str(tmp_path / "shared" / "parts"))

    def broken(*arguments: Any) -> Any:
        raise EngineOutputError("NaN")

    if fails:
        with pytest.raises(EngineOutputError):
            evaluate(bundle, dataset, run, options, engine=broken)
    else:
        plan(bundle, dataset, run, options, engine=FakeEngines())

    assert list((tmp_path / "there").iterdir()) == []
    assert not (tmp_path / "shared").exists()


def test_a_run_whose_parts_all_failed_goes_on(tmp_path: Path, url: str) -> None:
    run = tmp_path / "run"
    make_scores(run, url)

    (run / FAILED).write_text('{"part": 0}\n')
    with pytest.raises(PartsFailedError), removed_if_empty(run, [run]):
        raise PartsFailedError("mend the cause, and run the same command again")

    check_output(run, {}, overwrite=False)
    assert open_scores(run).name == url


def test_what_is_written_already_stays(tmp_path: Path, url: str) -> None:
    run = tmp_path / "run"
    store = make_scores(run, url)
    store.storage.write(part_name(0), b"a part")

    with pytest.raises(KeyboardInterrupt), removed_if_empty(run, [run]):
        raise KeyboardInterrupt

    assert open_scores(run).parts() == [0]
