"""Publishing files on the Hugging Face Hub, with huggingface_hub and nothing else."""

import glob
import json
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from dpo_fast.errors import HubError, InputError, UsageError
from dpo_fast.text import one_line, without_secrets

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# What an earlier push may have left, and what would be taken for this one's: weights under other names, as
# `from_pretrained` takes model.safetensors before an index of shards; graphs and numbers of other weights.
_GRAPH = re.compile(r"(policy|reference)(\.[^/]+)?\.onnx")  # the reference's: an adapter's, which the policy is beneath
_STALE = re.compile(
    r"model(-[^/]+)?\.safetensors|model\.safetensors\.index\.json|adapter_model(-[^/]+)?\.safetensors"
    r"|engines/[^/]+/(policy|reference)\.[^/]+|\.eval_results/dpo_fast\.yaml"
    r"|plots/(margin_histogram|accuracy_by_subset)\.png"
)
_BENEATH_A_GRAPH = re.compile(r"(base|reference)/[^/]+\.safetensors")  # ours only where a graph is


def push(
    files: Mapping[str, Path],
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
) -> str:
    """Upload files, as they are, to a model repository on the Hub; create it where there is none.

    What an earlier push left and this one does not replace (weights, graphs, plots) is deleted in the same commit;
    other files stay. Files that the Hub has are not sent again, so a push that broke off goes on when it is run again.
    If somebody else commits in the meantime, nothing is committed. The Hub is the one that HF_ENDPOINT names.

    With hf_xet, which huggingface_hub brings along, uploads that take longer than five minutes may be several commits.

    Args:
        files: on this disk, by path in the repository.
        repo_id: the repository, `user/name`.
        private: make a new repository private; an existing public one is refused. When False, a new repository has
            its owner's default visibility, and an existing one keeps its own.
        revision: the branch to commit to, created from main where there is none, or `refs/pr/N`; main when None.
        commit_message: the commit's title.
        create_pr: open a pull request against main instead of committing to it.
        token: a write token; when None, the one of HF_TOKEN or of `hf auth login`.

    Returns:
        The commit's URL, or the pull request's.

    Raises:
        UsageError: `repo_id` is not of the form `user/name`.
        HubError: no token, offline, or the Hub refused, failed or could not be reached.
    """
    from huggingface_hub import HfApi

    check_repo_id(repo_id)
    token = find_token(repo_id, token)
    # Nothing but huggingface_hub runs in here, and it lets through what its HTTP client, its Xet client and its JSON
    # parser raise: all of it means that the push failed. `from None`, as their messages may hold the token.
    try:
        api = HfApi(token=token, library_name="dpo_fast")
        with tempfile.TemporaryDirectory(prefix="dpo-fast-push-") as folder, _quiet_client():
            for name, path in files.items():
                link = Path(folder, name)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(path.resolve())
            parent, there = _prepare_repository(api, repo_id, private=private, revision=revision)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=revision,
                commit_message=commit_message or "Upload with dpo_fast",
                delete_patterns=[glob.escape(name) for name in stale_files(there)],
                create_pr=create_pr,
                parent_commit=parent,
            )
    except InputError:
        raise
    except Exception as error:
        raise HubError(_explain(error, repo_id, token)) from None
    return str(commit.pr_url or commit.commit_url)


def stale_files(names: Iterable[str]) -> list[str]:
    """Those of a repository's files that an earlier push has left, as far as names can tell; no others are deleted.

    Args:
        names: paths in the repository.
    """
    names = list(names)
    stale = [name for name in names if _GRAPH.fullmatch(name)]
    if stale:
        stale += [name for name in names if _BENEATH_A_GRAPH.fullmatch(name)]
    return stale + [name for name in names if _STALE.fullmatch(name)]


def find_token(repo_id: str, token: str | None = None) -> str:
    """The token that a push to a repository is made with.

    Raises:
        HubError: there is none, or the Hub's client is offline.
    """
    import huggingface_hub

    if huggingface_hub.is_offline_mode():
        raise HubError(f"cannot push to {repo_id!r} offline: unset HF_HUB_OFFLINE")
    token = (token or huggingface_hub.get_token() or "").strip()
    if not token:
        raise HubError("no Hugging Face token: run `hf auth login`, or set HF_TOKEN to a token with write access")
    if not re.fullmatch(r"[!-~]+", token):
        raise HubError("the Hugging Face token holds blanks or other characters that none has: copy it again")
    return token


def check_repo_id(repo_id: str) -> None:
    """Refuse what is not `user/name`; without a user the Hub's client would guess one.

    Raises:
        UsageError: it is not.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo_id)
        valid = repo_id.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        raise UsageError(f"--repo-id {one_line(repr(repo_id))} must be 'user/name', in letters, digits and -_.")


def _prepare_repository(
    api: "HfApi", repo_id: str, *, private: bool, revision: str | None
) -> tuple[str | None, list[str]]:
    """Create the repository and the branch where there are none; the commit at the branch's head, and its files."""
    # None, not False: an organisation whose repositories are private by default stays so.
    api.create_repo(repo_id, private=private or None, exist_ok=True)
    info = api.model_info(repo_id)
    # An existing repository keeps its visibility, whatever was asked for.
    if private and not info.private:
        raise HubError(f"{repo_id!r} exists and is public: make it private on the Hub, or push without --private")
    if revision is not None:
        if not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        info = api.model_info(repo_id, revision=revision)
    return info.sha, [file.rfilename for file in info.siblings or ()]


@contextmanager
def _quiet_client() -> Iterator[None]:
    """Within the block huggingface_hub logs errors alone, and draws bars for people only.

    Its warnings quote answers of the server as they are.
    """
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
        logging,
    )

    verbosity, has_bars = logging.get_verbosity(), not are_progress_bars_disabled()
    if not sys.stderr.isatty():
        disable_progress_bars()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            enable_progress_bars()


def _explain(error: BaseException, repo_id: str, token: str) -> str:
    """One line on what went wrong and what to do."""
    import httpx2
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    # An upload in a thread arrives wrapped in a RuntimeError.
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    said = one_line(_redact(str(error), token))
    # Without the user and password that an address can hold.
    host = urlsplit(constants.ENDPOINT).netloc.rpartition("@")[2]
    if isinstance(error, HfHubHTTPError):
        reason = one_line(_redact(error.server_message or "", token))
        return _explain_status(error.response.status_code, reason, repo_id, host)
    if isinstance(error, OfflineModeIsEnabled):
        return f"cannot push to {repo_id!r} offline: unset HF_HUB_OFFLINE"
    if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.ProxyError):
        return f"cannot reach {host} ({said}): check the network, the proxy and HF_ENDPOINT"
    if isinstance(error, httpx2.TransportError):
        return f"the connection to {host} broke off ({said}): push again, what has arrived is not sent twice"
    if isinstance(error, OSError) and error.filename is not None:
        return f"cannot read {one_line(repr(str(error.filename)))} ({error.strerror}): check its permissions"
    if isinstance(error, OSError):
        # hf_xet's errors, which carry no status: ConnectionError, XetAuthenticationError (a PermissionError) and such.
        return (
            f"{host} did not take the weights into its Xet storage ({said}): check that the token may write"
            f" to {repo_id!r}, then push again, or upload without Xet by HF_HUB_DISABLE_XET=1"
        )
    if isinstance(error, json.JSONDecodeError | KeyError):
        return f"{host} did not answer as a Hub does ({said}): check HF_ENDPOINT, or push again later"
    return f"the push to {repo_id!r} failed ({type(error).__name__}: {said}): mend it, then push again"


def _explain_status(status: int, reason: str, repo_id: str, host: str) -> str:
    """What an HTTP status means for a push, the Hub's own words, and what to do."""
    reason = f"{status}: {reason}" if reason else str(status)
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


def _redact(message: str, token: str) -> str:
    """Take the token out, wherever it came from, and whatever else is secret; before anything is cut off."""
    return without_secrets(message.replace(token, "hf_***"))
