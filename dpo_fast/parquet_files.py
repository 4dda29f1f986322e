"""Where a set's Parquet files are, by split: found without reading or preparing any of them.

Folders and the Hub are asked as `datasets.load_dataset` asks them, by the library's own builder: which files belong to
which split, what the README's `configs` say, and, on the Hub, at which commit. A folder at a URL is listed
once, and its files belong to splits by the same patterns.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from dpo_fast.errors import UsageError
from dpo_fast.remote import open_url, retrying

if TYPE_CHECKING:
    from datasets import Features

SUFFIX = ".parquet"
# Where file systems keep what changes with a file's content, the surest first.
CONTENT = ("ETag", "etag", "md5Hash", "crc32c", "content_md5", "checksum", "LastModified", "last_modified", "updated",
           "mtime", "modified", "created")  # fmt: skip
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://.*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class ParquetSplit:
    """One split's files.

    Attributes:
        name: of the split; None where the set has no splits.
        places: paths or URLs, in order.
        first: the set's first file, which says what columns there are if no card does; it may belong to another split.
        features: of the set, if its card says them.
        rows: if the set's card says how many there are.
        fingerprint: names the data of files that are not on this machine. On the Hub, the URLs have the commit; of
            other URLs, names and sizes count, and what the file system knows of the content: a checksum, or when it
            was last changed.
    """

    name: str | None
    places: tuple[str, ...]
    first: str
    features: "Features | None"
    rows: int | None
    fingerprint: str | None


@dataclass(frozen=True, slots=True)
class ParquetFiles:
    """A set's files.

    Attributes:
        splits: the places of each split's files; of a set without splits under None.
        features: of the set, if its card says them.
        rows: of each split, if its card says them.
        contents: of files at URLs: their size in bytes, and what is known of their content.
    """

    splits: Mapping[str | None, tuple[str, ...]]
    features: "Features | None" = None
    rows: Mapping[str | None, int] | None = None
    contents: Mapping[str, tuple[int, str]] = field(default_factory=dict)

    def take(self, split: str | None) -> ParquetSplit:
        """One split's files."""
        places, rows = self.splits[split], None if self.rows is None else self.rows.get(split)
        fingerprint = _fingerprint(places, self.contents) if URL.fullmatch(places[0]) else None
        return ParquetSplit(split, places, next(iter(self.splits.values()))[0], self.features, rows, fingerprint)


def of_builder(builder: Any) -> ParquetFiles | None:
    """The files that a builder of the `datasets` library has found; None if it would do more than read Parquet."""
    from datasets.packaged_modules.parquet.parquet import Parquet

    if not isinstance(builder, Parquet):
        return None
    config = builder.config
    splits: dict[str | None, tuple[str, ...]]
    splits = {str(split): tuple(map(str, places)) for split, places in config.data_files.items()}
    plain = config.columns is None and config.filters is None and config.on_bad_files == "error"
    if not plain or not all(places and all(place.endswith(SUFFIX) for place in places) for places in splits.values()):
        return None
    sizes = builder.info.splits
    rows: dict[str | None, int] | None = None
    if sizes is not None:
        rows = {str(split): int(size.num_examples) for split, size in sizes.items()}
    return ParquetFiles(splits, builder.info.features, rows)


def at_url(url: str) -> ParquetFiles:
    """The files at a URL: one file, a pattern (`s3://bucket/prefs/*.parquet`), or a folder, with or without splits.

    Raises:
        UsageError: the URL is not to be shown to everybody, or no file system knows it.
        FileNotFoundError: no Parquet file is there.
    """
    address = url.partition("://")[2]
    # A secret key may hold slashes, so a password is looked for in all of the URL.
    if "?" in address or "@" in address.partition("/")[0] or re.match("[^@]*:[^@]*@", address):
        raise UsageError(
            "--dataset: a URL with a user, a password or a `?` would be written into the results; give credentials as "
            "the file system wants them (for s3:// in the environment: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)"
        )
    if "::" in url:
        raise UsageError(f"--dataset {url!r}: is a chain of URLs ('::'); name the last one alone")
    if url.startswith("hf://"):
        raise UsageError(f"--dataset {url!r}: a data set on the Hub is written owner/name")
    system, protocol = open_url(url)[0], url.partition("://")[0]
    system.invalidate_cache()  # what was listed an hour ago
    url = url.rstrip("/")
    folder = "*" not in url and not url.endswith(SUFFIX)
    if folder:
        found = retrying(lambda: system.find(url, detail=True))
    elif "*" in url:
        found = retrying(lambda: system.glob(url, detail=True))
    else:
        found = {url: retrying(lambda: system.info(url))}
    found = {path if "://" in path else f"{protocol}://{path}": known for path, known in sorted(found.items())}
    contents = {
        place: (int(known["size"] or 0), next((str(known[key]) for key in CONTENT if known.get(key)), ""))
        for place, known in found.items()
        if place.endswith(SUFFIX)
    }
    if not contents:
        raise FileNotFoundError(url)
    if not folder:
        return ParquetFiles({None: tuple(contents)}, contents=contents)
    path = system._strip_protocol(url)
    return ParquetFiles(_splits(path if "://" in path else f"{protocol}://{path}", list(contents)), contents=contents)


def _splits(folder: str, places: list[str]) -> dict[str | None, tuple[str, ...]]:
    """Which splits a folder's files belong to, by the library's own patterns.

    These are tried one after the other, each with a listing of its own; so on a copy of the names, in memory.
    """
    import fsspec
    from datasets.data_files import DataFilesDict, get_data_patterns

    memory, root = fsspec.filesystem("memory"), f"memory:///{uuid4().hex}"
    try:
        for place in places:
            memory.pipe_file(root + place.removeprefix(folder), b"")
        found = DataFilesDict.from_patterns(get_data_patterns(root), base_path=root, allowed_extensions=[SUFFIX])
        return {
            str(split): tuple(folder + str(name).removeprefix(root) for name in names)
            for split, names in found.items()
            if names
        }
    finally:
        for name in memory.find(root):
            memory.rm_file(name)


def _fingerprint(places: tuple[str, ...], contents: Mapping[str, tuple[int, str]]) -> str:
    """As `ParquetSplit` has it."""
    files: list[Any] = list(places)
    if contents:
        folder = os.path.commonprefix([place.split("/")[:-1] for place in places])  # noqa: RUF071 - of lists
        files = [[place.split("/")[len(folder) :], *contents[place]] for place in places]
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()
