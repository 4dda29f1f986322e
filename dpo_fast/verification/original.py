"""What an engine is compared with: the bundle's own PyTorch weights, one sequence a row."""

from collections.abc import Callable

from dpo_fast.batches import Layout, longest_row
from dpo_fast.bundle import Bundle
from dpo_fast.engines.torch import TorchEngine
from dpo_fast.errors import EngineOutputError
from dpo_fast.export.checkpoint import ADAPTER_CONFIG
from dpo_fast.token_table import CHOSEN, PROMPT, TokenTable
from dpo_fast.verification.scoring import score_tokens
from dpo_fast.verification.types import ScoredTokens

BUDGET, MOST = 1024, 4096  # tokens of a batch
HALVES = {"BF16": "bf16", "F16": "fp16"}  # a checkpoint's own precision, by safetensors' names


def several_rows(table: TokenTable) -> int:
    """The token budget of batches of several rows each, beside which rows alone show the noise: `BUDGET`.

    Two of the longest rows have to fit in, or long rows would be alone both times, and their noise nothing; but no more
    than `MOST` tokens, for memory's sake.
    """
    longest = int((table.lengths[:, PROMPT] + table.lengths[:, CHOSEN:].max(axis=1)).max(initial=0))
    return min(max(BUDGET, 2 * longest), MOST)


class Original:
    """The bundle's PyTorch weights; one model is in memory at a time."""

    def __init__(self, bundle: Bundle, max_length: int, *, trust_remote_code: bool) -> None:
        self._bundle, self._max_length, self._trust_remote_code = bundle, max_length, trust_remote_code
        self._loaded: tuple[str, str, TorchEngine] | None = None
        self.name = ""

    def half_precisions(self, engine_precision: str) -> list[str]:
        """The checkpoint's own precision below float32, or what stands for it; none where nothing lower is meant."""
        stored = {dtype for entry in self._bundle.manifest.models.values() for dtype in entry.stored_dtypes}
        for dtype, half in HALVES.items():
            if dtype in stored:
                return [half]
        return [] if engine_precision == "fp32" else ["bf16"]

    def score(
        self,
        role: str,
        precision: str,
        token_budget: int,
        table: TokenTable,
        watch: Callable[[float, int], None],
    ) -> tuple[ScoredTokens, ScoredTokens]:
        """Score a table plainly, one sequence a row.

        Raises:
            EngineOutputError: the weights give NaN or an infinity, as some do in half precision.
        """
        layout: Layout = "plain"
        engine = self._open(role, precision)
        try:
            return score_tokens(
                table,
                engine,
                layout=layout,
                token_budget=token_budget,
                row_limit=longest_row(layout, self._max_length),
                watch=watch,
            )
        except EngineOutputError as error:
            said = f"the original {role}, computed in {precision}: {error}"
            if precision == "fp32":
                raise EngineOutputError(said) from error
            raise EngineOutputError(
                f"{said}; say --floor float32, which leaves its rounding out; an engine of lower precision then needs "
                "a --max-multiple of its own, for float32's floors are smaller"
            ) from error

    def release(self) -> None:
        """Let go of the weights."""
        if self._loaded is not None:
            self._loaded[2].close()
        self._loaded = None

    def _open(self, role: str, precision: str) -> TorchEngine:
        if self._loaded is None or self._loaded[:2] != (role, precision):
            self.release()
            folder = self._bundle.model_folder(role)
            entry = self._bundle.manifest.models[role]
            is_adapter = (folder / ADAPTER_CONFIG).is_file()
            engine = TorchEngine(
                folder,
                precision=precision,
                base=self._bundle.folder / entry.weights[0] if is_adapter else None,
                trust_remote_code=self._trust_remote_code,
            )
            self._loaded = role, precision, engine
            self.name = engine.name
        return self._loaded[2]
