"""README's table of architectures, from what the last test run measured.

python -m pytest tests/export/test_architectures.py tests/export/test_tensorrt_families.py
python tests/export/architecture_table.py
"""

import json
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).parents[2]
RECORDS = PROJECT / "build" / "architectures"
PLAN_RECORDS = PROJECT / "build" / "tensorrt"
BEGIN, END = "<!-- architectures: tests/export/architecture_table.py -->", "<!-- end of architectures -->"


def make_table(records: dict[str, dict[str, Any]]) -> str:
    """A row a family: layout, largest error over all outputs, sizes of graph and plans, and what half precision costs.

    Args:
        records: by family; of `RECORDS`, with what `PLAN_RECORDS` has of it under "plans", "fp16" and "bf16".
    """
    lines = [
        "| family | layout | largest error | graph | plans, fp16 / bf16 | error over PyTorch's, fp16 / bf16 |",
        "|---|---|---|---|---|---|",
    ]
    for name, record in sorted(records.items()):
        size = f"{record['graph_bytes'] / 1e6:.2f} MB"
        plans = " / ".join(f"{record['plans'][half]['bytes'] / 1e6:.1f}" for half in ("fp16", "bf16"))
        errors = " / ".join(f"{record[half]['ours'] / record[half]['theirs']:.2f}" for half in ("fp16", "bf16"))
        lines.append(
            f"| {name} | {record['layout']} | {record['largest_error']:.1e} | {size} | {plans} MB | {errors} |"
        )
    return "\n".join(lines)


def read_records() -> dict[str, dict[str, Any]]:
    """What was measured of each family."""
    records = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in RECORDS.glob("*.json")}
    for name, record in records.items():
        for what in ("plans", "fp16", "bf16"):
            record[what] = json.loads((PLAN_RECORDS / f"{name}.{what}.json").read_text(encoding="utf-8"))
    return records


def split(readme: str) -> tuple[str, str, str]:
    """README before the table, the table, and README behind it."""
    before, _, rest = readme.partition(f"{BEGIN}\n")
    table, _, behind = rest.partition(f"\n{END}")
    return before, table.strip("\n"), behind


def main() -> None:
    """Put the table between its marks."""
    path = PROJECT / "README.md"
    before, _, behind = split(path.read_text(encoding="utf-8"))
    path.write_text(f"{before}{BEGIN}\n\n{make_table(read_records())}\n\n{END}{behind}", encoding="utf-8")


if __name__ == "__main__":
    main()
