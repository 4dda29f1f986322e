"""Would a binding take a call? By the signatures that pybind11 writes into its docstrings."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .double import Call


@dataclass(frozen=True)
class Parameter:
    name: str
    kind: str
    has_default: bool


def parameters(signature: str) -> list[Parameter]:
    """A signature's parameters after self: ``f(self: C, name: str, size: SupportsInt = 0) -> bool``."""
    inside = signature[signature.index("(") + 1 : signature.rindex(") ->")]
    parts = re.split(r",\s*(?![^\[<(]*[\]>)])", inside)
    found = [re.fullmatch(r"(\w+): (.+?)(?: = (.+))?", part.strip()) for part in parts]
    return [Parameter(match[1], match[2], match[3] is not None) for match in found if match and match[1] != "self"]


def takes(signatures: Sequence[str], call: Call) -> bool:
    """Whether one of a method's overloads takes the arguments' kinds."""
    return any(_takes(parameters(signature), call) for signature in signatures)


def _takes(wanted: list[Parameter], call: Call) -> bool:
    given: dict[str, frozenset[str]] = {}
    for place, kinds in call.arguments:
        if isinstance(place, int):
            if place >= len(wanted):
                return False
            place = wanted[place].name
        given[place] = kinds
    by_name = {parameter.name: parameter for parameter in wanted}
    if not given.keys() <= by_name.keys():
        return False
    if any(not parameter.has_default and parameter.name not in given for parameter in wanted):
        return False
    return all(_fits(by_name[name].kind, kinds) for name, kinds in given.items())


def _fits(wanted: str, kinds: frozenset[str]) -> bool:
    if wanted.startswith("Sequence["):
        return bool(kinds & {"list", "tuple"})
    return wanted in kinds
