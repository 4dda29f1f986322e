"""Equality with TRL's own code, run on tiny random models.

The trainer is built once. TRL computes a batch's loss and metrics its way (padded batch, fused LM head, float32); ours
are computed from per-token values that plain PyTorch gives, one unpadded sequence at a time.

Tolerance: TRL adds tokens and pairs in float32, where a sum of some 60 nats is uncertain by 60 * 6e-8 = 4e-6 for each
rounding, and beta and the losses' slopes pass that on; 1e-5, relative to the larger of 1 and the value, is five times
the largest difference seen. Accuracies are shares of whole numbers, so only float32's own rounding (6e-8) is allowed.
"""

import copy
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pytest

from dpo_fast.metrics.rewards import reduce_pairs
from dpo_fast.metrics.sums import sum_tokens
from dpo_fast.types import F_DIVERGENCE_LOSSES, LOSS_TYPES, SORTING_LOSSES, CompletionScores, LossSettings, PairScores

from .build import metrics_of, pair_scores, slice_pairs

torch = pytest.importorskip("torch")
trl = pytest.importorskip("trl")

pytestmark = [
    pytest.mark.slow,  # builds a trainer, then runs two tiny models twice a case
    pytest.mark.usefixtures("one_thread"),
]

BATCH = 4
EXACT_KEYS = ("eval_rewards/accuracies", "eval_mean_token_accuracy")
TRL_KEYS = (
    "eval_loss", "eval_rewards/chosen", "eval_rewards/rejected", "eval_rewards/margins", "eval_rewards/accuracies",
    "eval_logps/chosen", "eval_logps/rejected", "eval_logits/chosen", "eval_logits/rejected", "eval_entropy",
    "eval_mean_token_accuracy",
)  # fmt: skip


@dataclass
class Setup:
    trainer: Any
    scores: PairScores


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", *(f"w{number}" for number in range(61))]
    toy = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    toy.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=toy, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    policy = LlamaForCausalLM(config).eval()
    reference = copy.deepcopy(policy)
    with torch.no_grad():
        # Apart enough for log-ratios of some nats, near enough for exp(log-ratio) to mean something in float32.
        for parameter in reference.parameters():
            parameter.add_(0.08 * torch.randn_like(parameter))

    generator = np.random.default_rng(0)

    def text(shortest: int, longest: int) -> str:
        return " ".join(f"w{number}" for number in generator.integers(0, 61, generator.integers(shortest, longest)))

    # 11 rows in batches of 4: the last is partial. Row 3 has no prompt, so its first completion token is not scored;
    # row 6's completions are the same, a tie.
    rows = [{"prompt": text(1, 9), "chosen": " " + text(1, 14), "rejected": " " + text(1, 14)} for _ in range(11)]
    rows[2]["prompt"] = ""
    rows[5]["rejected"] = rows[5]["chosen"]
    plain_policy, plain_reference = copy.deepcopy(policy), copy.deepcopy(reference)
    trainer = trl.DPOTrainer(
        model=policy,
        ref_model=reference,
        args=trl.DPOConfig(
            output_dir=str(tmp_path_factory.mktemp("trl")), report_to="none", use_cpu=True, bf16=False,
            gradient_checkpointing=False, per_device_eval_batch_size=BATCH, use_weighting=True, disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.model.eval()
    tokenized = list(trainer.eval_dataset)
    assert tokenized[2]["prompt_ids"] == []
    scores = pair_scores(
        plain_scores(plain_policy, tokenized, "chosen_ids"),
        plain_scores(plain_policy, tokenized, "rejected_ids"),
        plain_scores(plain_reference, tokenized, "chosen_ids"),
        plain_scores(plain_reference, tokenized, "rejected_ids"),
        prompt_lengths=[len(row["prompt_ids"]) for row in tokenized],
    )
    scores.chosen_lengths[:] = [len(row["chosen_ids"]) for row in tokenized]
    scores.rejected_lengths[:] = [len(row["rejected_ids"]) for row in tokenized]
    assert scores.chosen_lengths[2] == scores.policy_chosen.lengths[2] + 1
    chosen, _ = reduce_pairs(sum_tokens(scores), LossSettings())
    assert np.abs(chosen.log_ratios).mean() > 1.0
    return Setup(trainer, scores)


def plain_scores(model: Any, rows: list[dict[str, Any]], branch: str) -> CompletionScores:
    """Each completion's tokens scored by the full logits of its own sequence, in float64 from the logits on."""
    log_probs, lengths, entropy, mean_logit, top1, log_sum_sq_prob = [], [], [], [], [], []
    for row in rows:
        ids = torch.tensor(row["prompt_ids"] + row[branch])
        first = max(1, len(row["prompt_ids"]))
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, first - 1 : -1]
        log_distribution = logits.double().log_softmax(-1)
        targets = ids[first:]
        log_probs.append(log_distribution.gather(1, targets[:, None])[:, 0])
        lengths.append(len(targets))
        entropy.append(-(log_distribution.exp() * log_distribution).sum().item())
        mean_logit.append(logits.double().mean(-1).sum().item())
        top1.append((logits.argmax(-1) == targets).sum().item())
        log_sum_sq_prob.append((2 * log_distribution).logsumexp(-1).sum().item())
    return CompletionScores(
        log_probs=torch.cat(log_probs).float().numpy(),
        lengths=np.array(lengths),
        entropy=np.array(entropy),
        mean_logit=np.array(mean_logit),
        top1=np.array(top1),
        log_sum_sq_prob=np.array(log_sum_sq_prob),
    )


def configure(trainer: Any, settings: LossSettings) -> None:
    """Give the trainer our settings by its own names; every one of ours but `reference_free` has one."""
    trainer.loss_types = list(settings.loss_type)
    trainer.loss_weights = list(settings.loss_weights or [1.0] * len(settings.loss_type))
    trainer.args.discopop_tau = settings.discopop_tau
    elsewhere = {"loss_type", "loss_weights", "discopop_tau", "reference_free"}
    for name in {field.name for field in fields(LossSettings)} - elsewhere:
        assert hasattr(trainer, name)
        setattr(trainer, name, getattr(settings, name))


def cases() -> list[LossSettings]:
    losses = [{"loss_type": (loss,), "label_smoothing": 0.05 if loss == "exo_pair" else 0.0} for loss in LOSS_TYPES]
    found = [{**loss, "beta": beta} for loss in losses for beta in (0.1, 0.7)]
    found += [{**loss, "ld_alpha": alpha} for loss in losses for alpha in (0.0, 0.4, 1.0)]
    # TRL 1.16.0 fails on sft with WPO's weights: it multiplies a tensor in place that it has expanded from a scalar.
    unweighted = SORTING_LOSSES | {"sft"}
    found += [{**loss, "use_weighting": True} for loss in losses if loss["loss_type"][0] not in unweighted]
    found += [{"loss_type": (loss,), "label_smoothing": 0.2} for loss in ("robust", "exo_pair", "aot", "aot_unpaired")]
    divergences = [("forward_kl", 0.5), ("js_divergence", 0.5)]
    divergences += [("alpha_divergence", alpha) for alpha in (0.5, 1.0, 1.5)]
    found += [
        {**loss, "f_divergence_type": kind, "f_alpha_divergence_coef": alpha}
        for kind, alpha in divergences
        for loss in losses
        if loss["loss_type"][0] in F_DIVERGENCE_LOSSES
    ]
    mpo = {"loss_type": ("sigmoid", "bco_pair", "sft"), "loss_weights": (0.8, 0.2, 1.0)}
    found += [mpo, {**mpo, "ld_alpha": 0.3}, {"loss_type": ("aot", "ipo", "sft")}]
    found += [{"loss_type": ("sigmoid", "hinge"), "loss_weights": (0.3, 2.0), "use_weighting": True, "ld_alpha": 0.3}]
    found += [{"loss_type": ("discopop",), "discopop_tau": tau} for tau in (0.01, 1.0, 2.0)]
    return [LossSettings(**case) for case in found]


def name(settings: LossSettings) -> str:
    default = LossSettings()
    changed = [
        field.name for field in fields(settings) if getattr(settings, field.name) != getattr(default, field.name)
    ]
    return " ".join(f"{field}={getattr(settings, field)}" for field in changed) or "default"


def assert_equal(ours: dict[str, Any], theirs: dict[str, float]) -> None:
    for key in TRL_KEYS:
        tolerance = 1e-7 if key in EXACT_KEYS else 1e-5 * max(1.0, abs(theirs[key]))  # see the module's docstring
        assert abs(ours[key] - theirs[key]) <= tolerance, f"{key}: {ours[key]} here, {theirs[key]} in TRL"


@pytest.mark.parametrize("settings", cases(), ids=name)
def test_batch_equals_trl(setup: Setup, settings: LossSettings):
    """One batch of rows 1 to 7, the row without a prompt and the tie among them."""
    configure(setup.trainer, settings)
    setup.trainer._metrics["eval"].clear()
    batch = setup.trainer.data_collator([setup.trainer.eval_dataset[row] for row in range(7)])
    with torch.no_grad():
        loss = setup.trainer._compute_loss(setup.trainer.model, batch, return_outputs=False)
    theirs = {f"eval_{key}": values[-1] for key, values in setup.trainer._metrics["eval"].items()}
    theirs["eval_loss"] = loss.item()
    ours = metrics_of(slice_pairs(setup.scores, 0, 7), settings)
    assert_equal(ours, theirs)
    assert ours["counts"]["ties"] == 1


@pytest.mark.parametrize(
    "settings",
    [
        LossSettings(),
        LossSettings(loss_type=("sft",)),
        LossSettings(loss_type=("aot",), label_smoothing=0.1),
        LossSettings(loss_type=("aot_unpaired",)),
        LossSettings(loss_type=("sigmoid", "bco_pair", "sft"), loss_weights=(0.8, 0.2, 1.0)),
        LossSettings(loss_type=("sigmoid", "apo_zero"), use_weighting=True),
        LossSettings(loss_type=("ipo",), ld_alpha=0.5, beta=0.3),
    ],
    ids=name,
)
def test_evaluate_equals_the_trl_aggregate(setup: Setup, settings: LossSettings):
    """`trainer.evaluate()` over 4 + 4 + 3 rows: means of batch means, and the loss weighted by rows."""
    configure(setup.trainer, settings)
    setup.trainer._metrics["eval"].clear()
    theirs = setup.trainer.evaluate()
    ours = metrics_of(setup.scores, settings, aggregate="trl", batch_size=BATCH)
    assert_equal(ours, theirs)
    # The last batch is smaller, so the exact means differ: the aggregate is seen to matter.
    exact = metrics_of(setup.scores, settings)
    assert abs(exact["eval_rewards/chosen"] - theirs["eval_rewards/chosen"]) > 1e-3
