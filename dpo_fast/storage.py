"""Where parts lie: a folder, which several machines may share, or any place that fsspec has a URL for (s3://, …).

A file is there whole or not at all, whoever else writes it. What may pass, such as a lost connection, is tried again a
few times; what will not, such as a missing permission, is said at once.
"""

import os
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar
from uuid import uuid4

from dpo_fast.errors import DpoFastError, StorageError, UsageError
from dpo_fast.files import copy_file, make_folder, storage_errors
from dpo_fast.remote import ATTEMPTS, may_pass, open_url, retrying
from dpo_fast.text import named_line, one_line, said_by

REMOVED_AT_ONCE = 1000  # as many as one request to S3 may name
# Where one request writes a file whole; elsewhere a file gets its name when all of it is there.
ATOMIC_PROTOCOLS = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oci", "oss", "memory"}
LOCAL_PROTOCOLS = {"file", "local"}
# A read is one request: it neither asks for the size first, nor puts pieces of what may be two versions together.
S3_OPTIONS = {"max_concurrency": 1, "use_listings_cache": False}
OPTIONS: dict[str, dict[str, Any]] = {"s3": S3_OPTIONS, "s3a": S3_OPTIONS}

Result = TypeVar("Result")


class Storage(Protocol):
    """Files of bytes, by name. It may be pickled, and used by several threads and processes at once."""

    @property
    def leaves_remains(self) -> bool:
        """Whether a killed writer may leave a temporary file: `.NAME.` and 32 hexadecimal digits."""
        ...

    @property
    def name(self) -> str:
        """For messages: a folder's path, or a URL, which holds no secrets."""
        ...

    def place(self, name: str) -> str:
        """A file's whole name, for messages."""
        ...

    def make(self) -> None:
        """Make the place, if that is needed, and find out now whether it refuses.

        Raises:
            StorageError: it does.
        """
        ...

    def read(self, name: str) -> bytes | None:
        """A file's content; None if there is no such file.

        Raises:
            StorageError: it cannot be read.
        """
        ...

    def write(self, name: str, content: bytes | memoryview) -> None:
        """Write a file, or replace it; a reader sees all of it or nothing.

        Raises:
            StorageError: it cannot be written.
        """
        ...

    def names(self) -> list[str]:
        """The names of all files that are there now, sorted; none if the place is not there.

        Raises:
            StorageError: they cannot be listed.
        """
        ...

    def remove(self, names: Iterable[str]) -> None:
        """Remove files; what is not there is no error.

        Raises:
            StorageError: one cannot be removed.
        """
        ...


def open_storage(place: Path | str) -> Storage:
    """A folder, or what a URL names.

    Raises:
        UsageError: the URL cannot be used; see `check_url`.
        MissingDependencyError: an extra is not installed.
    """
    if isinstance(place, Path):
        return LocalFolder(place)
    protocol, separator, rest = place.partition("://")
    if not separator or protocol in LOCAL_PROTOCOLS:
        if not place.isprintable():
            raise UsageError(f"{one_line(place)}: holds characters that cannot be shown; name another folder")
        return LocalFolder(Path(rest if separator else place))
    return UrlStorage(place)


def check_url(url: str) -> None:
    """Refuse a URL that would carry secrets into files and messages, or whose files could be stale.

    Raises:
        UsageError: it is one; the message leaves out what may be secret.
    """
    shown = f"{one_line(url.partition('://')[0])}://…"
    # Secret keys may hold slashes, so a password is looked for in all of the URL.
    if re.search(r"://[^@]*:[^@]*@", url):
        raise UsageError(f"{shown}: holds a password or a key; leave it out: credentials come from the environment")
    if "?" in url or "#" in url:
        raise UsageError(f"{shown}: holds a query ('?' or '#'), which may be secret; leave it out")
    if "::" in url:
        raise UsageError(
            f"{shown}: is a chain of URLs ('::'), of which a cache could be stale; name the last one alone"
        )
    if not url.isprintable() or not url.partition("://")[2].strip("/"):
        raise UsageError(f"{one_line(url)}: names no place; say s3://BUCKET/FOLDER, for example")


def _temporary(name: str) -> str:
    """A name that no other process has, on whatever machine."""
    return f".{name}.{uuid4().hex}"


class LocalFolder:
    """A folder of this machine's file systems, which may be a network's."""

    leaves_remains = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def name(self) -> str:
        """The folder's path."""
        return str(self.folder)

    def place(self, name: str) -> str:
        """A file's path."""
        return str(self.folder / name)

    def make(self) -> None:
        """See `Storage`."""
        make_folder(self.folder)

    def read(self, name: str) -> bytes | None:
        """See `Storage`."""

        def attempt() -> bytes | None:
            try:
                return (self.folder / name).read_bytes()
            except FileNotFoundError:
                return None

        return self._do(name, "read", attempt)

    def write(self, name: str, content: bytes | memoryview) -> None:
        """See `Storage`: a temporary sibling, synced to the disk, then renamed."""

        def attempt() -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary = self.folder / _temporary(name)
            try:
                with temporary.open("wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(self.folder / name)
            finally:
                with suppress(OSError):
                    temporary.unlink(missing_ok=True)

        self._do(name, "written", attempt)

    def link(self, name: str, source: Path) -> None:
        """Take over another folder's file, which is never changed: a hard link where that can be, or a copy.

        Raises:
            StorageError: the disk refused.
        """
        make_folder(self.folder)
        copy_file(source, self.folder / name, link=True)

    def names(self) -> list[str]:
        """See `Storage`."""

        def attempt() -> list[str]:
            try:
                return sorted(os.listdir(self.folder))  # noqa: PTH208, a hundred thousand names need no paths
            except FileNotFoundError:
                return []

        return self._do("", "listed", attempt)

    def remove(self, names: Iterable[str]) -> None:
        """See `Storage`."""
        for name in names:
            path = self.folder / name
            self._do(name, "removed", lambda path=path: path.unlink(missing_ok=True))  # type: ignore[misc]

    def _do(self, name: str, done: str, action: Callable[[], Result]) -> Result:
        """Try an action on a file within the limits; what the disk says in the end is our error."""
        target = self.folder / name
        try:
            with storage_errors(target):
                return retrying(action)
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else said_by(error)
            raise StorageError(f"{target}: cannot be {done} ({reason}); mend that, or name another folder") from error


class UrlStorage:
    """What a URL names, by fsspec; credentials come from the environment, each protocol's own way."""

    def __init__(self, url: str) -> None:
        """Open a place; nothing is asked of it yet.

        Raises:
            UsageError: the URL cannot be used.
            MissingDependencyError: an extra is not installed.
        """
        check_url(url)
        self._url = url.rstrip("/")
        self._protocol = url.partition("://")[0]
        self._filesystem()

    @property
    def name(self) -> str:
        """The URL."""
        return self._url

    @property
    def leaves_remains(self) -> bool:
        """See `Storage`."""
        return self._protocol not in ATOMIC_PROTOCOLS

    def place(self, name: str) -> str:
        """A file's URL."""
        return f"{self._url}/{name}"

    def make(self) -> None:
        """See `Storage`; buckets are not made, and whether one may be written to is found by writing."""
        probe = _temporary("probe")
        self.write(probe, b"")
        self.remove([probe])

    def read(self, name: str) -> bytes | None:
        """See `Storage`."""

        def attempt() -> bytes | None:
            filesystem, root = self._filesystem()
            try:
                return bytes(filesystem.cat_file(f"{root}/{name}"))
            except FileNotFoundError:
                return None

        return self._do(name, "read", attempt)

    def write(self, name: str, content: bytes | memoryview) -> None:
        """See `Storage`: one request, or a temporary sibling that is renamed."""

        def attempt() -> None:
            filesystem, root = self._filesystem()
            target = f"{root}/{name}"
            if not self.leaves_remains:
                filesystem.pipe_file(target, bytes(content))
                return
            temporary = f"{root}/{_temporary(name)}"
            filesystem.makedirs(root, exist_ok=True)
            try:
                filesystem.pipe_file(temporary, bytes(content))
                try:
                    filesystem.mv(temporary, target)
                except FileExistsError:  # where a name is not taken from another file
                    filesystem.rm_file(target)
                    filesystem.mv(temporary, target)
            except BaseException:
                with suppress(Exception):
                    filesystem.rm_file(temporary)
                raise

        self._do(name, "written", attempt)

    def names(self) -> list[str]:
        """See `Storage`."""

        def attempt() -> list[str]:
            filesystem, root = self._filesystem()
            filesystem.invalidate_cache()  # others write here
            try:
                paths = filesystem.ls(root, detail=False)
            except FileNotFoundError:
                return []
            finally:
                filesystem.invalidate_cache()  # some 100 MB for a hundred thousand objects
            return sorted(path.rpartition("/")[2] for path in paths if path.startswith(f"{root}/"))

        return self._do("", "listed", attempt)

    def remove(self, names: Iterable[str]) -> None:
        """See `Storage`."""
        wanted = list(names)

        def attempt(batch: list[str]) -> None:
            filesystem, root = self._filesystem()
            paths = [f"{root}/{name}" for name in batch]
            try:
                filesystem.rm(paths)
            except FileNotFoundError:
                for path in paths:
                    with suppress(FileNotFoundError):
                        filesystem.rm_file(path)

        for start in range(0, len(wanted), REMOVED_AT_ONCE):
            batch = wanted[start : start + REMOVED_AT_ONCE]
            self._do(batch[0], "removed", lambda batch=batch: attempt(batch))  # type: ignore[misc]

    def _filesystem(self) -> tuple[Any, str]:
        """The object of fsspec, and what the URL is called there.

        Raises:
            UsageError: fsspec knows no such place, or needs a package for it.
            MissingDependencyError: an extra is not installed.
        """
        filesystem, root = open_url(self._url, **OPTIONS.get(self._protocol, {}))
        return filesystem, root.rstrip("/")

    def _do(self, name: str, done: str, action: Callable[[], Result]) -> Result:
        """Try an action on a file within the limits; what the place says in the end is our error."""
        try:
            return retrying(action)
        except DpoFastError:
            raise
        except Exception as error:  # of whatever package has the protocol
            if isinstance(error, PermissionError) or "Credential" in type(error).__name__:
                way_out = "look at the credentials in the environment, and at what they allow"
            elif isinstance(error, FileNotFoundError):
                way_out = "there is no such bucket or folder: make it, or name another place"
            elif may_pass(error):
                way_out = f"it failed {ATTEMPTS} times: look at the connection, then go on with the same command"
            else:
                way_out = "mend that, or name another place"
            raise StorageError(
                f"{self.place(name).rstrip('/')}: cannot be {done} ({named_line(error)}); {way_out}"
            ) from error
