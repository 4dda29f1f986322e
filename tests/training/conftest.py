"""Two real trainings, of a whole model and of an adapter, that all tests of this folder look at."""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .trained import Training


def train(kind: str, tiny_pair: tuple[Path, Path], folder: Path) -> "Training":
    from peft import LoraConfig

    from dpo_fast.demo_training import one_thread
    from dpo_fast.training import DPOFastCallback

    from .trained import EVERY, Training, TrlsOwn, make_trainer, write_pairs

    pairs = write_pairs(folder / "pairs.jsonl")
    one, other = tiny_pair
    trls_own = TrlsOwn()
    callbacks = [DPOFastCallback(pairs, every=EVERY, on_error="raise"), trls_own]
    saving = {"save_strategy": "steps", "save_steps": EVERY}
    with pytest.MonkeyPatch.context() as patch, one_thread():
        patch.setenv("DPO_FAST_CACHE", str(folder / "cache"))
        if kind == "model":
            trainer = make_trainer(one, other, folder / "trained", callbacks, **saving)
        else:
            adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
            trainer = make_trainer(one, None, folder / "trained", callbacks, adapter=adapter, **saving)
        trls_own.trainer = trainer
        trainer.train()
    return Training(trainer, folder / "trained", pairs, trls_own.metrics, trls_own.modes)


@pytest.fixture(scope="session")
def model_training(tiny_pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> "Training":
    return train("model", tiny_pair, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def adapter_training(tiny_pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> "Training":
    return train("adapter", tiny_pair, tmp_path_factory.mktemp("adapter"))


@pytest.fixture(params=["model", "adapter"])
def training(request: pytest.FixtureRequest) -> "Training":
    found: Training = request.getfixturevalue(f"{request.param}_training")
    return found
