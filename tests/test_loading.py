"""Engines are loaded in the background, once a graph, and let go of on request."""

import gc
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from fake_engines import FakeEngine, FakeEngines, make_fake_bundle

from dpo_fast.bundle import POLICY, REFERENCE, ROLES, Bundle, open_bundle
from dpo_fast.errors import BundleError
from dpo_fast.loading import Engines

TIMEOUT = 60  # seconds, after which a thread that should have come this far never will


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """A policy and a reference, a graph each."""
    return open_bundle(make_fake_bundle(tmp_path / "bundle"))


@pytest.fixture
def adapter(bundle: Bundle) -> Bundle:
    """A policy that is an adapter of its reference: one graph, in which gates turn the adapter on or off."""
    models = {
        role: replace(entry, engine_graph="policy.onnx", adapter_gates=[gate])
        for (role, entry), gate in zip(bundle.manifest.models.items(), (1.0, 0.0), strict=True)
    }
    return replace(bundle, manifest=replace(bundle.manifest, models=models))


def test_each_graph_is_loaded_once(bundle: Bundle) -> None:
    opened: list[str] = []
    engines = Engines(bundle, lambda _, role: opened.append(role) or FakeEngine(role))
    engines.load(POLICY)
    for _ in range(2):
        found = [engines.get(role) for role in ROLES]
        for role in ROLES:
            engines.load(role)
        assert [engine.salt for engine in found] == [POLICY, REFERENCE]
        assert [engines.get(role) for role in ROLES] == found
    engines.close()

    assert opened == [POLICY, REFERENCE]


def test_loading_goes_on_in_the_background_both_at_once(bundle: Bundle) -> None:
    """Each waits until the other is being loaded, and nobody waits for either until it is asked for."""
    begun = {role: threading.Event() for role in ROLES}
    asked = threading.Event()

    def open_one(_: Bundle, role: str) -> FakeEngine:
        begun[role].set()
        assert all(event.wait(TIMEOUT) for event in (*begun.values(), asked))
        return FakeEngine(role)

    engines = Engines(bundle, open_one)
    for role in ROLES:
        engines.load(role)
    asked.set()

    assert [engines.get(role).salt for role in ROLES] == [POLICY, REFERENCE]
    engines.close()


def test_roles_of_one_graph_share_its_engine(adapter: Bundle) -> None:
    opened = FakeEngines()
    engines = Engines(adapter, opened)

    policy, reference = engines.get(POLICY), engines.get(REFERENCE)
    engines.close()

    assert set(opened.engines) == {POLICY}
    assert policy is opened.engines[POLICY]
    assert reference.salt == "policy with [0.0]"


def test_whoever_of_them_comes_first_loads_it(adapter: Bundle) -> None:
    opened = FakeEngines()
    engines = Engines(adapter, opened)
    engines.load(REFERENCE)

    policy, reference = engines.get(POLICY), engines.get(REFERENCE)
    engines.close()

    assert set(opened.engines) == {REFERENCE}
    assert policy.salt == "reference with [1.0]"
    assert reference.salt == "reference"


def test_what_is_released_is_gone_and_is_loaded_again(bundle: Bundle) -> None:
    """Between two passes only one model may be in memory."""
    opened: list[str] = []
    engines = Engines(bundle, lambda _, role: opened.append(role) or FakeEngine(role))
    held = weakref.ref(engines.get(REFERENCE))

    engines.release()
    gc.collect()

    assert held() is None
    assert engines.get(POLICY).salt == POLICY
    assert engines.get(REFERENCE).salt == REFERENCE
    assert opened == [REFERENCE, POLICY, REFERENCE]
    engines.close()


def test_the_first_role_is_forgotten_with_its_engine(adapter: Bundle) -> None:
    opened: list[str] = []
    engines = Engines(adapter, lambda _, role: opened.append(role) or FakeEngine(role))
    engines.get(POLICY)
    engines.release()

    assert engines.get(REFERENCE).salt == "reference"
    assert engines.get(POLICY).salt == "reference with [1.0]"
    assert opened == [POLICY, REFERENCE]
    engines.close()


def test_an_error_is_raised_where_the_engine_is_wanted(bundle: Bundle) -> None:
    def open_one(_: Bundle, role: str) -> FakeEngine:
        if role == REFERENCE:
            raise BundleError("no graph")
        return FakeEngine(role)

    engines = Engines(bundle, open_one)
    for role in ROLES:
        engines.load(role)

    for _ in range(2):
        with pytest.raises(BundleError, match="no graph"):
            engines.get(REFERENCE)
    assert engines.get(POLICY).salt == POLICY
    engines.close()


@pytest.mark.parametrize("stop", [Engines.close, Engines.release])
def test_an_engine_that_is_still_loading_is_not_kept(bundle: Bundle, stop: Callable[[Engines], None]) -> None:
    begun, go_on = threading.Event(), threading.Event()
    loaded: list[weakref.ref[FakeEngine]] = []

    def open_one(_: Bundle, role: str) -> FakeEngine:
        begun.set()
        assert go_on.wait(TIMEOUT)
        engine = FakeEngine(role)
        loaded.append(weakref.ref(engine))
        return engine

    before = set(threading.enumerate())
    engines = Engines(bundle, open_one)
    engines.load(POLICY)
    assert begun.wait(TIMEOUT)
    stopping = threading.Thread(target=stop, args=(engines,))
    stopping.start()
    go_on.set()
    stopping.join(TIMEOUT)
    engines.close()
    gc.collect()

    assert [engine() for engine in loaded] == [None]
    assert set(threading.enumerate()) == before


def test_nothing_is_loaded_that_nobody_asked_for(bundle: Bundle) -> None:
    opened = FakeEngines()
    engines = Engines(bundle, opened)
    engines.release()
    engines.close()

    assert opened.engines == {}


def test_the_recipe_s_engine_is_the_default(bundle: Bundle) -> None:
    """A fake bundle's graph is none, which the real engine says."""
    engines = Engines(bundle)

    with pytest.raises(BundleError, match=r"policy\.onnx: ONNX Runtime cannot load it"):
        engines.get(POLICY)
    engines.close()
