"""Engines of workers: importable where Ray runs them, and told what to do through files."""

import json
import os
import time
from pathlib import Path

from fake_engines import FakeEngine

from dpo_fast.batches import Batch
from dpo_fast.bundle import REFERENCE, Bundle
from dpo_fast.types import TokenScores


def open_fake(bundle: Bundle, role: str) -> FakeEngine:
    """The fake engine of a role."""
    return FakeEngine(salt=role)


class SlowEngine(FakeEngine):
    """A fake engine that takes its time, so that there is time for something to happen.

    Attributes:
        folder: where orders lie: JSON files that one worker takes each, by renaming them. {"do": "slow"}: be ten times
            slower from now on; {"do": "hang"}: never come back; {"do": "die"}: end the process; {"do": "fail"}: fail
            this once.
    """

    def __init__(self, role: str, folder: Path, seconds: float) -> None:
        super().__init__(salt=role)
        self.folder, self.seconds = folder, seconds

    def score(self, batch: Batch) -> TokenScores:
        time.sleep(self.seconds)
        for order in sorted(self.folder.glob("*.json")):
            taken = order.with_suffix(f".{os.getpid()}")
            try:
                order.rename(taken)
            except FileNotFoundError:  # by another worker
                continue
            match json.loads(taken.read_text())["do"]:
                case "slow":
                    self.seconds *= 10
                case "hang":
                    time.sleep(3600)
                case "die":
                    os._exit(1)
                case "fail":
                    raise RuntimeError("out of memory")
        return super().score(batch)


class SlowEngines:
    """Opens slow engines; it can be pickled."""

    def __init__(self, folder: Path, seconds: float = 0.02) -> None:
        self.folder, self.seconds = folder, seconds

    def __call__(self, bundle: Bundle, role: str) -> FakeEngine:
        return SlowEngine(role, self.folder, self.seconds)


class NotOnThatNode:
    """Opens no engine on the node that is the first to ask for one, as where another process has the GPU's memory.

    Or it `opens`, and fails whatever it is given, as where the GPU is broken, until its process ends after so many
    failures. The engines of other nodes take some seconds for a batch.
    """

    def __init__(
        self, folder: Path, *, opens: bool = False, failures: int | None = None, seconds: float = 0.02
    ) -> None:
        self.folder, self.opens, self.failures, self.seconds = folder, opens, failures, seconds

    def __call__(self, bundle: Bundle, role: str) -> FakeEngine:
        import ray

        node = ray.get_runtime_context().get_node_id()
        try:
            with (self.folder / "node").open("x") as file:
                file.write(node)
        except FileExistsError:
            time.sleep(0.5)  # it may not be written yet
        if (self.folder / "node").read_text() != node:
            return SlowEngine(role, self.folder, self.seconds)
        if self.opens:
            return BrokenEngine(role, self.failures)
        raise RuntimeError("out of memory")


class BrokenEngine(FakeEngine):
    """Fails whatever it is given, and ends its process after so many failures."""

    def __init__(self, salt: str, failures: int | None) -> None:
        super().__init__(salt)
        self.failures = failures

    def score(self, batch: Batch) -> TokenScores:
        if self.failures == 0:
            os._exit(1)
        if self.failures is not None:
            self.failures -= 1
        raise RuntimeError("device lost")


def dies(bundle: Bundle, role: str) -> FakeEngine:
    """The process ends, as where an engine takes more memory than there is."""
    os._exit(1)


def open_policy_alone(bundle: Bundle, role: str) -> FakeEngine:
    """The fake engine of the policy; there is none of the reference."""
    if role == REFERENCE:
        raise RuntimeError("nobody needs the reference's engine")
    return FakeEngine(salt=role)


class BadPart:
    """Opens engines that cannot stand a token: they say NaN of it, or end the process."""

    def __init__(self, token: int, *, dies: bool) -> None:
        self.token, self.dies = token, dies

    def __call__(self, bundle: Bundle, role: str) -> FakeEngine:
        return BadPartEngine(role, self.token, self.dies)


class BadPartEngine(FakeEngine):
    """See `BadPart`."""

    def __init__(self, role: str, token: int, dies: bool) -> None:
        super().__init__(salt=role)
        self.token, self.dies = token, dies

    def score(self, batch: Batch) -> TokenScores:
        scores = super().score(batch)
        if (batch.input_ids == self.token).any():
            if self.dies:
                os._exit(1)
            scores.log_prob[0] = float("nan")
        return scores
