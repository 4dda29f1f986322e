"""A cluster of several nodes on this machine, and what its workers score."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_engines import make_fake_bundle, write_rows
from s3_server import S3Server, s3_server

from dpo_fast.evaluate import EvaluateOptions, evaluate

from .engines import open_fake
from .nodes import Nodes

RARE = "€"  # no other row has it


@pytest.fixture(scope="session")
def object_store() -> Iterator[S3Server]:
    """An S3-compatible server; what leads there is set for the nodes, and for tests that say so."""
    before = dict(os.environ)
    with s3_server() as server:
        for name in server.environment:
            del os.environ[name]
        os.environ.update({name: before[name] for name in server.environment if name in before})
        yield server


@pytest.fixture(scope="session")
def nodes(object_store: S3Server) -> Iterator[Nodes]:
    """A head, which runs no worker, and three nodes of one CPU each: the one cluster of this process."""
    made = Nodes(3, object_store.environment)
    yield made
    made.shutdown()


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_fake_bundle(tmp_path_factory.mktemp("bundle") / "bundle")


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Rows for 24 parts of 8, two of which cannot be used."""
    rows: list[dict[str, Any]] = [
        {"prompt": f"Question {i}?", "chosen": f" Yes, {i}." * (1 + i % 3), "rejected": f" No {i * 7}."}
        for i in range(190)
    ]
    rows[17]["chosen"] = rows[100]["rejected"] = ""
    rows[188]["prompt"] = f"How much is {RARE}5?"
    return write_rows(tmp_path_factory.mktemp("data") / "pairs.jsonl", rows)


@pytest.fixture(scope="session")
def local(bundle: Path, dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("local")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DPO_FAST_CACHE", str(folder / "cache"))
        evaluate(bundle, dataset, folder / "run", EvaluateOptions(part_size=8, on_error="skip"), engine=open_fake)
    return folder / "run"


@pytest.fixture
def known_tokens(local: Path, own_cache: Path) -> None:
    """The tokens of the rows are in the cache, as after another run: workers need not load a tokenizer."""
    shutil.copytree(local.parent / "cache" / "tokens", own_cache / "tokens")
