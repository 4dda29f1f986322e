"""Publishing a model folder on the Hugging Face Hub, with huggingface_hub and nothing else."""

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from dpo_fast.errors import CheckpointError, HubError, InputError, UsageError
from dpo_fast.text import one_line

if TYPE_CHECKING:
    from huggingface_hub import HfApi

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")
# Formats that run code when they are loaded; a Trainer leaves several of them beside the weights.
PICKLE_SUFFIXES = frozenset({".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth"})
# Weights of an earlier push, under other names, would be loaded in the place of the new ones: `from_pretrained` takes
# model.safetensors before an index of shards.
WEIGHT_PATTERNS = ["model*.safetensors", "model.safetensors.index.json", "adapter_model*.safetensors"]


def push(
    folder: Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | None = None,
) -> str:
    """Upload a model folder, weights as they are, to a model repository on the Hub; create it where there is none.

    Everything in the folder goes. Weights of an earlier push that this one does not replace are deleted in the same
    commit; other files stay. The Hub is the one that HF_ENDPOINT names. Nothing is sent before the folder and the
    arguments have been checked.

    Args:
        folder: a Transformers or PEFT folder: config, `*.safetensors`, tokenizer, README.md.
        repo_id: the repository, `user/name`.
        private: make a new repository private; an existing public one is refused. When False, a new repository has
            its owner's default visibility, and an existing one keeps its own.
        revision: the branch to commit to, created from main where there is none, or `refs/pr/N`; main when None.
        commit_message: the commit's title.
        token: a write token; when None, the one of HF_TOKEN or of `hf auth login`.

    Returns:
        The commit's URL.

    Raises:
        UsageError: `repo_id` is not of the form `user/name`.
        CheckpointError: the folder is not a whole model folder, or holds files that should not be published.
        HubError: no token, offline, or the Hub refused, failed or could not be reached.
    """
    import huggingface_hub
    from huggingface_hub import HfApi

    _check_repo_id(repo_id)
    _check_folder(folder)
    if huggingface_hub.is_offline_mode():
        raise HubError(f"cannot push to {repo_id!r} offline: unset HF_HUB_OFFLINE")
    # Nothing but huggingface_hub runs in here, and it lets through what its HTTP client, its Xet client and its JSON
    # parser raise: all of it means that the push failed. `from None`, as their messages may hold the token.
    try:
        token = (token or huggingface_hub.get_token() or "").strip()
        if not token:
            raise HubError("no Hugging Face token: run `hf auth login`, or set HF_TOKEN to a token with write access")
        if not re.fullmatch(r"[!-~]+", token):
            raise HubError("the Hugging Face token holds blanks or other characters that none has: copy it again")
        api = HfApi(token=token, library_name="dpo_fast")
        _create_repository(api, repo_id, private=private, revision=revision)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message or "Upload with dpo_fast",
            delete_patterns=WEIGHT_PATTERNS,
        )
    except InputError:
        raise
    except Exception as error:
        raise HubError(_redact(_explain(error, repo_id), token)) from None
    return str(commit.commit_url)


def _create_repository(api: "HfApi", repo_id: str, *, private: bool, revision: str | None) -> None:
    """Create the repository and the branch where there are none."""
    # None, not False: an organisation whose repositories are private by default stays so.
    api.create_repo(repo_id, private=private or None, exist_ok=True)
    # An existing repository keeps its visibility, whatever was asked for.
    if private and not api.model_info(repo_id).private:
        raise HubError(f"{repo_id!r} exists and is public: make it private on the Hub, or push without --private")
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)


def _check_repo_id(repo_id: str) -> None:
    """Refuse what is not `user/name`; without a user the Hub's client would guess one."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo_id)
        valid = repo_id.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        raise UsageError(f"--repo-id {one_line(repr(repo_id))} must be 'user/name', in letters, digits and -_.")


def _check_folder(folder: Path) -> None:
    """Refuse a folder that is not a whole model, or that holds what nobody means to publish."""
    if not folder.is_dir():
        raise CheckpointError(f"{str(folder)!r} is not a folder; give the folder of a saved model")
    root = folder.resolve()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        shown = one_line(repr(str(name)))
        if any(part.startswith(".") for part in name.parts):
            raise CheckpointError(f"{shown} in {str(folder)!r} is a hidden file, not published: move or delete it")
        # realpath, as resolve() raises on a link that leads to itself.
        if not Path(os.path.realpath(path)).is_relative_to(root):
            raise CheckpointError(f"{shown} in {str(folder)!r} links to a file outside of it: put a copy in its place")
        if path.suffix.lower() in PICKLE_SUFFIXES:
            raise CheckpointError(f"{shown} in {str(folder)!r} may be a pickle, not published: move or delete it")
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise CheckpointError(f"{str(folder)!r} has no config.json: give a folder that save_pretrained wrote")
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(f"{str(folder)!r} has no *.safetensors: save the model with safe serialization")
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise CheckpointError(f"{str(folder)!r} has no tokenizer: save the tokenizer beside the model")
    _check_shards(folder)


def _check_shards(folder: Path) -> None:
    """Refuse a sharded model of which a shard is missing."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{str(index)!r} is not an index of shards: save the model again") from error
    for shard in sorted(map(str, shards)):
        if not (folder / shard).is_file():
            raise CheckpointError(f"{one_line(repr(shard))}, a shard in {str(index)!r}, is missing: save it again")


def _explain(error: BaseException, repo_id: str) -> str:
    """One line on what went wrong and what to do."""
    import httpx2
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    # An upload in a thread arrives wrapped in a RuntimeError.
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    # Without the user and password that an address can hold.
    host = urlsplit(constants.ENDPOINT).netloc.rpartition("@")[2]
    if isinstance(error, HfHubHTTPError):
        return _explain_status(error.response.status_code, error.server_message, repo_id, host)
    if isinstance(error, OfflineModeIsEnabled):
        return f"cannot push to {repo_id!r} offline: unset HF_HUB_OFFLINE"
    if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.ProxyError):
        return f"cannot reach {host} ({one_line(error)}): check the network, the proxy and HF_ENDPOINT"
    if isinstance(error, httpx2.TransportError):
        return f"the connection to {host} broke off ({one_line(error)}): push again, what has arrived is not sent twice"
    if isinstance(error, OSError) and error.filename is not None:
        return f"cannot read {one_line(repr(str(error.filename)))} ({error.strerror}): check its permissions"
    if isinstance(error, OSError):
        # hf_xet's errors, which carry no status: ConnectionError, XetAuthenticationError (a PermissionError) and such.
        return (
            f"{host} did not take the weights into its Xet storage ({one_line(error)}): check that the token may write"
            f" to {repo_id!r}, then push again, or upload without Xet by HF_HUB_DISABLE_XET=1"
        )
    if isinstance(error, json.JSONDecodeError | KeyError):
        return f"{host} did not answer as a Hub does ({one_line(error)}): check HF_ENDPOINT, or push again later"
    return f"the push to {repo_id!r} failed ({type(error).__name__}: {one_line(error)}): mend it, then push again"


def _explain_status(status: int, server_message: str | None, repo_id: str, host: str) -> str:
    """What an HTTP status means for a push, the Hub's own words, and what to do."""
    reason = f"{status}: {one_line(server_message)}" if server_message else str(status)
    if status == 401:
        return f"{host} did not accept the token ({reason}): run `hf auth login`, or set HF_TOKEN to a valid token"
    if status == 403:
        return f"the token may not write to {repo_id!r} ({reason}): use one with write access, or another --repo-id"
    if status == 404:
        return f"{host} has no {repo_id!r} for this token ({reason}): check --repo-id, the revision and the token"
    if status in (409, 412):
        return f"{repo_id!r} changed at the same time ({reason}): wait for the other change, then push again"
    if status == 429:
        return f"{host} has had too many requests ({reason}): wait some minutes, then push again"
    if status >= 500:
        return f"{host} failed ({reason}): push again later, what has arrived is not sent twice"
    return f"{host} refused the push to {repo_id!r} ({reason}): mend it, then push again"


def _redact(message: str, token: str | None) -> str:
    """Take the token out, and whatever else looks like one."""
    if token:
        message = message.replace(token, "hf_***")
    return re.sub(r"hf_[A-Za-z0-9]{4,}|(?<=Bearer )\S+", "hf_***", message)
