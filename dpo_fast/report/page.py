"""The page: what of a report is there before any script runs."""

import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from dpo_fast.bundle import POLICY
from dpo_fast.report.charts import BAR_HEIGHT
from dpo_fast.report.data import EXCERPT_PAIRS, PER_NAT, TOKEN_PAIRS, TokenFiles, script_json
from dpo_fast.report.figures import CALIBRATION_BINS, Accuracy, Calibration, LengthBias, Scatter, largest
from dpo_fast.report.pairs import RunPairs
from dpo_fast.report.samples import Sample
from dpo_fast.report.sweeps import Sweep
from dpo_fast.report.verifications import ShownVerification
from dpo_fast.table import ROWS
from dpo_fast.text import one_line

SCRIPTS = ("loader.js", "tokens.js", "table.js", "charts.js")
SHOWN_SAMPLES = 50
SHOWN_SUBSETS_OF_TABLE = 200
ACCURACY_COLUMNS = ("", "pairs", "accuracy", "95 % interval", "mean margin")
PAIR_COLUMNS = (
    ("row", "row"),
    ("margin", "margin"),
    ("chosen", "reward, chosen"),
    ("rejected", "reward, rejected"),
    ("chosenTokens", "tokens, chosen"),
    ("rejectedTokens", "tokens, rejected"),
    ("difference", "difference"),
    ("truncated", "truncated"),
)


def render_page(
    pairs: RunPairs,
    subsets: list[Accuracy],
    lengths: LengthBias,
    reliability: Calibration,
    shown: Scatter,
    sweep: Sweep,
    files: TokenFiles,
    *,
    no_texts: str,
    samples: Sequence[Sample],
    verification: ShownVerification | None,
) -> str:
    """Render report.html.

    Args:
        pairs: of the run.
        subsets: accuracy by subset; none without `--group-by`.
        lengths: accuracy by length difference.
        reliability: of sigmoid(margin).
        shown: which pairs the figures draw as points.
        sweep: every loss at every beta.
        files: what was found as the tokens were written.
        no_texts: why the page has token ids instead of texts; empty where it has texts.
        samples: generated ones.
        verification: what is shown of one, or None.

    Returns:
        HTML. All text from data is escaped; what runs is named by a nonce that nobody could have foreseen.
    """
    metrics, settings, count = pairs.metrics, pairs.settings, len(pairs.sums.rows)
    provenance = metrics["provenance"]
    excerpt_files = 0 if no_texts else -(-count // EXCERPT_PAIRS)
    contents = {
        "tokenPairs": TOKEN_PAIRS,
        "excerptFiles": excerpt_files,
        "perNat": PER_NAT,
        "scale": files.scale,
        "tokenValue": "log-ratio" if pairs.has_reference else "log-prob",
    }
    sections = [
        ("metrics", "Metrics"), ("rewards", "Rewards"), ("accuracy", "Subsets and length"),
        ("calibration", "Calibration"), ("sweeps", "Betas and losses"), ("pairs", "Pairs"),
        *([("samples", "Samples")] if samples else []),
        *([("verification", "Verification")] if verification else []),
    ]  # fmt: skip
    drawn = largest(subsets)
    environment = Environment(
        loader=PackageLoader("dpo_fast", "report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(
        "page.html.jinja"
    ).render(
        nonce=secrets.token_urlsafe(16),
        scripts=SCRIPTS,
        contents=Markup(script_json(contents)),  # noqa: S704  JSON that ends no script
        sections=sections,
        dataset=one_line(provenance["dataset"]["name"]),
        pairs=count,
        models=_models(provenance),
        loss=" + ".join(settings.loss_type),
        beta=settings.beta,
        engine=f"{provenance['engine']}, {provenance['precision']}",
        metrics=_metric_rows(metrics),
        counts=_counts(metrics),
        has_reference=pairs.has_reference,
        reference_free=settings.reference_free,
        sampled=f", {len(shown.pairs):,} of {shown.of:,} pairs drawn at random" if len(shown.pairs) < shown.of else "",
        subsets=[_accuracy_row(each) for each in largest(subsets, SHOWN_SUBSETS_OF_TABLE)],
        subsets_shown=f"; the {len(drawn):,} largest of {len(subsets):,}" if len(drawn) < len(subsets) else "",
        subsets_height=110 + BAR_HEIGHT * len(drawn),
        accuracy_columns=ACCURACY_COLUMNS,
        lengths=[_accuracy_row(each) for each in [*lengths.sides, *lengths.bins]],
        length_summary=_length_summary(lengths),
        brier=reliability.brier,
        ece=reliability.ece,
        calibration_bins=CALIBRATION_BINS,
        calibration_columns=("confidence", "mean confidence", "pairs", "accuracy", "95 % interval"),
        calibration=[_reliability_row(each.confidence, each.accuracy) for each in reliability.bins],
        loss_columns=("loss", *(f"beta {beta:g}" for beta in sweep.betas)),
        losses=[_loss_row(sweep, loss) for loss in sweep.losses],
        beta_columns=("beta", "mean margin", "95 % interval", "accuracy", "Brier score", "ECE"),
        betas=[_beta_row(each, score) for each, score in zip(sweep.by_beta, sweep.calibrations, strict=True)],
        notes=sweep.notes,
        no_texts=no_texts,
        token_value_long=(
            "log-ratio, policy's log-prob less reference's" if pairs.has_reference else "policy's log-prob"
        ),
        scale=files.scale,
        excerpt_files=excerpt_files,
        excerpt_characters=files.excerpt_characters,
        pair_columns=PAIR_COLUMNS,
        samples=samples[:SHOWN_SAMPLES],
        more_samples=max(len(samples) - SHOWN_SAMPLES, 0),
        verification=verification,
        provenance=_provenance(provenance),
    )


def _metric_rows(metrics: dict[str, Any]) -> list[dict[str, str]]:
    rows = []
    for key, name in ROWS:
        interval = metrics["intervals"].get(key)
        shown = f"{interval[0]:.4f} … {interval[1]:.4f}" if interval else ""
        rows.append({"name": name, "key": key, "value": f"{metrics[key]:.4f}", "interval": shown})
    return rows


def _counts(metrics: dict[str, Any]) -> str:
    counts, aggregate = metrics["counts"], metrics["provenance"]["aggregate"]
    return (
        f"{counts['ties']:,} ties, {counts['truncated']:,} pairs truncated, {counts['skipped']:,} rows skipped; "
        f"aggregate {aggregate}"
    )


def _models(provenance: dict[str, Any]) -> str:
    """Policy and reference by name."""
    named = {role: one_line(model["source"]) for role, model in provenance["models"].items()}
    policy = named.pop(POLICY)
    return f"{policy} against {', '.join(named.values())}" if named else f"{policy}, without a reference"


def _accuracy_row(each: Accuracy) -> tuple[str, ...]:
    name, margin = one_line(each.name, 60), f"{each.margin:.4g}"
    return name, f"{each.pairs:,}", f"{each.share:.4f}", _interval(each.interval), margin


def _reliability_row(confidence: float, each: Accuracy) -> tuple[str, ...]:
    return each.name, f"{confidence:.4f}", f"{each.pairs:,}", f"{each.share:.4f}", _interval(each.interval)


def _loss_row(sweep: Sweep, loss: str) -> tuple[str, ...]:
    values = (sweep.values.get((loss, beta)) for beta in sweep.betas)
    return loss, *("" if value is None else f"{value[0]:.4f}" for value in values)


def _beta_row(each: dict[str, Any], score: Calibration) -> tuple[str, ...]:
    margin, interval = each["eval_rewards/margins"], each["intervals"]["eval_rewards/margins"]
    accuracy = f"{each['eval_rewards/accuracies']:.4f}"
    return f"{each['beta']:g}", f"{margin:.4f}", _interval(interval), accuracy, f"{score.brier:.4f}", f"{score.ece:.4f}"


def _interval(ends: Sequence[float]) -> str:
    return f"{ends[0]:.4f} … {ends[1]:.4f}"


def _length_summary(lengths: LengthBias) -> str:
    """Length bias in a sentence or two."""
    sentences = []
    if lengths.correlation is not None:
        sentences.append(f"Margin and length difference have a correlation of {lengths.correlation:+.2f} (Pearson's).")
    if lengths.longer_preferred is not None and lengths.longer_chosen is not None:
        sentences.append(
            f"Of the pairs of unequal lengths, the longer completion has the larger reward in "
            f"{lengths.longer_preferred:.1%}, and is the chosen one in {lengths.longer_chosen:.1%}."
        )
    return " ".join(sentences)


def _provenance(provenance: dict[str, Any]) -> list[str]:
    """Where the numbers come from, a line each."""
    dataset, hardware = provenance["dataset"], provenance["hardware"]
    versions = ", ".join(f"{name} {version}" for name, version in provenance["versions"].items())
    models = [
        f"{role}: {one_line(model['source'])}{' at ' + model['revision'] if model['revision'] else ''}; SHA-256 of "
        f"graph and weights {', '.join(model['weights_and_graph_sha256'])}"
        for role, model in provenance["models"].items()
    ]
    return [
        f"Recipe {provenance['recipe']}, max_length {provenance['max_length']}; {hardware['processor']}, "
        f"{hardware['cores']} cores, {hardware['system']}; {versions}.",
        f"Data: {one_line(dataset['name'])}, fingerprint {dataset['fingerprint']}.",
        *(f"{line[0].upper()}{line[1:]}." for line in models),
    ]


def assets() -> list[Path]:
    """The files that stand beside every page: scripts and style."""
    return sorted((Path(__file__).parent / "assets").iterdir())
