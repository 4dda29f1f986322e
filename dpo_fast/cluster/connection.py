"""A connection to a Ray cluster, or a cluster of this machine's own for as long as it is wanted."""

import logging
import os
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

from dpo_fast.cluster.options import ANY, AUTO, LOCAL
from dpo_fast.errors import CheckFailedError, MissingDependencyError, UsageError
from dpo_fast.text import named_line, said_by

CLIENT = "ray://"
CLIENT_TRIES = 3
ANSWER_SECONDS = 10.0
LOG_LEVEL = "RAY_BACKEND_LOG_LEVEL"
COLLECT = "collect"  # the name of threads that wait for Ray Data
HEAD = "node:__internal_head__"  # a resource that the head node alone has


@dataclass(frozen=True, slots=True)
class Node:
    """A machine of the cluster.

    Attributes:
        id: Ray's.
        host: its name.
        resources: amounts by Ray's names.
    """

    id: str
    host: str
    resources: Mapping[str, float]


@contextmanager
def connected(address: str) -> Iterator[str | None]:
    """Connect to a cluster, or start one; a connection that the process has already is used and left.

    Args:
        address: as in `ClusterOptions`.

    Yields:
        Where Ray's dashboard is, if it runs.

    Raises:
        MissingDependencyError: Ray is not installed.
        UsageError: no cluster answers.
        CheckFailedError: of the cluster, something was lost that the block cannot do without.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise MissingDependencyError("ray", "ray", "--cluster") from error

    with nullcontext() if ray.is_initialized() else _own_connection(address):
        try:
            yield _dashboard()
        except ray.exceptions.RayTaskError:  # a fault of the program, whose traceback it is
            raise
        except (ray.exceptions.RayError, ConnectionError) as error:
            raise CheckFailedError(
                f"--cluster {address}: a process that the run cannot do without was lost ({named_line(error)}); is "
                "there memory for it? What is finished is kept: run the same command again, without --overwrite, to "
                "go on"
            ) from error


@contextmanager
def _own_connection(address: str) -> Iterator[None]:
    """A connection that is ended again, and writes nothing to standard output.

    There, Ray tells of each process that is lost, and has no switch for it. Whatever is lost is repeated, or our own
    messages say what came of it.

    Raises:
        UsageError: no cluster answers.
    """
    import ray

    try:
        _connect(address)
    except Exception as error:
        raise UsageError(
            f"--cluster {address}: no Ray cluster answers ({said_by(error)}); start one with `ray start --head`, or "
            "say --cluster local"
        ) from error
    worker = ray._private.worker
    before, worker.print_to_stdstream = worker.print_to_stdstream, lambda *_, **__: None
    try:
        yield
    finally:
        _disconnect()
        worker.print_to_stdstream = before


def _connect(address: str) -> None:
    """Connect as `address` says.

    Raises:
        ConnectionError, or whatever else Ray says: nobody answers, or somebody with another version.
    """
    import ray

    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # it tells of each part that is lost; so do we
    if address not in (ANY, AUTO, LOCAL):
        host, _, port = address.removeprefix(CLIENT).rpartition(":")
        # Ray itself asks for minutes.
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS).close()
    if address.startswith(CLIENT):
        _init_client(address)
    elif address != ANY:
        _init(address)
    else:
        try:
            _init(AUTO)
        except ConnectionError:
            ray.shutdown()
            _init(LOCAL)


def _init_client(address: str) -> None:
    """Connect by Ray Client: its server forks a process for each client while its threads go on, and some die of that.

    Raises:
        ConnectionError: the server answers, but no process that it started came to live.
    """
    for tries_left in reversed(range(CLIENT_TRIES)):
        try:
            _init(address)
            break
        except ConnectionAbortedError as error:
            if not tries_left:  # of the server's traceback, which it sends whole, the last line is the reason
                raise ConnectionError(str(error).rstrip().rpartition("\n")[-1]) from error


def _init(address: str) -> None:
    """Call `ray.init`; what goes wrong is raised, so what Ray writes to standard error beside that is held back."""
    import ray

    sys.stderr.flush()
    kept = os.dup(2)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 2)
    before = os.environ.get(LOG_LEVEL)
    os.environ.setdefault(LOG_LEVEL, "fatal")  # of the part in C++, which has no other switch
    try:
        ray.init(address=address, log_to_driver=False, configure_logging=False)
    finally:
        if before is None:
            del os.environ[LOG_LEVEL]
        os.dup2(kept, 2)
        os.close(kept)
        os.close(silence)


def _disconnect() -> None:
    """End the connection, and what still waits for Ray Data, where a pass could not end that in time.

    Ray's functions connect by themselves where there is no connection, to whatever cluster there is; not these.
    """
    import ray
    from ray._private import auto_init_hook

    before, auto_init_hook.enable_auto_connect = auto_init_hook.enable_auto_connect, False
    try:
        ray.shutdown()
        for thread in threading.enumerate():
            if thread.name == COLLECT:
                thread.join(ANSWER_SECONDS)
    finally:
        auto_init_hook.enable_auto_connect = before


def nodes() -> list[Node]:
    """The machines that are there, the head first."""
    import ray

    found = [
        Node(node["NodeID"], node["NodeManagerHostname"], node["Resources"]) for node in ray.nodes() if node["Alive"]
    ]
    return sorted(found, key=lambda node: (HEAD not in node.resources, node.id))


def _dashboard() -> str | None:
    """Where Ray's dashboard is."""
    import ray

    try:
        return ray._private.worker.get_dashboard_url() or None
    except Exception:  # Ray Client has none of its own
        return None
