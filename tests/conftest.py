"""What every test may use: a tiny policy and its reference, and the bundle exported from them, once a session."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test downloads anything


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of each test's own: nothing that another test computed is found, and the user's stays as it is."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("DPO_FAST_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folders of a tiny Llama policy and its reference. Read only: copy them before changing anything."""
    from tiny_models import make_pair

    return make_pair(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_bundle(tiny_pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle exported from `tiny_pair`. Read only: copy it before changing anything."""
    from tiny_models import write_recipe

    from dpo_fast.export.exporter import ExportOptions, export

    folder = tmp_path_factory.mktemp("tiny_bundle")
    policy, reference = tiny_pair
    return export(str(policy), str(reference), folder / "bundle", ExportOptions(recipe=str(write_recipe(folder))))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Models this small only lose by sharing the work."""
    from dpo_fast.demo_training import one_thread

    with one_thread():
        yield
