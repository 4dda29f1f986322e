"""README's table names the families that are tested, with the layouts that are expected of them."""

from . import architecture_table
from .test_architectures import FAMILIES, TOLERANCE


def test_the_readme_has_every_family_as_it_is_tested() -> None:
    _, table, _ = architecture_table.split((architecture_table.PROJECT / "README.md").read_text(encoding="utf-8"))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert {name: layout for name, layout, *_ in rows} == {name: family.layout for name, family in FAMILIES.items()}
    assert all(float(error) < TOLERANCE for _, _, error, _ in rows)


def test_a_table_by_hand() -> None:
    record = {"layout": "plain", "largest_error": 1.234e-6, "graph_bytes": 250_000}
    assert architecture_table.make_table({"mamba": record}).splitlines()[-1] == "| mamba | plain | 1.2e-06 | 0.25 MB |"
