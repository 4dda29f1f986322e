"""What a node may lack, and workers that are not alike: found before any work, or before any number is believed."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from fake_engines import make_fake_bundle

from dpo_fast.cluster.evaluate import job_of
from dpo_fast.cluster.job import Job
from dpo_fast.cluster.look_around import SAME_EVERYWHERE, _look
from dpo_fast.cluster.outcome import Outcome
from dpo_fast.cluster.run import _put_together
from dpo_fast.errors import CheckFailedError, DatasetError
from dpo_fast.evaluation import EvaluateOptions, begin
from dpo_fast.provenance import versions
from dpo_fast.scoring import Account
from dpo_fast.store import ScoreStore
from dpo_fast.types import SkippedRow

HERE = versions(SAME_EVERYWHERE)


@pytest.fixture
def job(bundle: Path, dataset: str, tmp_path: Path) -> Iterator[Job]:
    with begin(bundle, dataset, tmp_path / "run", EvaluateOptions(part_size=100)) as evaluation:
        evaluation.store.storage.write(".marker", b"here")
        yield job_of(evaluation)


def test_all_is_well(job: Job) -> None:
    sight = _look(job, ".marker", HERE)
    assert sight.fault is None
    assert sight.fits


def test_paths_are_whole(bundle: Path, dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers have working folders of their own."""
    monkeypatch.chdir(bundle.parent)
    (bundle.parent / "pairs.jsonl").write_bytes(Path(dataset).read_bytes())
    with begin(Path(bundle.name), "pairs.jsonl", Path("run-here"), EvaluateOptions(part_size=100)) as evaluation:
        evaluation.store.storage.write(".marker", b"here")
        made = job_of(evaluation)
        monkeypatch.chdir(tmp_path)
        assert _look(made, ".marker", HERE).fault is None
        assert len(made.tokens.open_rows()) == 190


def test_the_bundle_is_not_there(job: Job, tmp_path: Path) -> None:
    fault = _look(replace(job, bundle=tmp_path / "gone"), ".marker", HERE).fault
    assert fault is not None
    assert fault.startswith(f"{tmp_path / 'gone'}: is not there; put the bundle on a folder that all nodes share")


def test_another_bundle_is_there(job: Job, tmp_path: Path) -> None:
    other = make_fake_bundle(tmp_path / "other", weights=b"others")
    fault = _look(replace(job, bundle=other), ".marker", HERE).fault
    assert fault is not None
    assert "is another bundle than on the driver's machine" in fault


def test_the_parts_folder_is_another_one(job: Job, tmp_path: Path) -> None:
    """A folder of that name may be there all the same: what counts is what the driver wrote into it."""
    (tmp_path / "scores").mkdir()
    fault = _look(replace(job, store=ScoreStore(tmp_path / "scores")), ".marker", HERE).fault
    assert fault is not None
    assert fault.startswith(f"does not see {tmp_path / 'scores'}; name an --output that all nodes share")
    assert "--scores s3://" in fault


def test_other_versions(job: Job) -> None:
    """Of what makes the tokens, too."""
    for name in ("numpy", "tokenizers", "transformers", "datasets"):
        fault = _look(job, ".marker", HERE | {name: "1.0"}).fault
        assert fault == f"has other versions than the driver's machine: {name} {HERE[name]} (not 1.0); install the same"


def test_a_name_of_a_data_set_that_no_file_can_have(bundle: Path, tmp_path: Path) -> None:
    options = EvaluateOptions(part_size=100)
    with begin(bundle, "a" * 5000, tmp_path / "run", options) as evaluation, pytest.raises(DatasetError, match="name"):
        job_of(evaluation)


def test_workers_with_different_engines(job: Job) -> None:
    outcomes = {part: Outcome(part, str(part), f"host{part}", f"engine 1.{part}", "fp32") for part in job.parts}
    with pytest.raises(CheckFailedError, match=r"engine 1\.0 fp32 on host0; engine 1\.1 fp32 on host1"):
        _put_together(job, outcomes)


def test_what_workers_say_is_added_up(job: Job) -> None:
    """Skipped rows in the order of the parts, whoever came first."""
    outcomes = {
        1: Outcome(1, "b", "host", "e", "p", Account(skipped=[SkippedRow(150, "empty")], scored_pairs=89, engines=1.5)),
        0: Outcome(0, "a", "host", "e", "p", Account(skipped=[SkippedRow(18, "empty")], scored_pairs=99, engines=0.5)),
    }
    outcomes = {part: Outcome.from_json(outcome.to_json()) for part, outcome in outcomes.items()}

    scores = _put_together(job, outcomes)

    assert [row.row for row in scores.account.skipped] == [18, 150]
    assert (scores.account.scored_pairs, scores.account.engines) == (188, 2.0)
    assert [(worker["parts"], worker["scored_pairs"]) for worker in scores.workers] == [(1, 99), (1, 89)]
    assert scores.failed == []
