"""Whoever scores, the parts are the same, byte for byte, and so are the metrics."""

from pathlib import Path
from typing import Any

import pytest

from dpo_fast.cluster.options import ClusterOptions
from dpo_fast.errors import InputError
from dpo_fast.evaluate import EvaluateOptions, evaluate

from .compare import files, numbers
from .engines import SlowEngines, open_fake
from .nodes import Nodes

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("workers", "engines"), [(1, "together"), (2, "together"), (4, "together"), (2, "apart"), (3, "apart")]
)
def test_workers(
    nodes: Nodes, bundle: Path, dataset: str, local: Path, tmp_path: Path, workers: int, engines: Any
) -> None:
    cluster = ClusterOptions(nodes.address, workers=workers, resources={"CPU": 0.5})
    options = EvaluateOptions(part_size=8, on_error="skip", cluster=cluster, engines=engines)

    metrics = evaluate(bundle, dataset, tmp_path / "run", options, engine=open_fake)

    assert files(tmp_path / "run") == files(local)
    assert numbers(tmp_path / "run") == numbers(local)
    provenance = metrics["provenance"]
    assert provenance["engines"] == engines
    whole = [worker["parts"] for worker in provenance["cluster"]["workers"]]
    assert sum(whole) == 24
    assert len(whole) <= workers
    assert provenance["this_process"]["scored_pairs"] == 188
    assert provenance["this_process"]["pairs_with_known_reference_scores"] == 0


def test_a_driver_that_is_no_node_says_what_is_wrong_in_one_line(
    nodes: Nodes, bundle: Path, dataset: str, tmp_path: Path
) -> None:
    """What was raised in the cluster, without Ray's traceback around it."""
    nodes.restore(3)
    cluster = ClusterOptions(f"ray://127.0.0.1:{nodes.client_port}", workers=2)
    options = EvaluateOptions(part_size=8, on_error="stop", cluster=cluster)

    with pytest.raises(InputError, match=r"^row (18|101): '(chosen|rejected)' is empty: fill it in") as caught:
        evaluate(bundle, dataset, tmp_path / "run", options, engine=open_fake)
    assert str(caught.value).isprintable()


def test_a_driver_that_is_no_node(nodes: Nodes, bundle: Path, dataset: str, local: Path, tmp_path: Path) -> None:
    """By Ray Client: what hands out the parts runs in the cluster, and what it says is heard here."""
    nodes.restore(3)
    orders, said = tmp_path / "orders", list[str]()
    orders.mkdir()
    (orders / "fail.json").write_text('{"do": "fail"}')
    cluster = ClusterOptions(f"ray://127.0.0.1:{nodes.client_port}", workers=2)
    options = EvaluateOptions(part_size=8, on_error="skip", cluster=cluster)

    evaluate(bundle, dataset, tmp_path / "run", options, said.append, engine=SlowEngines(orders))

    assert said[-1] == "parts that failed or were lost, and are handed out again: 1"

    assert files(tmp_path / "run") == files(local)
    assert numbers(tmp_path / "run") == numbers(local)
