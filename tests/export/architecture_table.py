"""README's table of architectures, from what the last test run measured.

python -m pytest tests/export/test_architectures.py && python tests/export/architecture_table.py
"""

import json
from pathlib import Path

PROJECT = Path(__file__).parents[2]
RECORDS = PROJECT / "build" / "architectures"
PLAN_RECORDS = PROJECT / "build" / "tensorrt"
BEGIN, END = "<!-- architectures: tests/export/architecture_table.py -->", "<!-- end of architectures -->"


def make_table(records: dict[str, dict[str, object]]) -> str:
    """A row a family: layout, largest error over all outputs, the graph's size."""
    lines = ["| family | layout | largest error | graph |", "|---|---|---|---|"]
    for name, record in sorted(records.items()):
        size = f"{record['graph_bytes'] / 1e6:.2f} MB"
        lines.append(f"| {name} | {record['layout']} | {record['largest_error']:.1e} | {size} |")
    return "\n".join(lines)


def split(readme: str) -> tuple[str, str, str]:
    """README before the table, the table, and README behind it."""
    before, _, rest = readme.partition(f"{BEGIN}\n")
    table, _, behind = rest.partition(f"\n{END}")
    return before, table.strip("\n"), behind


def main() -> None:
    """Put the table between its marks."""
    path = PROJECT / "README.md"
    before, _, behind = split(path.read_text(encoding="utf-8"))
    table = make_table({path.stem: json.loads(path.read_text(encoding="utf-8")) for path in RECORDS.glob("*.json")})
    path.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{behind}", encoding="utf-8")


if __name__ == "__main__":
    main()
