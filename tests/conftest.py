"""What every test may use: a tiny policy and its reference, and the bundle exported from them, once a session."""

import atexit
import gc
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from traces import Traces

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test downloads anything
os.environ.setdefault("COMET_DISABLE_AUTO_LOGGING", "1")  # whoever is imported after Comet would tell it everything
if "DPO_FAST_TEST_TRACES" not in os.environ:  # pytest's other processes find it set
    os.environ["DPO_FAST_TEST_TRACES"] = tempfile.mkdtemp(prefix="dpo-fast-traces-")
    atexit.register(shutil.rmtree, os.environ["DPO_FAST_TEST_TRACES"], ignore_errors=True)
# A busy machine is no failure: a test's example may take its time, and so may making it up.
settings.register_profile("dpo_fast", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("dpo_fast")
gc.set_threshold(100_000, 50, 100)  # tracing makes objects by the million, and keeps most of them


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
def traced() -> "Traces":
    """`dpo_fast.export.graph.trace`, once for each architecture; see `traces`."""
    from traces import Traces

    return Traces()


@pytest.fixture(scope="session")
def remembered_traces(traced: "Traces") -> Iterator[None]:
    """Exports of this process take their traces from `traced`, from now on."""
    from dpo_fast.export import exporter

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporter, "trace", traced)
        yield


@pytest.fixture(scope="session")
def tiny_bundle(
    tiny_pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory, remembered_traces: None
) -> Path:
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
