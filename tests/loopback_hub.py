"""A Hugging Face Hub on 127.0.0.1, of standard-library parts: as much of its protocol as a push and a download use.

It answers what huggingface_hub 2.4 asks in `create_repo`, `create_branch`, `upload_folder` (by LFS: with
HF_HUB_DISABLE_XET=1), `model_info`, `list_repo_tree` and `hf_hub_download`, so that

    with LoopbackHub() as hub:
        HF_ENDPOINT=hub.url HF_TOKEN=hub.token HF_HUB_DISABLE_XET=1 …

is a Hub to any client process. It checks the token, verifies the SHA-256 of every LFS upload, records each request,
and fails on demand: `hub.faults["commit"] = 500` answers that step with a status, `CUT` breaks the connection off.
The steps are the names of the routes below.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

CUT = "cut"
REPO = r"(?P<repo>[^/]+/[^/]+)"
ROUTES = [
    ("create", "POST", r"/api/repos/create"),
    ("validate", "POST", r"/api/validate-yaml"),
    ("branch", "POST", rf"/api/models/{REPO}/branch/(?P<revision>[^/]+)"),
    ("preupload", "POST", rf"/api/models/{REPO}/preupload/(?P<revision>[^/]+)"),
    ("commit", "POST", rf"/api/models/{REPO}/commit/(?P<revision>[^/]+)"),
    ("lfs_batch", "POST", rf"/{REPO}\.git/info/lfs/objects/batch"),
    ("lfs_upload", "PUT", r"/lfs/(?P<sha>[0-9a-f]{64})"),
    ("lfs_verify", "POST", r"/lfs/verify"),
    ("xet_token", "GET", rf"/api/models/{REPO}/xet-write-token/(?P<revision>[^/]+)"),
    ("tree", "GET", rf"/api/models/{REPO}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?"),
    ("info", "GET", rf"/api/models/{REPO}(?:/revision/(?P<revision>[^/]+))?"),
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
    """A request as it came in."""

    step: str
    method: str
    path: str
    authorization: str | None
    body: bytes

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
        requests: everything that was asked, in order.
        repositories: by `user/name`.
    """

    token = "hf_LoopbackWriteToken0123456789"
    read_token = "hf_LoopbackReadToken0123456789"

    def __init__(self) -> None:
        self.faults: dict[str, int | str] = {}
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
        fault = self.hub.faults.get(step)
        length = int(self.headers.get("Content-Length", 0))
        if fault == CUT:
            # After half of what is sent, so that an upload breaks off in its middle.
            self.rfile.read(length // 2)
            self.hub.requests.append(Request(step, self.command, path, self.headers.get("Authorization"), b""))
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        body = self.rfile.read(length)
        request = Request(step, self.command, path, self.headers.get("Authorization"), body)
        with self.hub.lock:
            self.hub.requests.append(request)
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

    def _check_token(self, step: str) -> None:
        if step in ("lfs_upload", "lfs_verify"):
            return  # the real ones are signed addresses, to which no token is sent
        authorization = self.headers.get("Authorization")
        known = (f"Bearer {self.hub.token}", f"Bearer {self.hub.read_token}")
        if authorization is not None and authorization not in known:
            raise _Refusal(401, "Invalid credentials in Authorization header")
        if step in ("tree", "info", "resolve", "validate"):
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
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
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

    def _commit(self, request: Request, repo: str, revision: str) -> None:
        repository = self._repository(repo)
        files = dict(repository.commits[self._commit_id(repository, revision)])
        message = ""
        for line in request.body.splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "header":
                message = value["summary"]
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
        self._answer(200, {"commitUrl": f"{self.hub.url}/{repo}/commit/{oid}", "commitOid": oid})

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
