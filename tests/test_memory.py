"""What fits into memory, of the machine and of the container."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from fake_engines import make_fake_bundle

from dpo_fast import memory
from dpo_fast.bundle import POLICY, REFERENCE, ROLES, Bundle, open_bundle
from dpo_fast.memory import BYTES_PER_PARAMETER, SHARE, available_memory, fit_together

GIB = 1 << 30


def with_models(bundle: Bundle, **changes: Mapping[str, object]) -> Bundle:
    """The bundle with other entries, by role."""
    models = {role: replace(entry, **changes[role]) for role, entry in bundle.manifest.models.items()}
    return replace(bundle, manifest=replace(bundle.manifest, models=models))


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """A policy of a million parameters and a reference of two."""
    opened = open_bundle(make_fake_bundle(tmp_path / "bundle"))
    return with_models(opened, policy={"parameters": 1_000_000}, reference={"parameters": 2_000_000})


def available(monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: size)


def test_two_models_fit_together_if_there_is_room_for_both(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = 3_000_000 * BYTES_PER_PARAMETER / SHARE
    available(monkeypatch, needed + 1)
    assert fit_together(bundle, ROLES)
    available(monkeypatch, needed - 1)
    assert not fit_together(bundle, ROLES)


@pytest.mark.parametrize("role", ROLES)
def test_one_model_alone_has_no_choice(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, role: str) -> None:
    available(monkeypatch, 0)

    assert fit_together(bundle, [role])


def test_roles_that_share_a_graph_share_its_memory(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter and its base: one engine, whatever room there is."""
    available(monkeypatch, 0)
    graph = bundle.manifest.models[POLICY].engine_graph
    shared = with_models(bundle, policy={}, reference={"engine_graph": graph})

    assert not fit_together(bundle, ROLES)
    assert fit_together(shared, ROLES)
    # It is the graph that the engine runs, which may be another than the exact one.
    assert not fit_together(with_models(bundle, policy={"graph": "same"}, reference={"graph": "same"}), ROLES)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 8 GiB available, and no container; the folder is for the container's files."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=8 * GIB))
    monkeypatch.setattr(memory, "CGROUP", tmp_path / "cgroup")
    (tmp_path / "cgroup").mkdir()
    return tmp_path / "cgroup"


def write_cgroup(folder: Path, *, limit: str, used: int, inactive_file: int) -> None:
    """As the kernel writes them (Documentation/admin-guide/cgroup-v2.rst)."""
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    statistics = {"anon": used - inactive_file, "file": inactive_file, "inactive_file": inactive_file, "active_file": 0}
    (folder / "memory.stat").write_text("".join(f"{name} {value}\n" for name, value in statistics.items()))


def test_a_machine_without_containers(machine: Path) -> None:
    assert available_memory() == 8 * GIB


def test_a_container_with_a_limit(machine: Path) -> None:
    """4 GiB, of which 1 is used: 3 are left, and the half that only holds files that were read can be had too."""
    write_cgroup(machine, limit=str(4 * GIB), used=GIB, inactive_file=GIB // 2)

    assert available_memory() == 3 * GIB + GIB // 2


def test_a_container_that_may_take_more_than_there_is(machine: Path) -> None:
    write_cgroup(machine, limit=str(64 * GIB), used=GIB, inactive_file=0)

    assert available_memory() == 8 * GIB


def test_a_container_without_a_limit(machine: Path) -> None:
    write_cgroup(machine, limit="max", used=GIB, inactive_file=0)

    assert available_memory() == 8 * GIB


@pytest.mark.parametrize("name", ["memory.max", "memory.current", "memory.stat"])
@pytest.mark.parametrize("content", [None, "", "\n", "many", "inactive_file", "inactive_file 1 2"])
def test_files_that_say_nothing(machine: Path, name: str, content: str | None) -> None:
    write_cgroup(machine, limit=str(4 * GIB), used=GIB, inactive_file=0)
    if content is None:
        (machine / name).unlink()
    else:
        (machine / name).write_text(content)

    assert available_memory() == 8 * GIB


def test_this_machine_has_some() -> None:
    assert 0 < available_memory() <= psutil.virtual_memory().total


def test_the_roles_of_a_bundle_without_a_reference(tmp_path: Path) -> None:
    alone = open_bundle(make_fake_bundle(tmp_path / "alone", reference=False))

    assert fit_together(alone, [POLICY])
    assert REFERENCE not in alone.manifest.models


def on_a_gpu(bundle: Bundle, plans: dict[str, int] | None = None) -> Bundle:
    """The bundle with a recipe for a GPU, and with plans of so many bytes."""
    manifest = replace(bundle.manifest, recipe={**bundle.manifest.recipe, "engine": "tensorrt-rtx"})
    files = dict(manifest.files)
    for role, size in (plans or {}).items():
        files[f"engines/r/{role}.json"] = {"bytes": 0, "sha256": ""}
        files[f"engines/r/{role}.body.plan"] = {"bytes": size, "sha256": ""}
    made = replace(bundle, manifest=replace(manifest, files=files))
    named = {role: {"plan": f"engines/r/{role}.json"} for role in plans or {}}
    return with_models(made, **{role: named.get(role, {}) for role in ROLES})


def test_on_a_gpu_its_own_memory_counts(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    available(monkeypatch, 0)  # of the machine, which is not asked
    with_plans = on_a_gpu(bundle, {POLICY: 600, REFERENCE: 300})
    for free, fits in ((1000, True), (999, False), (None, True)):
        monkeypatch.setattr(memory, "available_device_memory", lambda free=free: free)
        assert fit_together(with_plans, ROLES) == fits
    needed = 3_000_000 * memory.DEVICE_BYTES_PER_PARAMETER
    for free, fits in ((needed / SHARE + 1, True), (needed / SHARE - 1, False)):
        monkeypatch.setattr(memory, "available_device_memory", lambda free=free: free)
        assert fit_together(on_a_gpu(bundle), ROLES) == fits


def test_what_the_driver_says_is_free(tmp_path: Path) -> None:
    command = tmp_path / "nvidia-smi"

    def answer(text: str, code: int = 0) -> int | None:
        command.write_text(f"#!/bin/sh\nprintf '{text}'\nexit {code}\n", encoding="utf-8")
        command.chmod(0o755)
        return memory.available_device_memory(str(command))

    assert answer("1024\\n81000\\n") == 81000 * 2**20
    assert answer("[N/A]") is None
    assert answer("", 9) is None
    assert memory.available_device_memory(str(tmp_path / "none")) is None
