"""Writing so that a reader sees all of it or nothing: a temporary sibling, then one rename."""

import errno
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dpo_fast.errors import OutputExistsError, StorageError

FICLONE = 0x40049409  # linux/fs.h: this file shall share that one's blocks until either is written to
COPY_CHUNK = 1 << 30  # bytes; what sendfile takes at once


@contextmanager
def new_folder(target: Path, *, overwrite: bool, marker: str) -> Iterator[Path]:
    """A folder to fill, which becomes `target` when the block ends well, and vanishes when it does not.

    Args:
        target: must not exist, unless `overwrite`; then it is replaced at the end, not before.
        overwrite: whether an existing target may be replaced.
        marker: a file that only such folders hold; a target without it is somebody else's, and never replaced.

    Yields:
        A temporary folder beside the target.

    Raises:
        OutputExistsError: the target exists.
        StorageError: the disk refused.
    """
    refuse_existing(target, overwrite=overwrite, marker=marker)
    make_folder(target.parent)
    with storage_errors(target):
        working = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        with storage_errors(target):
            working.chmod(0o777 & ~_umask())  # mkdtemp's are private
            yield working
            refuse_existing(target, overwrite=overwrite, marker=marker)  # made by somebody else in the meantime
            if os.path.lexists(target):
                _replace_folder(target, working)
            else:
                working.rename(target)
    finally:
        shutil.rmtree(working, ignore_errors=True)


def _replace_folder(target: Path, working: Path) -> None:
    """Put one folder in another's place; the old one comes back if that fails."""
    retired = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    old = retired / target.name
    try:
        target.rename(old)
        working.rename(target)
    except BaseException:
        if os.path.lexists(old):
            old.rename(target)
        retired.rmdir()
        raise
    shutil.rmtree(retired)


def refuse_existing(target: Path, *, overwrite: bool, marker: str) -> None:
    """Refuse a target that exists, unless it may be overwritten and is what we would write there.

    Raises:
        OutputExistsError: as `new_folder`.
    """
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise OutputExistsError(f"{target}: exists already; name another folder, or say --overwrite")
    if not (target / marker).exists():
        raise OutputExistsError(f"{target}: holds no {marker}, so --overwrite does not touch it; name another folder")
    if Path.cwd().is_relative_to(target.resolve()):
        raise OutputExistsError(f"{target}: would be replaced, and this command runs in it; run it from another folder")


def write_text(path: Path, text: str) -> None:
    """Write a text as `write_bytes` does, in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: Any) -> None:
    """Write bytes, or what lends them, at once: a temporary sibling, synced to the disk, then renamed."""
    with storage_errors(path):
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        temporary = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON that people can read; NaN is a bug, not a value."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def make_folder(folder: Path) -> None:
    """Make a folder and its parents, if they are not there.

    Raises:
        StorageError: the disk refused, or takes no folders there (/proc).
    """
    try:
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as error:
        raise StorageError(f"{folder}: no folder can be made there; name one on an ordinary disk") from error


def copy_file(source: Path, target: Path, *, link: bool = False) -> None:
    """Copy a file's bytes: shared blocks where the file system can (reflink), and holes stay holes.

    Args:
        source: what to copy; never a symbolic link.
        target: must not exist.
        link: make a hard link instead, where both lie on one file system.

    Raises:
        StorageError: the disk refused.
    """
    if link:
        try:
            target.hardlink_to(source)
            return
        except OSError:
            pass  # another file system, or one without links: copy
    if sys.platform != "linux":
        shutil.copyfile(source, target)
        return
    import fcntl

    # sendfile's errors name no file
    with storage_errors(target), source.open("rb") as reader, target.open("xb") as writer:
        try:
            fcntl.ioctl(writer.fileno(), FICLONE, reader.fileno())
            return
        except OSError:
            pass  # ext4, another file system, …: copy the bytes
        size = os.fstat(reader.fileno()).st_size
        position = 0
        while position < size:
            try:
                position = os.lseek(reader.fileno(), position, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:  # a hole up to the end
                    raise
                break
            end = os.lseek(reader.fileno(), position, os.SEEK_HOLE)
            os.lseek(writer.fileno(), position, os.SEEK_SET)
            while position < end:
                position += os.sendfile(writer.fileno(), reader.fileno(), position, min(end - position, COPY_CHUNK))
        os.ftruncate(writer.fileno(), size)


def sha256(path: Path) -> str:
    """A file's SHA-256, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def storage_errors(target: Path) -> Iterator[None]:
    """Turn what a disk says into our error, with the file and the way out."""
    try:
        yield
    except OSError as error:
        ways_out = {
            errno.ENOSPC: "free some space, or name a folder on another disk",
            errno.EDQUOT: "free some of your quota, or name a folder on another disk",
            errno.EFBIG: "the file would be larger than this system allows: name a folder on another disk",
            errno.EACCES: "name a folder that you may write to",
            errno.EPERM: "name a folder that you may write to",
            errno.EROFS: "name a folder on a disk that is not read-only",
            errno.EIO: "the disk is failing: name a folder on another one",
            errno.ENOTDIR: "a part of the path is a file; name another folder",
            errno.EEXIST: "a part of the path is a file; name another folder",  # what mkdir says of it
            errno.ELOOP: "a part of the path is a link to itself; name another folder",
            errno.ENAMETOOLONG: "choose a shorter name",
        }
        way_out = ways_out.get(error.errno or 0)
        if way_out is None:
            raise
        # Of two names, as for a copy, the second is the one written to.
        raise StorageError(
            f"{error.filename2 or error.filename or target}: {os.strerror(error.errno or 0)}; {way_out}"
        ) from error


def _umask() -> int:
    """The process's file mode mask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
