"""The models of a shape: random ones of a real model's, made when they are first asked for, or a user's own folders."""

from pathlib import Path

from bundles import find_models

from dpo_fast.errors import UsageError
from gpu.large_model import LLAMA_8B, make_large_pair

RANDOM = ("smollm2-135m", "llama-3.2-1b")
LARGE = "llama-3.1-8b"
DEFAULTS = RANDOM
TOKENIZER_OF = "smollm2-135m"


def find_shape(name: str, work: Path, data: Path) -> tuple[str, str]:
    """The folders of a policy and its reference.

    Args:
        name: of a shape; or a folder that holds `policy` and `reference`, of trained models for example.
        work: where random models are made.
        data: the preference set, on which their tokenizer is trained.

    Raises:
        UsageError: the name is none, and no such folder.
    """
    if name in RANDOM:
        return find_models(work, name, data)
    if name == LARGE:
        folder = work / name
        if not folder.exists():
            tokenizer, _ = find_models(work, TOKENIZER_OF, data)
            make_large_pair(folder, LLAMA_8B, Path(tokenizer))
        return str(folder / "policy"), str(folder / "reference")
    roles = Path(name) / "policy", Path(name) / "reference"
    if not all((role / "config.json").is_file() for role in roles):
        raise UsageError(
            f"--shapes {name}: is neither one of {', '.join((*RANDOM, LARGE))}, nor a folder that holds the models "
            "policy and reference"
        )
    return str(roles[0]), str(roles[1])


def is_random(name: str) -> bool:
    """Whether a shape's weights are random, so that its log-probs say nothing."""
    return name in (*RANDOM, LARGE)


def short_name(name: str) -> str:
    """A shape's name for files and tables."""
    return Path(name).resolve().name
