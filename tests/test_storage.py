"""Where parts lie: whole or not there, on whatever storage, however often that fails."""

import errno
import multiprocessing
import os
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from uuid import uuid4

import aiohttp
import boto3
import botocore.exceptions
import fsspec
import httpcore
import pytest
import requests
import urllib3
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st
from s3_server import S3Server, s3
from s3fs import S3FileSystem

from dpo_fast import remote
from dpo_fast import storage as storage_module
from dpo_fast.errors import MissingDependencyError, StorageError, UsageError
from dpo_fast.remote import ATTEMPTS, may_pass, retrying
from dpo_fast.storage import LocalFolder, Storage, UrlStorage, check_url, open_storage

__all__ = ["s3"]  # a fixture

BUSY, FULL = OSError(errno.EBUSY, "slow down"), OSError(errno.ENOSPC, "no room")


class FailingFiles(MemoryFileSystem):
    """A file system, not an object store, whose calls fail as `faults` has it: by the call's number, from 0.

    "before" fails before the call does anything, "after" when it is done, "half" writes or reads a half and fails.
    """

    protocol = "failing"
    faults: ClassVar[dict[int, str]] = {}
    error: Exception = BUSY
    calls = 0

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return MemoryFileSystem._strip_protocol(str(path).removeprefix("failing://"))

    def _faulty(self, action: Callable[[], Any], half: Callable[[], Any] = lambda: None) -> Any:
        cls = FailingFiles
        fault = cls.faults.get(cls.calls)
        cls.calls += 1
        if fault == "before":
            raise cls.error
        if fault == "half":
            half()
            raise cls.error
        result = action()
        if fault == "after":
            raise cls.error
        return result

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        base = super()
        self._faulty(
            lambda: base.pipe_file(path, value, mode), lambda: base.pipe_file(path, value[: len(value) // 2], mode)
        )

    def cat_file(self, path: str, start: Any = None, end: Any = None, **options: Any) -> bytes:
        base = super()
        return self._faulty(lambda: base.cat_file(path, start, end))

    def mv(self, path1: str, path2: str, **options: Any) -> None:
        def move() -> None:
            source, target = self._strip_protocol(path1), self._strip_protocol(path2)
            self.store[target] = self.store.pop(source)  # as rename has it, not as a copy that is then removed

        self._faulty(move)

    def ls(self, path: str, detail: bool = True, **options: Any) -> Any:
        base = super()
        return self._faulty(lambda: base.ls(path, detail))


fsspec.register_implementation("failing", FailingFiles, clobber=True)


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that would have been waited."""
    waited: list[float] = []
    monkeypatch.setattr(remote, "time", SimpleNamespace(sleep=waited.append))
    return waited


@pytest.fixture(autouse=True)
def no_faults() -> Iterator[None]:
    yield
    FailingFiles.faults, FailingFiles.error, FailingFiles.calls = {}, BUSY, 0


@pytest.fixture(params=["folder", "memory", "failing", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "folder":
        return open_storage(tmp_path / "run" / "scores")
    if request.param == "s3":
        server: S3Server = request.getfixturevalue("s3")
        return open_storage(f"{server.make_bucket()}/run/scores")
    return open_storage(f"{request.param}://{uuid4().hex}/scores")


# What all of them do.


def test_what_was_written_is_read(storage: Storage) -> None:
    assert storage.read("a") is None
    assert storage.names() == []
    storage.make()
    assert storage.names() == []

    storage.write("b", b"two")
    storage.write("a", memoryview(b"one"))
    storage.write("b", b"three")

    assert storage.names() == ["a", "b"]
    assert (storage.read("a"), storage.read("b"), storage.read("c")) == (b"one", b"three", None)
    assert storage.place("a") == f"{storage.name}/a"
    storage.remove(["a", "c"])
    storage.remove([])
    assert storage.names() == ["b"]


def test_empty_files_and_large_ones(storage: Storage) -> None:
    large = os.urandom(3_000_000)
    storage.write("empty", b"")
    storage.write("large", large)

    assert storage.read("empty") == b""
    assert storage.read("large") == large


def test_what_others_do_is_seen_at_once(storage: Storage) -> None:
    storage.write("a", b"one")
    assert storage.names() == ["a"]
    other = pickle.loads(pickle.dumps(storage))

    other.write("b", b"two")
    assert storage.names() == ["a", "b"]
    other.remove(["a"])
    assert storage.names() == ["b"]
    assert storage.read("a") is None


def test_several_threads_at_once(storage: Storage) -> None:
    def write_and_read(number: int) -> bool:
        content = bytes([number]) * 1000
        storage.write(f"file{number}", content)
        storage.write("same", b"the same")
        return storage.read(f"file{number}") == content and storage.read("same") == b"the same"

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(write_and_read, range(24)))
    assert len(storage.names()) == 25


def test_names_that_look_like_patterns(storage: Storage) -> None:
    """A prefix may hold brackets and stars, which fsspec would take for patterns."""
    if isinstance(storage, LocalFolder):
        odd: Storage = LocalFolder(storage.folder / "[1]*")
    else:
        odd = open_storage(f"{storage.name}/[1]*/x")
    odd.make()
    odd.write("a", b"one")
    storage.write("a", b"another")

    assert odd.names() == ["a"]
    odd.remove(["a"])
    assert odd.names() == []
    assert storage.read("a") == b"another"


def test_more_files_than_one_request_names(monkeypatch: pytest.MonkeyPatch, s3: S3Server) -> None:
    monkeypatch.setattr(storage_module, "REMOVED_AT_ONCE", 3)
    storage = open_storage(s3.make_bucket())
    for number in range(8):
        storage.write(f"file{number}", b"x")

    storage.remove([f"file{number}" for number in range(7)])

    assert storage.names() == ["file7"]


# S3.


def test_each_takes_one_request(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage(f"{s3.make_bucket()}/scores")
    storage.write("warm", b"up")
    asked: list[str] = []
    monkeypatch.setattr(s3, "fault", lambda method, path: asked.append(f"{method} {path.rpartition('/')[2]}"))

    storage.write("a", b"one")
    storage.read("a")
    storage.read("b")

    assert asked == ["PUT a", "GET a", "GET b"]


def write_then_fork(place: str) -> None:
    """A process that has used a connection, and whose fork uses its own."""
    storage = open_storage(place)
    storage.write("a", b"one")
    process = multiprocessing.get_context("fork").Process(target=read_then_write, args=[storage])
    process.start()
    process.join(60)
    sys.exit(process.exitcode if process.exitcode is not None else "the forked process hangs")


def read_then_write(storage: Storage) -> None:
    assert storage.read("a") == b"one"
    storage.write("b", b"two")


def test_a_forked_process_has_a_connection_of_its_own(s3: S3Server) -> None:
    place = f"{s3.make_bucket()}/scores"

    # Not forked from here: the server's threads may hold locks that nobody would release in the child.
    process = multiprocessing.get_context("spawn").Process(target=write_then_fork, args=[place])
    process.start()
    process.join()

    assert process.exitcode == 0
    assert open_storage(place).names() == ["a", "b"]


@pytest.mark.parametrize("status", [500, 503])
def test_a_server_that_is_busy_is_asked_again(s3: S3Server, monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    storage = open_storage(f"{s3.make_bucket()}/scores")
    left = {"PUT": 1, "GET": 1}

    def fault(method: str, path: str) -> int | None:
        left[method] = left.get(method, 0) - 1
        return status if left[method] >= 0 else None

    monkeypatch.setattr(s3, "fault", fault)
    storage.write("a", b"one")

    assert storage.read("a") == b"one"
    assert left["PUT"] < 0
    assert left["GET"] < 0


def test_no_such_bucket(s3: S3Server, waits: list[float]) -> None:
    with pytest.raises(StorageError, match=r"s3://none-of-ours/run/\.probe\..*: cannot be written .*no such bucket"):
        open_storage("s3://none-of-ours/run").make()
    assert waits == []


def test_no_permission(s3: S3Server, monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> None:
    storage = open_storage(f"{s3.make_bucket()}/scores")
    monkeypatch.setattr(s3, "fault", lambda method, path: 403)

    for action in (lambda: storage.read("a"), lambda: storage.write("a", b"x"), storage.names):
        with pytest.raises(StorageError, match=r"PermissionError.*look at the credentials in the environment"):
            action()
    assert waits == []


def test_no_credentials(s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    S3FileSystem.clear_instance_cache()

    with pytest.raises(StorageError, match=r"cannot be written \(NoCredentialsError.*look at the credentials"):
        open_storage("s3://bucket/scores").make()
    S3FileSystem.clear_instance_cache()


def test_only_files_of_the_folder_itself_are_named(s3: S3Server) -> None:
    bucket = s3.make_bucket()
    storage = open_storage(f"{bucket}/run")
    client = boto3.client("s3")
    for key in ("run/", "run/a", "run/below/b", "run2/c"):
        client.put_object(Bucket=bucket.removeprefix("s3://"), Key=key, Body=b"x")

    assert [name for name in storage.names() if name not in ("", "below")] == ["a"]


# What is tried again, and what is not.


def of_s3(code: str, status: int) -> Exception:
    """As s3fs hands an answer on."""
    from s3fs.errors import translate_boto_error

    answer = {"Error": {"Code": code, "Message": "so"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return translate_boto_error(botocore.exceptions.ClientError(answer, "PutObject"))


def with_status(status: int) -> Exception:
    return aiohttp.ClientResponseError(None, (), status=status)  # type: ignore[arg-type]


NAMES = ("EIO", "ESTALE", "EAGAIN", "EBUSY", "ETIMEDOUT", "ECONNRESET")


@pytest.mark.parametrize(
    "error",
    [
        *(OSError(getattr(errno, name), name) for name in NAMES),
        ConnectionRefusedError(),
        BrokenPipeError(),
        TimeoutError(),
        *(
            of_s3(*answer)
            for answer in (("SlowDown", 503), ("InternalError", 500), ("RequestTimeout", 400), ("X", 502))
        ),
        *map(with_status, (429, 408, 500, 503)),
        aiohttp.ServerDisconnectedError(),
        aiohttp.ClientPayloadError(),
        botocore.exceptions.EndpointConnectionError(endpoint_url="http://nowhere"),
        botocore.exceptions.ReadTimeoutError(endpoint_url="http://nowhere"),
        botocore.exceptions.ResponseStreamingError(error="cut"),
        botocore.exceptions.IncompleteReadError(actual_bytes=1, expected_bytes=2),
        requests.exceptions.ChunkedEncodingError(),
        urllib3.exceptions.IncompleteRead(1, 2),
        urllib3.exceptions.TimeoutError(),
        httpcore.RemoteProtocolError(),
        httpcore.ReadTimeout(),
    ],
    ids=repr,
)
def test_what_may_pass(error: Exception) -> None:
    assert may_pass(error)


@pytest.mark.parametrize(
    "error",
    [
        *(OSError(getattr(errno, name), name) for name in ("ENOSPC", "EDQUOT", "EROFS", "EACCES", "ENOENT", "EISDIR")),
        *(of_s3(*answer) for answer in (("AccessDenied", 403), ("NoSuchBucket", 404), ("Strange", 400))),
        *map(with_status, (400, 401, 403, 404)),
        botocore.exceptions.NoCredentialsError(),
        ValueError("no"),
        NotImplementedError(),
    ],
    ids=repr,
)
def test_what_will_not_pass(error: Exception) -> None:
    assert not may_pass(error)


@pytest.mark.parametrize("failures", range(ATTEMPTS))
def test_waits_are_twice_as_long_each_time(waits: list[float], failures: int) -> None:
    left = [BUSY] * failures

    def action() -> str:
        if left:
            raise left.pop()
        return "done"

    assert retrying(action) == "done"
    assert len(waits) == failures
    for number, wait in enumerate(waits):
        assert 0.1 * 2**number <= wait <= 0.3 * 2**number


def test_there_is_an_end_to_it(waits: list[float]) -> None:
    asked = []

    def action() -> None:
        asked.append(1)
        raise BUSY

    with pytest.raises(OSError, match="slow down"):
        retrying(action)
    assert len(asked) == ATTEMPTS
    assert len(waits) == ATTEMPTS - 1


def test_what_fails_too_often_is_said_with_the_place() -> None:
    storage = open_storage("failing://busy/scores")
    FailingFiles.faults = dict.fromkeys(range(100), "before")

    with pytest.raises(
        StorageError, match=r"^failing://busy/scores/a: cannot be read \(.*slow down\); it failed 5 times"
    ):
        storage.read("a")
    with pytest.raises(StorageError, match=r"^failing://busy/scores: cannot be listed "):
        storage.names()
    FailingFiles.error = FULL
    with pytest.raises(StorageError, match=r"^failing://busy/scores/a: cannot be written \(.*no room\); mend that"):
        storage.write("a", b"x")


FAULTS = st.dictionaries(st.integers(0, 25), st.sampled_from(["before", "after", "half"]), max_size=12)


@pytest.mark.parametrize("one_request", [False, True])
@settings(max_examples=200)
@given(faults=FAULTS, sizes=st.lists(st.integers(0, 50), min_size=1, max_size=4))
def test_whatever_fails_a_file_is_whole(one_request: bool, faults: dict[int, str], sizes: list[int]) -> None:
    """A write that is told as done is done, one that is told as failed left the old or the new; never a half.

    Where one request writes a file, a request that failed half way has written nothing.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage_module, "ATOMIC_PROTOCOLS", {"failing"} if one_request else set())
        patch.setattr(remote, "FIRST_WAIT", 0.0)
        storage = open_storage(f"failing://{uuid4().hex}/scores")
        FailingFiles.calls = 0
        FailingFiles.faults = {n: "before" if one_request and f == "half" else f for n, f in faults.items()}
        may_be: list[bytes | None] = [None]
        for number, size in enumerate(sizes):
            content = bytes([number]) * size
            try:
                storage.write("a", content)
                may_be = [content]
            except StorageError:
                may_be.append(content)
            try:
                found = storage.read("a")
                assert found in may_be
                may_be = [found]
            except StorageError:
                pass
        FailingFiles.faults = {}
        assert storage.read("a") in may_be
        left = storage.names()
        assert all(name == "a" or name.startswith(".a.") for name in left)
        assert not one_request or left in ([], ["a"])


def test_a_name_that_is_taken_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a rename replaces nothing."""
    storage = open_storage("failing://taken/scores")
    storage.write("a", b"old")
    move = FailingFiles.mv

    def careful(self: FailingFiles, path1: str, path2: str, **options: Any) -> None:
        if self.exists(path2):
            raise FileExistsError(path2)
        move(self, path1, path2)

    monkeypatch.setattr(FailingFiles, "mv", careful)
    storage.write("a", b"new")

    assert storage.read("a") == b"new"
    assert storage.names() == ["a"]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_folder_s_hiccup_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, waits: list[float]
) -> None:
    """As a network's file system has them."""
    storage = LocalFolder(tmp_path)
    place, real = (os, os.fsync) if failing == "fsync" else (Path, Path.replace)
    left = [errno.ESTALE, errno.EIO]

    def flaky(*arguments: Any) -> Any:
        if left:
            raise OSError(left.pop(), "hiccup")
        return real(*arguments)

    monkeypatch.setattr(place, failing, flaky)
    storage.write("a", b"one")

    assert storage.names() == ["a"]
    assert len(waits) == 2


def test_temporary_names_are_nobody_else_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In two threads of a process, or in two containers, in which process numbers are the same."""
    storage, rename, first = LocalFolder(tmp_path), Path.replace, threading.Lock()
    first.acquire()

    def wait_and_rename(path: Path, target: Path) -> Path:
        if first.locked():
            first.release()
            LocalFolder(tmp_path).write("a", b"the same")
        return rename(path, target)

    monkeypatch.setattr(Path, "replace", wait_and_rename)
    storage.write("a", b"the same")

    assert storage.names() == ["a"]
    assert storage.read("a") == b"the same"


# What a place may be called.


@pytest.mark.parametrize("text", ["/shared/parts", "file:///shared/parts", "local:///shared/parts"])
def test_folders_by_name(text: str) -> None:
    storage = open_storage(text)
    assert isinstance(storage, LocalFolder)
    assert storage.name == "/shared/parts"


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("s3://KEY:hidden@bucket/run", "holds a password"),
        ("s3://KEY:hid/den@bucket/run", "holds a password"),
        ("sftp://me:hidden@host/run", "holds a password"),
        ("abfs://run@account/x?sig=hidden", "holds a query"),
        ("s3://bucket/run#hidden", "holds a query"),
        ("simplecache::s3://bucket/hidden", "is a chain of URLs"),
        ("s3://", "names no place"),
        ("s3://bucket/\x1b[31m", "names no place"),
    ],
)
def test_urls_that_are_refused(url: str, says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        open_storage(url)
    assert "hidden" not in str(caught.value)
    assert "hid/den" not in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_user_without_a_password_is_none_of_our_business() -> None:
    check_url("sftp://me@host/run")
    check_url("abfs://container@account.dfs.core.windows.net/run")


def test_other_libraries_messages_are_shown_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage("memory://hushed/scores")

    def refuse(*arguments: Any, **options: Any) -> None:
        raise ValueError("GET https://me:hidden@host/x?X-Amz-Signature=hidden&y=1 'was'\nrefused")

    monkeypatch.setattr(MemoryFileSystem, "cat_file", refuse)
    with pytest.raises(StorageError, match=r"GET https://\*\*\*@host/x\?\*\*\* 'was' refused\); mend that") as caught:
        storage.read("a")
    assert "hidden" not in str(caught.value)


def test_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(MissingDependencyError, match=r"s3://bucket/run needs the package 's3fs': .*dpo-fast\[s3\]"):
        open_storage("s3://bucket/run")


def test_what_fsspec_does_not_know() -> None:
    with pytest.raises(UsageError, match=r"nowhere://bucket/run: is no URL that fsspec knows \(Protocol not known"):
        open_storage("nowhere://bucket/run")


def test_a_place_that_nobody_can_write_to() -> None:
    """It is said before anything is computed."""
    storage = open_storage("failing://full/scores")
    FailingFiles.faults, FailingFiles.error = {0: "before"}, FULL
    with pytest.raises(StorageError, match="cannot be written"):
        storage.make()


def test_storage_is_pickled_by_its_name(tmp_path: Path) -> None:
    for storage in (UrlStorage("memory://x/y/"), LocalFolder(tmp_path)):
        again = pickle.loads(pickle.dumps(storage))
        assert (type(again), again.name) == (type(storage), storage.name)
    assert UrlStorage("memory://x/y/").name == "memory://x/y"
