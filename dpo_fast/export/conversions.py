"""Which stored tensors a model's parameters are, or are made from, by Transformers' own rules.

Transformers renames tensors as it loads them and makes some parameters from others: a mixture of experts' matrices, one
tensor each on disk, are stacked. Its rules are followed here rather than written again, so that a family it learns to
load needs nothing here: its conversions are run on tensors without values, and each operation on them is kept in terms
of `dpo_fast.export.bindings`.
"""

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from dpo_fast.export.bindings import Binding, Made, Stored

aten = torch.ops.aten


class UnknownOperationError(Exception):
    """A conversion does something to tensors that `Made` cannot express."""


class Conversions:
    """The rules by which Transformers loads a checkpoint into a model."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Take the rules of a model; its parameters may be on the meta device."""
        self.model = model
        self._state = model.state_dict()
        rules = get_model_conversion_mapping(model)
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]

    def rename(self, stored: str) -> tuple[str, str | None]:
        """The parameter that a stored tensor goes to, and the converter's pattern that it matches, if any.

        The first parameter, where one tensor becomes several.
        """
        prefix, state = self.model.base_model_prefix, self._state
        parameter, pattern = rename_source_key(stored, self._renamings, self._converters, prefix, state)
        if parameter not in state and stored in state:  # saved as the model names it: no rule applies
            parameter, pattern = rename_source_key(stored, [], [], prefix, state)
        return parameter, pattern

    def collect(self, stored: Iterable[str]) -> "dict[str, Collected]":
        """Stored tensors by the parameter that they go to, as Transformers collects them before it converts.

        Those that go to no parameter of the model are left out.
        """
        converter_of = {pattern: rule for rule in self._converters for pattern in rule.source_patterns}
        collected: dict[str, Collected] = {}
        for name in sorted(stored, key=dot_natural_key):  # in this order experts are stacked
            parameter, pattern = self.rename(name)
            if parameter in self._state:
                entry = collected.setdefault(parameter, Collected(pattern and converter_of[pattern]))
                entry.sources.setdefault(pattern, []).append(name)
        return collected

    def expected(self, parameter: str) -> dict[str, tuple[int, ...]]:
        """The stored tensors that a parameter would be saved as, with their shapes; none if a rule has no inverse."""
        try:
            saved = revert_weight_conversion(self.model, self._state)
        except Exception:  # each rule's own code
            return {}
        return {name: tuple(tensor.shape) for name, tensor in saved.items() if self.rename(name)[0] == parameter}

    def convert(self, parameter: str, collected: "Collected", stored: Mapping[str, Stored]) -> dict[str, Binding]:
        """What a parameter, and those that come with it, are made of.

        Raises:
            UnknownOperationError: the conversion does more than move elements.
            Exception: whatever Transformers' conversion raises when the tensors do not fit.
        """
        if collected.converter is None:
            return {parameter: stored[collected.names[0]]}
        converter, recorder = deepcopy(collected.converter), Recorder()
        for pattern, names in collected.sources.items():
            converter.collected_tensors[pattern] = [recorder.tensor(stored[name]) for name in names]
        with recorder:
            made = converter.convert(parameter, model=self.model, config=self.model.config)
        # Operations that leave a tensor as it is may leave it in its list.
        return {name: recorder.binding(value[0] if isinstance(value, list) else value) for name, value in made.items()}


class Collected:
    """The stored tensors that one parameter is made from.

    Attributes:
        converter: the rule that makes it; None if it is a stored tensor itself.
        sources: names of stored tensors by the rule's pattern that they match, in the order of their use.
    """

    def __init__(self, converter: WeightConverter | None) -> None:
        self.converter = converter
        self.sources: dict[str | None, list[str]] = {}

    @property
    def names(self) -> list[str]:
        """Of the stored tensors, pattern by pattern."""
        return [name for names in self.sources.values() for name in names]

    @property
    def ambiguous(self) -> bool:
        """Whether stored tensors that go to the parameter by different ways contend for it."""
        if self.converter is None:
            return len(self.names) > 1
        return any(pattern not in self.converter.source_patterns for pattern in self.sources)


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs operations on tensors that have no values, and keeps what each result is made of."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._of: dict[int, tuple[torch.Tensor, Binding]] = {}  # by identity; the tensor too, lest it be another's

    def tensor(self, binding: Binding) -> torch.Tensor:
        """A tensor without values that stands for a binding."""
        return self._keep(torch.empty(binding.shape, device="meta"), binding)

    def binding(self, tensor: torch.Tensor) -> Binding:
        """What a tensor that was given out, or computed from such, is made of."""
        if id(tensor) not in self._of:
            raise UnknownOperationError("a tensor that is not stored")
        return self._of[id(tensor)][1]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        express = _OPERATIONS.get(func)
        if express is None:
            raise UnknownOperationError(str(func))
        bound_args, bound_kwargs = tree_map_only(torch.Tensor, self.binding, (args, kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            return self._keep(result, express(tuple(result.shape), *bound_args, **bound_kwargs))
        made = express([tuple(part.shape) for part in result], *bound_args, **bound_kwargs)
        return [self._keep(part, binding) for part, binding in zip(result, made, strict=True)]

    def _keep(self, tensor: torch.Tensor, binding: Binding) -> torch.Tensor:
        self._of[id(tensor)] = (tensor, binding)
        return tensor


Shape = tuple[int, ...]

# Each takes the result's shape, a list of them where there are several results, then what PyTorch's operator takes.


def _same(shape: Shape, whole: Binding, **_: Any) -> Binding:
    return whole


def _reshape(shape: Shape, whole: Binding, *_: Any) -> Binding:
    return Made("Reshape", (whole,), shape, shape)


def _concatenate(shape: Shape, parts: list[Binding], dim: int = 0) -> Binding:
    return Made("Concat", tuple(parts), (dim % len(shape),), shape)


def _stack(shape: Shape, parts: list[Binding], dim: int = 0) -> Binding:
    """Concatenated along the first axis, which is then split in two: fewer copies than a new axis for each part."""
    first, *rest = parts[0].shape
    joined = _concatenate((len(parts) * first, *rest), parts)
    stacked = _reshape((len(parts), first, *rest), joined)
    order = list(range(1, len(shape)))
    order.insert(dim % len(shape), 0)
    return stacked if order[0] == 0 else _permute(shape, stacked, order)


def _permute(shape: Shape, whole: Binding, dims: list[int]) -> Binding:
    return Made("Transpose", (whole,), tuple(dim % len(shape) for dim in dims), shape)


def _transpose(shape: Shape, whole: Binding, dim0: int = 0, dim1: int = 1) -> Binding:
    order = list(range(len(shape)))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return _permute(shape, whole, order)


def _slice(
    shape: Shape, whole: Binding, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Binding:
    if step != 1:
        raise UnknownOperationError(f"a slice of step {step}")
    first = slice(start, None).indices(whole.shape[dim])[0]
    return Made("Slice", (whole,), (dim % len(shape), first, first + shape[dim]), shape)


def _split(shapes: list[Shape], whole: Binding, size: Any, dim: int = 0) -> list[Binding]:
    starts = [sum(shape[dim] for shape in shapes[:index]) for index in range(len(shapes))]
    return [_slice(shape, whole, dim, start) for shape, start in zip(shapes, starts, strict=True)]


def _select(shape: Shape, whole: Binding, dim: int, index: int) -> Binding:
    kept = list(whole.shape)
    kept[dim] = 1
    return _reshape(shape, _slice(tuple(kept), whole, dim, index))


def _unbind(shapes: list[Shape], whole: Binding, dim: int = 0) -> list[Binding]:
    return [_select(shape, whole, dim, index) for index, shape in enumerate(shapes)]


_OPERATIONS: dict[Any, Callable[..., Any]] = {
    aten.alias.default: _same,
    aten.clone.default: _same,
    aten.detach.default: _same,
    aten._unsafe_view.default: _reshape,
    aten.squeeze.default: _reshape,
    aten.squeeze.dim: _reshape,
    aten.unsqueeze.default: _reshape,
    aten.view.default: _reshape,
    aten.cat.default: _concatenate,
    aten.stack.default: _stack,
    aten.permute.default: _permute,
    aten.t.default: _transpose,
    aten.transpose.int: _transpose,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.unbind.int: _unbind,
}
