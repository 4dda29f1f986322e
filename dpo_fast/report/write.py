"""Writing a report: the page, and beside it the folder of what it loads."""

import shutil
from collections.abc import Callable
from pathlib import Path

from dpo_fast.errors import OutputExistsError, StorageError
from dpo_fast.files import make_folder, new_folder, refuse_existing, storage_errors, write_text
from dpo_fast.generation.files import SAMPLES
from dpo_fast.report import charts
from dpo_fast.report.data import pair_columns, write_script, write_tokens
from dpo_fast.report.figures import accuracy_by_subset, calibration, largest, length_bias, sample
from dpo_fast.report.page import assets, render_page
from dpo_fast.report.pairs import read_pairs
from dpo_fast.report.samples import read_samples
from dpo_fast.report.sweeps import sweep
from dpo_fast.report.texts import open_texts, token_numbers
from dpo_fast.report.verifications import read_verification
from dpo_fast.run_folder import METRICS

PAGE, FOLDER = "report.html", "report"
# Of a run's provenance, what the page names.
PROVENANCE = (
    "versions", "hardware", "engine", "precision", "recipe", "models", "dataset", "max_length", "aggregate",
    "batch_size", "bootstrap_seed",
)  # fmt: skip
MARKER = "plotly.min.js"  # what only a report's folder holds: no other is replaced


def write_report(
    run: Path,
    output: Path | None = None,
    *,
    bundle: Path | None = None,
    verification: Path | None = None,
    samples: Path | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    report: Callable[[str], None] = lambda step: None,
) -> Path:
    """Write a run's report: `report.html`, and the folder `report` beside it.

    Args:
        run: what `dpo-fast evaluate` wrote.
        output: the folder to write into; the run's own by default.
        bundle: that the run was evaluated with; its tokenizer gives the texts. Without it, or with another one, the
            report shows token ids, and says so.
        verification: what `dpo-fast verify` wrote, or None.
        samples: JSON Lines that `dpo-fast generate` wrote, or their folder; the run's own by default, if it has any.
        trust_remote_code: whether the tokenizer's own Python code may be run.
        overwrite: whether an existing report is replaced.
        report: called with a line where something is worth saying.

    Returns:
        The page's path.

    Raises:
        MissingDependencyError: Plotly is not installed.
        OutputExistsError: there is a report already.
        UsageError, StorageError, BundleError, CheckpointError, DatasetError: an input cannot be used, or the disk
            refused.
        EngineOutputError: a score is NaN or infinite.
    """
    target = run if output is None else output
    page, folder = target / PAGE, target / FOLDER
    plotly = charts.plotly_script()
    pairs = read_pairs(run)
    if missing := [name for name in PROVENANCE if name not in pairs.metrics["provenance"]]:
        raise StorageError(
            f"{run / METRICS}: names no {', '.join(missing)}; remove it, and evaluate again: the scores are kept"
        )
    refuse_existing(folder, overwrite=overwrite, marker=MARKER)
    if page.exists() and not folder.exists():
        raise OutputExistsError(
            f"{page}: is none of dpo-fast's reports, for it has no folder {FOLDER}; name another folder"
        )
    own_samples = run / SAMPLES
    if samples is None and own_samples.is_file():
        samples = own_samples
    sampled = [] if samples is None else read_samples(samples)
    verified = None if verification is None else read_verification(verification, pairs.metrics)
    texts, no_texts = open_texts(bundle, pairs.metrics, trust_remote_code=trust_remote_code)
    if bundle is not None and no_texts:
        report(no_texts)

    margins, sums = pairs.margins, pairs.sums
    subsets = [] if sums.groups is None else accuracy_by_subset(margins, sums.groups)
    lengths = length_bias(margins, sums.chosen_lengths, sums.rejected_lengths)
    reliability = calibration(margins)
    shown = sample(len(margins))
    swept = sweep(run, pairs)
    make_folder(target)
    with new_folder(folder, overwrite=overwrite, marker=MARKER) as working:
        data = working / "data"
        data.mkdir()
        write_script(data, "pairs", pair_columns(pairs))
        write_script(data, "figures", {
            "margins": charts.margins_chart(margins),
            "rewards": charts.rewards_chart(pairs),
            **({"models": charts.models_chart(pairs, shown), "ratios": charts.ratios_chart(pairs, shown)}
               if pairs.has_reference else {}),
            **({"subsets": charts.subsets_chart(largest(subsets))} if subsets else {}),
            "lengths": charts.lengths_chart(lengths.bins),
            "calibration": charts.calibration_chart(reliability),
            "betas": charts.betas_chart(swept),
            "losses": charts.losses_chart(swept),
        })  # fmt: skip
        files = write_tokens(data, run, len(margins), texts or token_numbers, excerpts=texts is not None)
        for asset in assets():
            (working / asset.name).write_bytes(asset.read_bytes())
        (working / MARKER).write_text(plotly, encoding="utf-8")
        content = render_page(
            pairs, subsets, lengths, reliability, shown, swept, files,
            no_texts=no_texts, samples=sampled, verification=verified,
        )  # fmt: skip
        with storage_errors(page):
            page.unlink(missing_ok=True)  # an old page never stands beside new data
    write_text(page, content)
    return page


def remove_report(folder: Path) -> None:
    """Remove a folder's report, which is another run's; what is none of ours stays.

    Raises:
        StorageError: the disk refused.
    """
    if not (folder / FOLDER / MARKER).is_file():
        return
    with storage_errors(folder):
        (folder / PAGE).unlink(missing_ok=True)
        shutil.rmtree(folder / FOLDER)
