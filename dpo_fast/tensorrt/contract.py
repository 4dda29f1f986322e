"""Plans held against their description: tensors, types and profiles, before anything runs."""

from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

from dpo_fast.engines.onnxruntime import ADAPTER_GATES
from dpo_fast.errors import BundleError
from dpo_fast.tensorrt.plans import STATES, TARGET_GATES, Plans
from dpo_fast.types import TokenScores

TARGET_IDS = "target_ids"
OUTPUTS = tuple(output.name for output in fields(TokenScores))
AGAIN = "build the plans again with `dpo-fast build`"


class Contract:
    """What a role's plans have to be, by their description.

    Attributes:
        state_sizes: bytes of an entry of the states, by the types that they may have.
        state_names: of these types.
    """

    def __init__(self, description: Path, package: ModuleType, plans: Plans) -> None:
        kind = package.DataType
        self._package, self._plans = package, plans
        self._body_file, self._head_file = description.parent / plans.body, description.parent / plans.head
        self.state_sizes = {kind.FLOAT: 4, kind.HALF: 2, kind.BF16: 2}
        self.state_names = {kind.FLOAT: "float32", kind.HALF: "float16", kind.BF16: "bfloat16"}

    def check_body(self, body: Any, adapters: int) -> list[str]:
        """Refuse a body of other tensors or profiles.

        Returns:
            The names of its inputs. It may lack the two that not every model makes use of.

        Raises:
            BundleError: it is not what the description says.
        """
        int64, float32 = {self._package.DataType.INT64}, {self._package.DataType.FLOAT}
        inputs = dict.fromkeys(("input_ids", "position_ids", "segment_ids", "target_index"), int64)
        if adapters:
            inputs[ADAPTER_GATES] = float32
        tensors = self._tensors(body)
        if (ADAPTER_GATES in tensors) != bool(adapters):
            raise BundleError(
                f"{self._body_file}: has adapters, or has none, where bundle.json says otherwise; export it again"
            )
        outputs = {STATES: set(self.state_sizes), TARGET_GATES: float32}
        optional = {"position_ids", "segment_ids", TARGET_GATES}
        self._compare(self._body_file, tensors, inputs, outputs, optional)
        self._require(
            body.num_optimization_profiles == len(self._plans.profiles),
            self._body_file,
            f"has {body.num_optimization_profiles} profiles instead of {len(self._plans.profiles)}",
        )
        for number, profile in enumerate(self._plans.profiles):
            box = [profile.rows, profile.width]
            ranges = dict.fromkeys(inputs, box) | {"target_index": [profile.targets]}
            ranges[ADAPTER_GATES] = [profile.rows, (adapters, adapters, adapters)]
            for name in [name for name in inputs if name in tensors]:
                wanted = list(zip(*ranges[name], strict=True))
                found = [tuple(shape) for shape in body.get_tensor_profile_shape(name, number)]
                self._require(
                    found == wanted, self._body_file, f"takes {name} of {found} in profile {number} instead of {wanted}"
                )
        return [name for name in inputs if name in tensors]

    def check_head(self, head: Any, body: Any, adapters: int) -> tuple[Any, bool]:
        """Refuse a head of other tensors or another profile, or of other states than the body's.

        Returns:
            The states' type, and whether the body hands it the targets' gates.

        Raises:
            BundleError: it is not what the description says.
        """
        int64, float32 = {self._package.DataType.INT64}, {self._package.DataType.FLOAT}
        body_tensors = self._tensors(body)
        state_type = body_tensors[STATES][1]
        inputs = {STATES: {state_type}, TARGET_IDS: int64}
        if TARGET_GATES in body_tensors:
            inputs[TARGET_GATES] = float32
        self._compare(self._head_file, self._tensors(head), inputs, dict.fromkeys(OUTPUTS, float32), set())
        hidden_size = body.get_tensor_shape(STATES)[1]
        self._require(
            head.num_optimization_profiles == 1,
            self._head_file,
            f"has {head.num_optimization_profiles} profiles, not one",
        )
        rest = {STATES: (hidden_size,), TARGET_IDS: (), TARGET_GATES: (adapters,)}
        for name in inputs:
            smallest, _, largest = (tuple(shape) for shape in head.get_tensor_profile_shape(name, 0))
            wanted = (1, *rest[name]), (self._plans.chunk, *rest[name])
            self._require(
                (smallest, largest) == wanted,
                self._head_file,
                f"takes {name} from {smallest} to {largest} instead of from {wanted[0]} to {wanted[1]}",
            )
        return state_type, TARGET_GATES in body_tensors

    def _tensors(self, engine: Any) -> dict[str, tuple[Any, Any]]:
        """Mode and type of each tensor, by name."""
        names = [engine.get_tensor_name(number) for number in range(engine.num_io_tensors)]
        return {name: (engine.get_tensor_mode(name), engine.get_tensor_dtype(name)) for name in names}

    def _compare(
        self,
        plan: Path,
        tensors: dict[str, tuple[Any, Any]],
        inputs: dict[str, set[Any]],
        outputs: dict[str, set[Any]],
        optional: set[str],
    ) -> None:
        """Refuse tensors that are lacking, too many, or of another mode or type."""
        mode = self._package.TensorIOMode
        for name in dict.fromkeys([*inputs, *outputs, *tensors]):
            if name not in tensors:
                self._require(name in optional, plan, f"lacks {name}")
                continue
            found_mode, found_type = tensors[name]
            wanted_mode, types = (
                (mode.INPUT, inputs[name]) if name in inputs else (mode.OUTPUT, outputs.get(name, set()))
            )
            fits = found_mode == wanted_mode and found_type in types
            self._require(
                fits, plan, f"has {name} as {found_mode.name} of {found_type.name}, which is not the contract's"
            )

    def _require(self, fine: bool, plan: Path, what: str) -> None:
        if not fine:
            raise BundleError(f"{plan}: {what}; {AGAIN}")
