"""What the export's tests share."""

from pathlib import Path

import pytest
from fake_engines import ROWS, write_rows


@pytest.fixture(scope="session", autouse=True)
def traced_once(remembered_traces: None) -> None:
    """No architecture is traced twice."""


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    """A few pairs in a file."""
    return write_rows(tmp_path / "pairs.jsonl", ROWS)
