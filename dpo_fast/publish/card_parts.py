"""The parts of a model card that people read, filled from files; only the templates themselves are Markdown."""

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dpo_fast.publish.graphs import PublishedGraph
from dpo_fast.publish.values import (
    ACCURACY,
    MARGIN,
    METRIC_LABELS,
    as_interval,
    as_mapping,
    as_number,
    as_text,
    dataset_of,
    is_hub_id,
    is_on_hub,
    loss_of,
)
from dpo_fast.publish.verified import Verified

UNKNOWN = "–"
SHOWN_GROUPS = 50
PLACEHOLDER = "user/name"


class _Literal(str):
    """Text of a form that needs no escaping, for code and addresses, where a backslash would be printed."""


def render_evaluation(
    metrics: Mapping[str, Any] | None, *, base_model: Any, library_name: Any, plots: Mapping[str, str]
) -> str:
    """Render what the model is and what an evaluation found.

    Args:
        metrics: the content of a run's metrics.json, or None where no evaluation has been run. Keys may be missing.
        base_model: of the front matter; anything but a Hub id is left out.
        library_name: of the front matter.
        plots: path in the repository by what the plot shows.
    """
    evaluation = metrics or {}
    dataset, split, revision = dataset_of(evaluation)
    groups = as_mapping(evaluation.get("groups"))
    rows = [{"key": _Literal(key), "label": label, **_cell(evaluation, key)} for key, label in METRIC_LABELS.items()]
    base_model = base_model if is_on_hub(base_model) else None
    return _render(
        "evaluation.md.jinja",
        base_model=base_model,
        base_model_url=_Literal(f"https://huggingface.co/{base_model}"),
        library_name=library_name,
        evaluated=metrics is not None,
        dataset=dataset,
        split=split,
        revision=revision,
        rows=[row for row in rows if row["value"] != UNKNOWN],
        aggregate=as_mapping(evaluation.get("provenance")).get("aggregate"),
        facts=_facts(evaluation),
        groups=[_group_row(name, groups[name]) for name in sorted(groups, key=str)[:SHOWN_GROUPS]],
        more_groups=max(0, len(groups) - SHOWN_GROUPS),
        plots=[{"title": title, "path": _Literal(path)} for title, path in plots.items()],
    )


def render_use(
    *, repo_id: str | None, library_name: Any, verified: Verified | None, graphs: Sequence[PublishedGraph]
) -> str:
    """Render what was verified, how the model is loaded, and how its graph is run.

    Args:
        repo_id: the Hub id that the card is published under; a placeholder stands in its place where it is unknown.
        library_name: of the front matter.
        verified: what a verification found of these very files.
        graphs: that lie in the repository.
    """
    return _render(
        "use.md.jinja",
        library_name=library_name,
        model_id=_Literal(repo_id if is_hub_id(repo_id) else PLACEHOLDER),
        model_id_is_placeholder=not is_hub_id(repo_id),
        verified=verified,
        graphs=[
            {
                "file": _Literal(graph.file),
                "engine": graph.engine,
                "precision": graph.precision,
                "is_exact": graph.is_exact,
                "gates": None if graph.gates is None else _Literal([float(gate) for gate in graph.gates]),
            }
            for graph in graphs
        ],
    )


def _render(template: str, **values: Any) -> str:
    """Fill a template; every value that it prints is escaped."""
    from importlib.resources import files

    from jinja2 import Environment, StrictUndefined

    # Not autoescape, which knows HTML but not Markdown: `finalize` passes every printed value through ours.
    environment = Environment(  # noqa: S701
        finalize=_escape, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = files("dpo_fast.publish").joinpath(template).read_text(encoding="utf-8")
    return environment.from_string(source).render(**values)


def _facts(metrics: Mapping[str, Any]) -> list[dict[str, str]]:
    """What the numbers were computed from and how, as far as the metrics say."""
    counts, provenance = as_mapping(metrics.get("counts")), as_mapping(metrics.get("provenance"))
    settings = as_mapping(provenance.get("settings"))
    loss_types, beta = loss_of(metrics)
    pairs = as_text(counts.get("pairs"))
    details = [f"{name} {text}" for name in ("ties", "truncated", "skipped") if (text := as_text(counts.get(name)))]
    values = {
        "Pairs": pairs and pairs + (f" ({', '.join(details)})" if details else ""),
        "First rows only": as_text(provenance.get("limit")),
        "Loss type": loss_types,
        "Beta": beta,
        "Scored without a reference": as_text(settings.get("reference_free")),
        "Engine": as_text(provenance.get("engine")),
        "Precision": as_text(provenance.get("precision")),
    }
    return [{"label": label, "value": value} for label, value in values.items() if value]


def _group_row(name: Any, group: Any) -> dict[str, Any]:
    """One row of the table of groups."""
    group = as_mapping(group)
    return {
        "name": as_text(name) or UNKNOWN,
        "pairs": as_text(group.get("pairs")) or UNKNOWN,
        "ties": as_text(group.get("ties")) or UNKNOWN,
        "accuracy": _cell(group, ACCURACY),
        "margin": _cell(group, MARGIN),
    }


def _cell(metrics: Mapping[str, Any], key: str) -> dict[str, str]:
    """A metric and its interval, five significant digits each."""
    value, interval = as_number(metrics.get(key)), as_interval(metrics, key)
    return {
        "value": UNKNOWN if value is None else f"{value:.5g}",
        "interval": UNKNOWN if interval is None else f"{interval[0]:.5g} to {interval[1]:.5g}",
    }


def _escape(value: Any) -> str:
    """Make text mean itself in Markdown and in HTML: in a sentence, a table cell, a link's text."""
    if isinstance(value, _Literal):
        return str(value)
    return html.escape(re.sub(r"([\\`*_\[\]|~$])", r"\\\1", str(value)), quote=False)
