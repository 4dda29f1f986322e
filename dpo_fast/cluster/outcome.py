"""What a worker says of a part, as a row of Ray Data's."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from dpo_fast.scoring import Account
from dpo_fast.types import SkippedRow


@dataclass(slots=True)
class Outcome:
    """What came of one part.

    Attributes:
        part: its number.
        worker, host: who had it last, and where.
        engine, precision: that scored it.
        account: what the time went to, over all stages.
        reason: why it failed, or None.
        is_fatal: whether every other part would fail for the same reason, since the user's input is at fault.
    """

    part: int
    worker: str = ""
    host: str = ""
    engine: str = ""
    precision: str = ""
    account: Account = field(default_factory=Account)
    reason: str | None = None
    is_fatal: bool = False

    def to_json(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Outcome":
        """The reverse of `to_json`."""
        values: dict[str, Any] = json.loads(text)
        account = values["account"]
        skipped = [SkippedRow(**row) for row in account["skipped"]]
        return cls(**values | {"account": Account(**account | {"skipped": skipped})})
