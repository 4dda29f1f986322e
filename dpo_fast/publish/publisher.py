"""A bundle's policy to the Hub: its card is brought up to date, its folder checked, then uploaded."""

import json
from pathlib import Path
from typing import Any

from dpo_fast.bundle import POLICY, Bundle, open_bundle
from dpo_fast.errors import UsageError
from dpo_fast.evaluate import METRICS
from dpo_fast.publish.card import write_card
from dpo_fast.publish.hub import push


def push_bundle(
    folder: Path,
    repo_id: str,
    *,
    private: bool = False,
    run: Path | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
) -> str:
    """Upload a bundle's `policy/`: the original weights, the tokenizer and the model card.

    Args:
        folder: the bundle.
        repo_id: ``user/name``.
        private: whether a new repository is private.
        run: a run of this bundle whose numbers go on the card; None takes the card as the last evaluation left it.
        revision: the branch to commit to; the main one by default.
        commit_message: the commit's title.

    Returns:
        The commit's URL.

    Raises:
        BundleError: the bundle is damaged or was altered.
        UsageError: the run is not of this bundle, or the repository's name cannot be one.
        HubError: the Hub refused, or could not be reached.
    """
    bundle = open_bundle(folder)
    bundle.verify()
    if run is not None:
        metrics = _metrics_of(run, bundle)
        write_card(bundle.model_folder(POLICY), metrics, base_model=bundle.base_model, repo_id=repo_id)
    return push(bundle.model_folder(POLICY), repo_id, private=private, revision=revision, commit_message=commit_message)


def _metrics_of(run: Path, bundle: Bundle) -> dict[str, Any]:
    """A finished run's metrics, if they are this bundle's."""
    path = run / METRICS
    try:
        metrics: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        scored = metrics["provenance"]["models"][POLICY]["weights_and_graph_sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--run {run}: holds no readable {METRICS}; name a folder that `evaluate` wrote") from error
    if scored != bundle.role_hashes(POLICY):
        raise UsageError(f"--run {run}: was made with other weights than this bundle's; evaluate this bundle")
    return metrics
