"""A tiny body and head as plans of the double, and the same computed whole with NumPy.

The body adds up, for each token, its embedding, its position's, its segment's, and the embeddings of its row's prompt;
with adapters also a vector for each that is on. Its weights are multiples of 1/8, so that states are exact in float16.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from dpo_fast.batches import Batch
from dpo_fast.tensorrt.plans import Plans, Profile, write_plans
from dpo_fast.types import TokenScores

from .double import Profiles, write_plan

VOCABULARY, POSITIONS = 23, 64


@dataclass(frozen=True)
class Tiny:
    """What is built: sizes, the states' type, and the profiles."""

    hidden_size: int = 8
    adapters: int = 0
    half: bool = False
    chunk: int = 64
    head_adapters: bool = True
    profiles: tuple[Profile, ...] = (
        Profile(rows=(1, 2, 4), width=(4, 8, 12), targets=(1, 8, 150)),
        Profile(rows=(2, 2, 3), width=(20, 24, 37), targets=(5, 16, 70)),
    )
    seed: int = 0

    @property
    def weights(self) -> dict[str, np.ndarray]:
        """By name; those of the body are multiples of 1/8."""
        rng = np.random.default_rng(self.seed)

        def eighths(*shape: int) -> np.ndarray:
            return (rng.integers(-8, 9, shape) / 8).astype(np.float32)

        return {
            "embedding": eighths(VOCABULARY, self.hidden_size),
            "positions": eighths(POSITIONS, self.hidden_size),
            "segments": eighths(5, self.hidden_size),
            "adapters": eighths(self.adapters, self.hidden_size),
            "head": rng.normal(0, 0.1, (self.hidden_size, VOCABULARY)).astype(np.float32),
            "head_adapters": rng.normal(0, 1, (self.adapters, VOCABULARY)).astype(np.float32),
        }

    @property
    def gated_head(self) -> bool:
        return bool(self.adapters) and self.head_adapters

    def body(self) -> onnx.ModelProto:
        gates = ", float[B,A] adapter_gates" if self.adapters else ""
        outputs = f"{'float16' if self.half else 'float'}[N,{self.hidden_size}] states"
        outputs += f", float[N,{self.adapters}] target_gates" if self.gated_head else ""
        text = f"""
        <ir_version: 10, opset_import: ["" : 21]>
        body (int64[B,T] input_ids, int64[B,T] position_ids, int64[B,T] segment_ids, int64[N] target_index{gates})
            => ({outputs}) {{
            one = Constant <value = int64[1] {{1}}> ()
            zero = Constant <value = int64 {{0}}> ()
            minus_one = Constant <value = int64[1] {{-1}}> ()
            rank_2 = Constant <value = int64[2] {{-1, {self.hidden_size}}}> ()
            of_token = Gather (embedding, input_ids)
            of_position = Gather (positions, position_ids)
            segment = Add (segment_ids, one)
            of_segment = Gather (segments, segment)
            is_prompt = Equal (segment_ids, zero)
            prompt_mask = Cast <to = 1> (is_prompt)
            mask = Unsqueeze (prompt_mask, minus_one)
            prompt_tokens = Mul (of_token, mask)
            of_prompt = ReduceSum <keepdims = 1> (prompt_tokens, one)
            sum_1 = Add (of_token, of_position)
            sum_2 = Add (sum_1, of_segment)
            sum_3 = Add (sum_2, of_prompt)
            {self._gated_body() if self.adapters else "every_state = Identity (sum_3)"}
            flat = Reshape (every_state, rank_2)
            exact = Gather (flat, target_index)
            states = Cast <to = {TensorProto.FLOAT16 if self.half else TensorProto.FLOAT}> (exact)
        }}"""
        used = ["embedding", "positions", "segments", *(["adapters"] if self.adapters else [])]
        return self._model(text.replace("[B,A]", f"[B,{self.adapters}]"), used)

    def _gated_body(self) -> str:
        gated = """
            of_adapters = MatMul (adapter_gates, adapters)
            row_of_adapters = Unsqueeze (of_adapters, one)
            every_state = Add (sum_3, row_of_adapters)
        """
        rows = """
            shape = Shape <start = 1, end = 2> (input_ids)
            row = Div (target_index, shape)
            target_gates = Gather (adapter_gates, row)
        """
        return gated + (rows if self.head_adapters else "")

    def head(self) -> onnx.ModelProto:
        kind = "float16" if self.half else "float"
        gates = f", float[n,{self.adapters}] target_gates" if self.gated_head else ""
        add = "added = MatMul (target_gates, head_adapters)\n logits = Add (product, added)"
        text = f"""
        <ir_version: 10, opset_import: ["" : 21]>
        head ({kind}[n,{self.hidden_size}] states, int64[n] target_ids{gates})
            => (float[n] log_prob, float[n] entropy, float[n] mean_logit, float[n] is_top1, float[n] log_sum_sq_prob) {{
            one = Constant <value = int64[1] {{1}}> ()
            exact = Cast <to = 1> (states)
            product = MatMul (exact, head)
            {add if self.gated_head else "logits = Identity (product)"}
            log_probs = LogSoftmax (logits)
            probs = Exp (log_probs)
            column = Unsqueeze (target_ids, one)
            log_prob_2 = GatherElements <axis = 1> (log_probs, column)
            log_prob = Squeeze (log_prob_2, one)
            weighted = Mul (probs, log_probs)
            negative = ReduceSum <keepdims = 0> (weighted, one)
            entropy = Neg (negative)
            mean_logit = ReduceMean <keepdims = 0> (logits, one)
            largest = ArgMax <axis = 1, keepdims = 0> (logits)
            same = Equal (largest, target_ids)
            is_top1 = Cast <to = 1> (same)
            squares = Mul (probs, probs)
            sum_sq = ReduceSum <keepdims = 0> (squares, one)
            log_sum_sq_prob = Log (sum_sq)
        }}"""
        return self._model(text, ["head", *(["head_adapters"] if self.gated_head else [])])

    def _model(self, text: str, used: list[str]) -> onnx.ModelProto:
        model = onnx.parser.parse_model(text)
        model.graph.initializer.extend(numpy_helper.from_array(self.weights[name], name) for name in used)
        onnx.checker.check_model(model)
        return model

    def body_profiles(self) -> Profiles:
        ranges = []
        for profile in self.profiles:
            tokens = tuple(zip(profile.rows, profile.width, strict=True))
            shapes = dict.fromkeys(("input_ids", "position_ids", "segment_ids"), tokens)
            shapes["target_index"] = tuple((size,) for size in profile.targets)
            if self.adapters:
                shapes["adapter_gates"] = tuple((size, self.adapters) for size in profile.rows)
            ranges.append(shapes)
        return ranges

    def head_profiles(self) -> Profiles:
        sizes = (1, min(32, self.chunk), self.chunk)
        shapes = {
            "states": tuple((size, self.hidden_size) for size in sizes),
            "target_ids": tuple((size,) for size in sizes),
        }
        if self.gated_head:
            shapes["target_gates"] = tuple((size, self.adapters) for size in sizes)
        return [shapes]

    def description(self) -> Plans:
        return Plans(
            package="tensorrt", version="11.4.0.106", targets=[], body="policy.body.plan", head="policy.head.plan",
            profiles=list(self.profiles), chunk=self.chunk, refittable=False, built={},
        )  # fmt: skip

    def write(self, folder: Path, **changes: object) -> Path:
        """Write both plans and their description, of which `changes` are made."""
        write_plan(folder / "policy.body.plan", self.body(), self.body_profiles())
        write_plan(folder / "policy.head.plan", self.head(), self.head_profiles())
        write_plans(folder / "policy.json", replace(self.description(), **changes))
        return folder / "policy.json"

    def expected(self, batch: Batch, gates: np.ndarray | None = None) -> TokenScores:
        """The uncut computation, in float64."""
        weights = {name: weight.astype(np.float64) for name, weight in self.weights.items()}
        tokens = weights["embedding"][batch.input_ids]
        prompts = (tokens * (batch.segment_ids == 0)[:, :, None]).sum(1, keepdims=True)
        states = (
            tokens + weights["positions"][batch.position_ids] + weights["segments"][batch.segment_ids + 1] + prompts
        )
        rows, width = batch.input_ids.shape
        row = batch.target_index // width
        if self.adapters:
            gates = gates[np.arange(rows) % len(gates)]
            states = states + (gates @ weights["adapters"])[:, None]
        logits = states.reshape(-1, self.hidden_size)[batch.target_index] @ weights["head"]
        if self.gated_head:
            logits = logits + gates[row] @ weights["head_adapters"]
        probs = np.exp(logits - logits.max(1, keepdims=True, initial=-np.inf))
        probs /= probs.sum(1, keepdims=True)
        log_probs = np.log(probs)
        return TokenScores(
            log_prob=log_probs[np.arange(len(row)), batch.target_ids],
            entropy=-(probs * log_probs).sum(1),
            mean_logit=logits.mean(1),
            is_top1=(logits.argmax(1) == batch.target_ids).astype(float),
            log_sum_sq_prob=np.log((probs**2).sum(1)),
        )


def make_batch(seed: int, rows: int, width: int, most_targets: int) -> Batch:
    """Rows of a prompt, some completions and padding, with 0 to `most_targets` targets each, anywhere in the row."""
    rng = np.random.default_rng(seed)
    ends = np.sort(rng.integers(0, width + 1, (rows, 4)), axis=1)
    segments = (np.arange(width)[None, :, None] >= ends[:, None, :]).sum(2)
    columns = [np.sort(rng.integers(0, width, rng.integers(0, most_targets + 1))) for _ in range(rows)]
    index = [row * width + places for row, places in enumerate(columns)]
    target_index = np.concatenate(index) if index else np.zeros(0)
    return Batch(
        input_ids=rng.integers(0, VOCABULARY, (rows, width)),
        position_ids=rng.integers(0, POSITIONS, (rows, width)),
        segment_ids=np.where(segments == 4, -1, segments),
        target_index=target_index.astype(np.int64),
        target_ids=rng.integers(0, VOCABULARY, len(target_index)),
        completions=np.zeros((0, 3), np.int64),
    )


def save_with_external_data(model: onnx.ModelProto, path: Path) -> None:
    """A graph as bundles have it, its weights in a file beside it."""
    onnx.save_model(
        model,
        path,
        save_as_external_data=True,
        location=f"{path.name}.data",
        size_threshold=0,
        all_tensors_to_one_file=True,
    )
