"""README's table names the families that are tested, with the layouts that are expected of them."""

from . import architecture_table
from .test_architectures import FAMILIES, TOLERANCE
from .test_tensorrt_families import WORSE


def test_the_readme_has_every_family_as_it_is_tested() -> None:
    _, table, _ = architecture_table.split((architecture_table.PROJECT / "README.md").read_text(encoding="utf-8"))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert {name: layout for name, layout, *_ in rows} == {name: family.layout for name, family in FAMILIES.items()}
    assert all(float(error) < TOLERANCE for _, _, error, *_ in rows)
    ratios = [float(ratio) for *_, ratios in rows for ratio in ratios.split(" / ")]
    assert max(ratios) <= WORSE


def test_a_table_by_hand() -> None:
    record = {
        "layout": "plain",
        "largest_error": 1.234e-6,
        "graph_bytes": 250_000,
        "plans": {"fp16": {"bytes": 3_140_000}, "bf16": {"bytes": 2_000_000}},
        "fp16": {"ours": 0.002, "theirs": 0.004},
        "bf16": {"ours": 0.03, "theirs": 0.04},
    }
    last = architecture_table.make_table({"mamba": record}).splitlines()[-1]
    assert last == "| mamba | plain | 1.2e-06 | 0.25 MB | 3.1 / 2.0 MB | 0.50 / 0.75 |"
