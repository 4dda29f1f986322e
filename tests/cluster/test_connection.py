"""A connection that does not come about at once, or not at all."""

import socket
from typing import Any

import pytest
import ray

from dpo_fast.cluster.connection import connected
from dpo_fast.errors import UsageError

FROM_SERVER = (
    "Initialization failure from server:\nTraceback (most recent call last):\n"
    '  File "/ray/util/client/server/proxier.py", line 772, in Datapath\n    raise RuntimeError(\n'
    "RuntimeError: Starting Ray client server failed. See ray_client_server_23000.err for detailed logs.\n"
)


@pytest.fixture
def errors() -> list[Exception]:
    """What Ray raises, one after another, until it connects."""
    return []


@pytest.fixture
def tries(monkeypatch: pytest.MonkeyPatch, errors: list[Exception]) -> list[str]:
    """The addresses that were tried."""
    made: list[str] = []

    def init(address: str, **options: Any) -> None:
        made.append(address)
        if errors:
            raise errors.pop(0)

    monkeypatch.setattr(socket, "create_connection", lambda *_: socket.socket())
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    return made


def test_a_client_whose_process_dies_as_it_begins_asks_again(errors: list[Exception], tries: list[str]) -> None:
    errors += [ConnectionAbortedError(FROM_SERVER)] * 2
    with connected("ray://127.0.0.1:10001"):
        assert tries == ["ray://127.0.0.1:10001"] * 3


def test_what_a_server_says_is_the_end_of_its_traceback(errors: list[Exception], tries: list[str]) -> None:
    errors += [ConnectionAbortedError(FROM_SERVER)] * 4
    with pytest.raises(UsageError) as caught, connected("ray://127.0.0.1:10001"):
        pass
    assert str(caught.value) == (
        "--cluster ray://127.0.0.1:10001: no Ray cluster answers (RuntimeError: Starting Ray client server failed. See "
        "ray_client_server_23000.err for detailed logs.); start one with `ray start --head`, or say --cluster local"
    )
    assert len(tries) == 3


def test_what_answers_with_another_error_is_not_asked_again(errors: list[Exception], tries: list[str]) -> None:
    errors += [RuntimeError("Version mismatch: The cluster was started with: Ray: 1.0")]
    with pytest.raises(UsageError, match=r"no Ray cluster answers \(Version mismatch"), connected("ray://localhost:1"):
        pass
    assert tries == ["ray://localhost:1"]
