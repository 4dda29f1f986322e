"""Writing that shows all or nothing, and what a disk says, in our words."""

import errno
import fcntl
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from dpo_fast import files
from dpo_fast.errors import OutputExistsError, StorageError
from dpo_fast.files import copy_file, new_folder, sha256, storage_errors, write_json, write_text

MARKER = "bundle.json"


def fill(folder: Path, content: str = "new") -> None:
    (folder / MARKER).write_text(content)
    (folder / "sub").mkdir()
    (folder / "sub" / "data").write_text(content)


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder: nothing may be left there that was not there before."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")
    }


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "target"
    with new_folder(target, overwrite=False, marker=MARKER) as folder:
        fill(folder)
        assert folder.parent == target.parent, "a rename is atomic on one disk only"
        assert not target.exists()
    assert snapshot(tmp_path).keys() == {"deep", "deep/target", "deep/target/bundle.json", "deep/target/sub",
                                         "deep/target/sub/data"}  # fmt: skip


@pytest.mark.parametrize("target", [".", "..", "../.."])
def test_the_folder_that_a_command_runs_in_is_not_replaced_beneath_it(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = tmp_path / "target" / "sub" / "sub"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    (Path(target) / MARKER).write_text("old")
    before = snapshot(tmp_path)
    with (
        pytest.raises(OutputExistsError, match="this command runs in it; run it from another folder"),
        new_folder(Path(target), overwrite=True, marker=MARKER),
    ):
        pytest.fail("nothing is computed for a target that cannot be replaced")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "error", [ValueError("a bug"), KeyboardInterrupt(), OSError(errno.EINVAL, "no fault of the disk")]
)
@pytest.mark.parametrize("exists", [False, True])
def test_a_failure_inside_leaves_nothing_and_touches_nothing(
    tmp_path: Path, error: BaseException, exists: bool
) -> None:
    if exists:
        (tmp_path / "target").mkdir()
        fill(tmp_path / "target", "old")
    before = snapshot(tmp_path)

    def fail() -> None:
        with new_folder(tmp_path / "target", overwrite=True, marker=MARKER) as folder:
            fill(folder)
            raise error

    with pytest.raises(type(error)):
        fail()
    assert snapshot(tmp_path) == before


def test_an_existing_target_is_replaced_only_when_told_and_only_when_ours(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    for overwrite, reason in ((False, "exists already; name another folder, or say --overwrite"),
                              (True, "holds no bundle.json, so --overwrite does not touch it")):  # fmt: skip
        with (
            pytest.raises(OutputExistsError, match=reason),
            new_folder(target, overwrite=overwrite, marker=MARKER),
        ):
            pytest.fail("nothing is computed for a target that cannot be written")
    fill(target, "old")
    (target / "extra").write_text("")
    with new_folder(target, overwrite=True, marker=MARKER) as folder:
        fill(folder)
        assert (target / MARKER).read_text() == "old", "not before the end"
    assert snapshot(tmp_path).keys() == {"target", "target/bundle.json", "target/sub", "target/sub/data"}
    assert (target / MARKER).read_text() == "new"


@pytest.mark.parametrize("make", [lambda path: path.write_text("x"), lambda path: path.symlink_to("nowhere")])
def test_files_and_dangling_links_are_never_replaced(tmp_path: Path, make: object) -> None:
    make(tmp_path / "target")
    for overwrite in (False, True):
        with (
            pytest.raises(OutputExistsError),
            new_folder(tmp_path / "target", overwrite=overwrite, marker=MARKER),
        ):
            pytest.fail("entered")


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_somebody_else_made_in_the_meantime_is_not_replaced(tmp_path: Path, overwrite: bool) -> None:
    """Minutes lie between the first look and the rename; another folder of theirs stays, marker or not."""
    target = tmp_path / "target"

    def export_twice() -> None:
        with new_folder(target, overwrite=overwrite, marker=MARKER) as folder:
            fill(folder)
            target.mkdir()
            (target / (MARKER if not overwrite else "theirs")).write_text("theirs")

    with pytest.raises(OutputExistsError):
        export_twice()
    assert [path.read_text() for path in target.iterdir()] == ["theirs"]
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_the_old_folder_comes_back_when_the_last_rename_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "target"
    target.mkdir()
    fill(target, "old")
    before = snapshot(tmp_path)
    rename = Path.rename

    def refuse_new(self: Path, to: Path) -> Path:
        if to == target and (self / MARKER).read_text() == "new":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self), None, str(to))
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", refuse_new)
    with pytest.raises(StorageError), new_folder(target, overwrite=True, marker=MARKER) as folder:
        fill(folder)
    assert snapshot(tmp_path) == before


def test_permissions_are_the_users_usual_ones(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        with new_folder(tmp_path / "folder", overwrite=False, marker=MARKER):
            pass
        write_text(tmp_path / "file", "text")
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o750
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_a_path_through_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "file" / "x", tmp_path / "file" / "x" / "y"):
        with (
            pytest.raises(StorageError, match="a part of the path is a file"),
            new_folder(target, overwrite=False, marker=MARKER),
        ):
            pytest.fail("entered")


def test_a_name_too_long(tmp_path: Path) -> None:
    with (
        pytest.raises(StorageError, match="choose a shorter name"),
        new_folder(tmp_path / ("x" * 300), overwrite=False, marker=MARKER),
    ):
        pytest.fail("entered")


@pytest.mark.parametrize(
    ("number", "way_out"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "free some of your quota"),
        (errno.EFBIG, "name a folder on another disk"),
        (errno.EROFS, "name a folder on a disk that is not read-only"),
        (errno.EACCES, "name a folder that you may write to"),
    ],
)
def test_storage_errors_name_the_file_and_the_way_out(tmp_path: Path, number: int, way_out: str) -> None:
    with pytest.raises(StorageError, match=way_out) as caught, storage_errors(tmp_path):
        raise OSError(number, os.strerror(number), "/source", None, "/copy")
    assert str(caught.value).startswith(f"/copy: {os.strerror(number)}; "), "the file that is written, not read"
    assert "\n" not in str(caught.value)
    with pytest.raises(StorageError, match=str(tmp_path)), storage_errors(tmp_path):
        raise OSError(number, os.strerror(number))


def test_other_errors_pass_unchanged(tmp_path: Path) -> None:
    error = FileNotFoundError(errno.ENOENT, "gone")
    with pytest.raises(FileNotFoundError) as caught, storage_errors(tmp_path):
        raise error
    assert caught.value is error


def test_a_file_is_replaced_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_text(path, "old — “ä”\n")
    assert path.read_bytes() == "old — “ä”\n".encode()

    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageError, match="free some space"):
        write_text(path, "new")
    assert snapshot(tmp_path) == {"file": "old — “ä”\n".encode()}


def test_a_file_is_not_written_through_a_hard_link(tmp_path: Path) -> None:
    """The Hub's cache may share a file with a bundle."""
    (tmp_path / "cache").write_text("theirs")
    (tmp_path / "file").hardlink_to(tmp_path / "cache")
    write_text(tmp_path / "file", "ours")
    assert (tmp_path / "cache").read_text() == "theirs"


def test_a_disk_that_is_full_leaves_the_old_file(tmp_path: Path) -> None:
    """A limit on the size of files stands in for a full disk: the kernel refuses the same write."""
    write_text(tmp_path / "file", "old")
    script = f"""
import resource
from pathlib import Path
from dpo_fast.errors import StorageError
from dpo_fast.files import write_text
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_text(Path({str(tmp_path / "file")!r}), "x" * 5000)
except StorageError as error:
    print(error)
"""
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert "File too large; the file would be larger than this system allows" in output
    assert snapshot(tmp_path) == {"file": b"old"}


def test_json_is_for_people_and_holds_no_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"é": [1, None]})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "é": [\n    1,\n    null\n  ]\n}\n'
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", float("nan"))
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"é": [1, None]}


def test_sha256(tmp_path: Path) -> None:
    """Of "abc": FIPS 180-4's example."""
    (tmp_path / "file").write_bytes(b"abc")
    assert sha256(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def sparse(path: Path) -> bytes:
    """A file of 8 MiB with data in two places, and holes elsewhere; its content."""
    with path.open("wb") as file:
        file.seek(1 << 20)
        file.write(b"one" * 5000)
        file.seek(5 << 20)
        file.write(b"two" * 5000)
        file.truncate(8 << 20)
    return path.read_bytes()


def test_a_copys_holes_stay_holes(tmp_path: Path) -> None:
    content = sparse(tmp_path / "source")
    copy_file(tmp_path / "source", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == content
    assert (tmp_path / "copy").stat().st_blocks * 512 < 1 << 20
    assert (tmp_path / "copy").stat().st_ino != (tmp_path / "source").stat().st_ino


@pytest.mark.parametrize("content", [b"", b"x", b"0123456789" * 100_000])
def test_a_copy_has_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    """Whatever sendfile takes at once."""
    monkeypatch.setattr(files, "COPY_CHUNK", 4097)
    (tmp_path / "source").write_bytes(content)
    copy_file(tmp_path / "source", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == content


def test_a_link_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a copy where the file system makes none."""
    (tmp_path / "source").write_bytes(b"weights")
    copy_file(tmp_path / "source", tmp_path / "link", link=True)
    assert (tmp_path / "link").samefile(tmp_path / "source")

    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    copy_file(tmp_path / "source", tmp_path / "copy", link=True)
    assert (tmp_path / "copy").read_bytes() == b"weights"
    assert not (tmp_path / "copy").samefile(tmp_path / "source")


def test_blocks_are_shared_where_the_file_system_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system is asked to clone before a byte is read; what it cloned is not copied again."""
    asked = []

    def clone(target: int, request: int, source: int) -> int:
        asked.append(request)
        os.write(target, b"cloned")
        assert os.fstat(source).st_size == 8 << 20
        return 0

    sparse(tmp_path / "source")
    monkeypatch.setattr(fcntl, "ioctl", clone)
    copy_file(tmp_path / "source", tmp_path / "copy")
    assert asked == [0x40049409], "FICLONE, linux/fs.h: _IOW(0x94, 9, int)"
    assert (tmp_path / "copy").read_bytes() == b"cloned"


def test_a_copy_never_writes_over_a_file(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"new")
    (tmp_path / "copy").write_bytes(b"old")
    with pytest.raises(StorageError):
        copy_file(tmp_path / "source", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"old"
