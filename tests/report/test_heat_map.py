"""The heat map of a real model's row, against PyTorch's own log-probs: texts, tokens and values."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_engines import ROWS, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from dpo_fast.evaluate import evaluate
from dpo_fast.report.write import write_report

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


def log_probs(model: PreTrainedModel, ids: list[int], tokens: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """A model's log-probs of the last tokens of a sequence."""
    with torch.no_grad():
        of_all = model(torch.tensor([ids])).logits.log_softmax(-1)[0, :-1]
    found = of_all.gather(-1, torch.tensor(ids[1:])[:, None])[-tokens:, 0]
    return np.array(found.double().numpy())


def test_values_of_a_row_are_pytorchs(tiny_bundle: Path, tiny_pair: tuple[Path, Path], tmp_path: Path) -> None:
    dataset = write_rows(tmp_path / "pairs.jsonl", ROWS)
    evaluate(tiny_bundle, dataset, tmp_path / "run")
    write_report(tmp_path / "run", bundle=tiny_bundle)

    text = (tmp_path / "run/report/data/tokens-00000.js").read_text(encoding="utf-8")
    opened = json.loads(text.partition(",")[2].removesuffix(")\n"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_pair[0])
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in tiny_pair]
    compared = 0
    for row, pair in zip(ROWS, opened, strict=True):
        for name in ("chosen", "rejected"):
            whole = pair["prompt"] + "".join(pair[name]["tokens"])
            assert whole.startswith(row["prompt"] + row[name])
            values = np.array(pair[name]["values"]) / 100
            policy, reference = (log_probs(model, tokenizer(whole)["input_ids"], len(values)) for model in models)
            # Half of the last of two decimals, and what float32 engines differ by.
            np.testing.assert_allclose(values, policy - reference, atol=0.005 + 1e-4, rtol=0)
            compared += len(values)
    assert compared == sum(len(pair[name]["tokens"]) for pair in opened for name in ("chosen", "rejected"))
    assert np.ptp(policy - reference) > 0.1  # the models differ by more than the tolerance
