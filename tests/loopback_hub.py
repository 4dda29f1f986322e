"""A Hugging Face Hub on 127.0.0.1, of standard-library parts: as much of its protocol as a push and a download use.

It answers what huggingface_hub 2.4 asks in `create_repo`, `create_branch`, `upload_folder` (by LFS: with
HF_HUB_DISABLE_XET=1), `model_info`, `list_repo_tree` and `hf_hub_download`, and, of data sets (`hub.add_dataset`), what
`datasets.load_dataset_builder` and HfFileSystem ask, ranges of bytes included, so that

    with LoopbackHub() as hub:
        HF_ENDPOINT=hub.url HF_TOKEN=hub.token HF_HUB_DISABLE_XET=1 …

is a Hub to any client process. It checks the token, verifies the SHA-256 of every LFS upload, records each request,
and fails on demand: `hub.faults["commit"] = 500` answers that step with a status, `CUT` breaks the connection off, and
`hub.before["commit"] = …` is called before that step is answered, once: what somebody else does in the meantime.
The steps are the names of the routes below.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml
from huggingface_hub import constants

CUT = "cut"
LFS_SUFFIXES = (".safetensors", ".onnx", ".plan", ".png")
REPO = r"(?P<repo>[^/]+/[^/]+)"
ROUTES = [
    ("create", "POST", r"/api/repos/create"),
    ("validate", "POST", r"/api/validate-yaml"),
    ("branch", "POST", rf"/api/models/{REPO}/branch/(?P<revision>[^/]+)"),
    ("pull_request", "POST", rf"/api/models/{REPO}/discussions"),
    ("discussion", "GET", rf"/api/models/{REPO}/discussions/(?P<number>\d+)"),
    ("preupload", "POST", rf"/api/models/{REPO}/preupload/(?P<revision>[^/]+)"),
    ("commit", "POST", rf"/api/models/{REPO}/commit/(?P<revision>[^/]+)"),
    ("lfs_batch", "POST", rf"/{REPO}\.git/info/lfs/objects/batch"),
    ("lfs_upload", "PUT", r"/lfs/(?P<sha>[0-9a-f]{64})"),
    ("lfs_verify", "POST", r"/lfs/verify"),
    ("xet_token", "GET", rf"/api/models/{REPO}/xet-write-token/(?P<revision>[^/]+)"),
    ("tree", "GET", rf"/api/models/{REPO}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?"),
    ("info", "GET", rf"/api/models/{REPO}(?:/revision/(?P<revision>[^/]+))?"),
    ("dataset_tree", "GET", rf"/api/datasets/{REPO}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?"),
    ("dataset_info", "GET", rf"/api/datasets/{REPO}(?:/revision/(?P<revision>[^/]+))?"),
    ("dataset_resolve", "GET|HEAD", rf"/datasets/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)"),
    ("resolve", "GET|HEAD", rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)"),
]


@dataclass
class Blob:
    """A file of a commit."""

    content: bytes
    is_lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def git_sha1(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.git_sha1


@dataclass
class Repository:
    """Commits by id, and the branches that point to them."""

    private: bool
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, Blob], message: str) -> str:
        self.messages.append(message)
        oid = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        return oid

    def resolve(self, revision: str | None) -> str | None:
        return revision if revision in self.commits else self.branches.get(revision or "main")

    def files(self, revision: str = "main") -> dict[str, Blob]:
        return self.commits[self.branches[revision]]


@dataclass
class Request:
    """A request as it came in, and how many bytes of a file were sent."""

    step: str
    method: str
    path: str
    authorization: str | None
    body: bytes
    query: dict[str, list[str]] = field(default_factory=dict)
    range: str | None = None
    sent: int = 0

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class LoopbackHub:
    """The server; a context manager that serves from a thread of its own.

    Attributes:
        token: a token that may write.
        read_token: a token that may only read.
        url: what HF_ENDPOINT must be.
        faults: by step, the HTTP status to answer with, or CUT.
        fault_after: by step, how many requests are answered well before its fault begins.
        fault_times: by step, how often its fault happens; without it, every time.
        before: by step, what is called once, before the step is answered.
        requests: everything that was asked, in order.
        repositories: by `user/name`; data sets by `datasets/user/name`.
    """

    token = "hf_LoopbackWriteToken0123456789"
    read_token = "hf_LoopbackReadToken0123456789"

    def __init__(self) -> None:
        self.faults: dict[str, int | str] = {}
        self.fault_after: dict[str, int] = {}
        self.fault_times: dict[str, int] = {}
        self.before: dict[str, Callable[[], None]] = {}
        self.requests: list[Request] = []
        self.repositories: dict[str, Repository] = {}
        self.lfs_objects: dict[str, bytes] = {}
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("_BoundHandler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "LoopbackHub":
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def add_dataset(self, name: str, files: dict[str, bytes], message: str = "files") -> str:
        """Put files into a data set's repository, in place of those that were there; the commit's id."""
        repository = self.repositories.setdefault(f"datasets/{name}", Repository(private=False))
        blobs = {path: Blob(content, path.endswith(".parquet")) for path, content in files.items()}
        return repository.commit("main", blobs, message)

    def steps(self) -> list[str]:
        """The steps that were asked, in order."""
        return [request.step for request in self.requests]

    def environment(self, home: Any) -> dict[str, str]:
        """The variables that make this the Hub of a client process with its own, empty home."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": self.token,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }


@contextmanager
def hub_of_this_process(monkeypatch: pytest.MonkeyPatch, home: Path) -> Iterator[LoopbackHub]:
    """A Hub that huggingface_hub in this process talks to; it has read its environment already, hence the constants."""
    with LoopbackHub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "no-token"))
        monkeypatch.setenv("HF_TOKEN", hub.token)
        monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
        # Its five retries wait 23 seconds in all.
        monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda seconds: None))
        yield hub


class _Refusal(Exception):
    """An error answer; the headers are those from which huggingface_hub tells what is missing."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Headers and body in one packet, at once: or each answer waits for a delayed acknowledgement.
    wbufsize = -1
    disable_nagle_algorithm = True
    hub: LoopbackHub

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet; `hub.requests` is the log."""

    def _serve(self) -> None:
        path = urlsplit(self.path).path
        step, match = "unknown", None
        for name, methods, pattern in ROUTES:
            if match is None and self.command in methods.split("|") and (match := re.fullmatch(pattern, path)):
                step = name
        fault = self._fault(step)
        length = int(self.headers.get("Content-Length", 0))
        if fault == CUT:
            # After half of what is sent, so that an upload breaks off in its middle.
            self.rfile.read(length // 2)
            self.hub.requests.append(Request(step, self.command, path, self.headers.get("Authorization"), b""))
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        body = self.rfile.read(length)
        query = parse_qs(urlsplit(self.path).query)
        range_ = self.headers.get("Range")
        request = Request(step, self.command, path, self.headers.get("Authorization"), body, query, range_)
        with self.hub.lock:
            self.hub.requests.append(request)
            self.hub.before.pop(step, lambda: None)()
            try:
                if isinstance(fault, int):
                    # What a careless server might do: say the token back.
                    raise _Refusal(fault, f"fault at {step}, asked with {request.authorization}")
                if match is None:
                    raise _Refusal(404, f"no such route: {self.command} {path}")
                values = {name: value and unquote(value) for name, value in match.groupdict().items()}
                self._check_token(step)
                getattr(self, f"_{step}")(request, **values)
            except _Refusal as refusal:
                self._answer(refusal.status, {"error": str(refusal)}, refusal.headers)

    def _fault(self, step: str) -> int | str | None:
        """The fault of a step, once as many requests as it waits for were answered."""
        with self.hub.lock:
            waiting = self.hub.fault_after.get(step, 0)
            self.hub.fault_after[step] = max(0, waiting - 1)
            if not waiting and step in self.hub.faults and step in self.hub.fault_times:
                self.hub.fault_times[step] -= 1
                waiting = self.hub.fault_times[step] < 0
        return None if waiting else self.hub.faults.get(step)

    def _check_token(self, step: str) -> None:
        if step in ("lfs_upload", "lfs_verify"):
            return  # the real ones are signed addresses, to which no token is sent
        authorization = self.headers.get("Authorization")
        known = (f"Bearer {self.hub.token}", f"Bearer {self.hub.read_token}")
        if authorization is not None and authorization not in known:
            raise _Refusal(401, "Invalid credentials in Authorization header")
        if step.removeprefix("dataset_") in ("tree", "info", "resolve", "validate", "discussion"):
            return
        if authorization is None:
            raise _Refusal(401, "Invalid username or password.")
        if authorization != known[0]:
            raise _Refusal(403, "Forbidden: you must use a write token to do this.")

    def _answer(self, status: int, payload: Any, headers: dict[str, str] | None = None) -> None:
        content = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _repository(self, repo: str) -> Repository:
        found = self.hub.repositories.get(repo)
        if found is None or (found.private and self.headers.get("Authorization") is None):
            raise _Refusal(404, "Repository not found", "RepoNotFound")
        return found

    def _commit_id(self, repository: Repository, revision: str | None) -> str:
        oid = repository.resolve(revision)
        if oid is None:
            raise _Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid

    # One method a route.

    def _create(self, request: Request) -> None:
        repo = f"{request.json['organization']}/{request.json['name']}"
        url = f"{self.hub.url}/{repo}"
        if repo in self.hub.repositories:
            self._answer(409, {"error": "You already created this model repo", "url": url})
            return
        repository = Repository(private=request.json.get("visibility") == "private")
        repository.commit("main", {".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)}, "initial commit")
        self.hub.repositories[repo] = repository
        self._answer(200, {"url": url, "name": repo})

    def _validate(self, request: Request) -> None:
        content = request.json["content"]
        try:
            if not isinstance(yaml.safe_load(content.split("---\n")[1]), dict):
                raise yaml.YAMLError("not a mapping")
        except (IndexError, yaml.YAMLError) as error:
            self._answer(400, {"errors": [{"message": str(error)}], "warnings": []})
            return
        self._answer(200, {"errors": [], "warnings": []})

    def _branch(self, request: Request, repo: str, revision: str) -> None:
        repository = self._repository(repo)
        if revision in repository.branches:
            raise _Refusal(409, "Reference already exists")
        repository.branches[revision] = repository.branches["main"]
        self._answer(200, {})

    def _preupload(self, request: Request, repo: str, revision: str) -> None:
        repository = self._repository(repo)
        files = repository.commits[self._commit_id(repository, revision)]
        answer = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
                "shouldIgnore": False,
                "oid": files[file["path"]].etag if file["path"] in files else None,
            }
            for file in request.json["files"]
        ]
        self._answer(200, {"files": answer})

    def _lfs_batch(self, request: Request, repo: str) -> None:
        self._repository(repo)
        objects: list[dict[str, Any]] = []
        for item in request.json["objects"]:
            answer = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.lfs_objects:
                answer["actions"] = {
                    "upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"},
                    "verify": {"href": f"{self.hub.url}/lfs/verify"},
                }
            objects.append(answer)
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _lfs_upload(self, request: Request, sha: str) -> None:
        if hashlib.sha256(request.body).hexdigest() != sha:
            raise _Refusal(400, "the content is not what its SHA-256 says")
        self.hub.lfs_objects[sha] = request.body
        self._answer(200, b"")

    def _lfs_verify(self, request: Request) -> None:
        content = self.hub.lfs_objects.get(request.json["oid"])
        if content is None or len(content) != request.json["size"]:
            raise _Refusal(404, "the object has not arrived")
        self._answer(200, {})

    def _pull_request(self, request: Request, repo: str) -> None:
        repository = self._repository(repo)
        number = 1 + sum(branch.startswith("refs/pr/") for branch in repository.branches)
        repository.branches[f"refs/pr/{number}"] = repository.branches["main"]
        self._answer(200, {"num": number, "url": f"{self.hub.url}/{repo}/discussions/{number}"})

    def _discussion(self, request: Request, repo: str, number: str) -> None:
        self._commit_id(self._repository(repo), f"refs/pr/{number}")
        opened = {"title": "", "num": int(number), "createdAt": "2026-01-01T00:00:00.000Z", "status": "draft"}
        changes = {"isPullRequest": True, "changes": {"base": "refs/heads/main"}, "filesWithConflicts": []}
        self._answer(200, {**opened, **changes, "repo": {"name": repo, "type": "model"}, "events": []})

    def _commit(self, request: Request, repo: str, revision: str) -> None:
        repository = self._repository(repo)
        head = self._commit_id(repository, revision)
        files = dict(repository.commits[head])
        answer = {}
        if "create_pr" in request.query:
            number = 1 + sum(branch.startswith("refs/pr/") for branch in repository.branches)
            revision = f"refs/pr/{number}"
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo}/discussions/{number}"
        message = ""
        for line in request.body.splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "header":
                message = value["summary"]
                if value.get("parentCommit", head) != head:
                    raise _Refusal(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif key == "lfsFile":
                if value["oid"] not in self.hub.lfs_objects:
                    raise _Refusal(400, f"{value['path']}: its LFS object has not been uploaded")
                files[value["path"]] = Blob(self.hub.lfs_objects[value["oid"]], True)
            elif key == "deletedFile":
                del files[value["path"]]
            else:
                raise _Refusal(400, f"unknown operation {key}")
        oid = repository.commit(revision, files, message)
        self._answer(200, {"commitUrl": f"{self.hub.url}/{repo}/commit/{oid}", "commitOid": oid, **answer})

    def _xet_token(self, request: Request, repo: str, revision: str) -> None:
        raise _Refusal(404, "this Hub has no Xet storage")

    def _info(self, request: Request, repo: str, revision: str | None) -> None:
        repository = self._repository(repo)
        oid = self._commit_id(repository, revision)
        siblings = [{"rfilename": path} for path in sorted(repository.commits[oid])]
        info = {"_id": repo, "id": repo, "modelId": repo, "sha": oid, "private": repository.private, "tags": []}
        self._answer(200, {**info, "siblings": siblings})

    def _tree(self, request: Request, repo: str, revision: str, path: str | None) -> None:
        repository = self._repository(repo)
        files = repository.commits[self._commit_id(repository, revision)]
        prefix = f"{path}/" if path else ""
        entries = []
        for name, blob in sorted(files.items()):
            if name.startswith(prefix):
                entry: dict[str, Any] = {"type": "file", "path": name, "size": len(blob.content), "oid": blob.git_sha1}
                if blob.is_lfs:
                    entry["lfs"] = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": 134}
                entries.append(entry)
        if not entries:
            raise _Refusal(404, f"{path} does not exist on {revision}", "EntryNotFound")
        self._answer(200, entries)

    def _resolve(self, request: Request, repo: str, revision: str, path: str) -> None:
        repository = self._repository(repo)
        oid = self._commit_id(repository, revision)
        blob = repository.commits[oid].get(path)
        if blob is None:
            raise _Refusal(404, "Entry not found", "EntryNotFound")
        headers = {"X-Repo-Commit": oid, "ETag": f'"{blob.etag}"'}
        if blob.is_lfs:
            headers |= {"X-Linked-ETag": f'"{blob.etag}"', "X-Linked-Size": str(len(blob.content))}
        self._answer(200, blob.content, headers)

    def _dataset_info(self, request: Request, repo: str, revision: str | None) -> None:
        self._info(request, f"datasets/{repo}", revision)

    def _dataset_tree(self, request: Request, repo: str, revision: str, path: str | None) -> None:
        """As `_tree`; but where only a folder's own entries are asked for, those of folders in it stand for them."""
        repository = self._repository(f"datasets/{repo}")
        files = repository.commits[self._commit_id(repository, revision)]
        prefix = f"{path}/" if path else ""
        entries: dict[str, dict[str, Any]] = {}
        for name, blob in sorted(files.items()):
            folders = [name[:end] for end, character in enumerate(name) if character == "/" and end > len(prefix)]
            if not name.startswith(prefix):
                continue
            for folder in folders:
                entries[folder] = {
                    "type": "directory",
                    "path": folder,
                    "size": 0,
                    "oid": hashlib.sha1(folder.encode()).hexdigest(),
                }
            entries[name] = {"type": "file", "path": name, "size": len(blob.content), "oid": blob.git_sha1}
            if blob.is_lfs:
                entries[name]["lfs"] = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": 134}
        if request.query.get("recursive", ["false"])[0].lower() != "true":
            entries = {name: entry for name, entry in entries.items() if "/" not in name.removeprefix(prefix)}
        if path and not entries:
            raise _Refusal(404, f"{path} does not exist on {revision}", "EntryNotFound")
        self._answer(200, list(entries.values()))

    def _dataset_resolve(self, request: Request, repo: str, revision: str, path: str) -> None:
        """A file, or a range of its bytes."""
        repository = self._repository(f"datasets/{repo}")
        oid = self._commit_id(repository, revision)
        blob = repository.commits[oid].get(path)
        if blob is None:
            raise _Refusal(404, "Entry not found", "EntryNotFound")
        headers = {"X-Repo-Commit": oid, "ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
        content, status = blob.content, 200
        if request.range is not None:
            first, _, last = request.range.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last), len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            content, status = content[start : end + 1], 206
        if self.command == "GET":
            request.sent = len(content)
        self._answer(status, content, headers)
