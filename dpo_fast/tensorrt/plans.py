"""What is known of built plans: engines/RECIPE/ROLE.json, beside the plans themselves.

BUNDLE/engines/tensorrt-rtx-fp16/
policy.json           this file's `Plans`
policy.body.plan      rows of tokens -> states of the targets
policy.head.plan      states and target ids -> the graph contract's outputs
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from dpo_fast.errors import BundleError
from dpo_fast.files import write_json

Package = Literal["tensorrt", "tensorrt_rtx"]
Range = tuple[int, int, int]  # the smallest, the one that kernels are tuned for, the largest

WIDTH_STEP = 8  # tokens that widths are multiples of: matrix units want rows of 16 bytes, and fewer shapes are met

# What the two halves of a graph hand to each other.
STATES = "states"  # (N, H) of the targets
TARGET_GATES = "target_gates"  # (N, adapters), where the head has adapters


@dataclass(frozen=True, slots=True)
class Profile:
    """The shapes of one optimisation profile of the body: boxes of rows x width tokens, with so many targets.

    Attributes:
        rows: B.
        width: T, in tokens.
        targets: N.
    """

    rows: Range
    width: Range
    targets: Range


@dataclass(frozen=True, slots=True)
class Plans:
    """A role's two plans.

    Attributes:
        package: whose runtime takes them.
        version: of that package, when they were built.
        targets: the compute capabilities that they are for, such as ["sm86"].
        body, head: file names, in this file's folder.
        profiles: of the body, in its order, the narrowest first.
        chunk: targets that the head takes at a time, at most.
        refittable: whether new weights can be put into them.
        built: seconds, bytes and warnings of each build, by "body" and "head", for people.
        options: `BuildOptions` as they were built with.
    """

    package: Package
    version: str
    targets: list[str]
    body: str
    head: str
    profiles: list[Profile]
    chunk: int
    refittable: bool
    built: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)


def write_plans(path: Path, plans: Plans) -> None:
    """Write a role's description."""
    write_json(path, asdict(plans))


def read_plans(path: Path) -> Plans:
    """Read a role's description.

    Raises:
        BundleError: it is missing or damaged.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        profiles = [
            Profile(**{name: _range(sizes) for name, sizes in profile.items()}) for profile in value.pop("profiles")
        ]
        plans = Plans(profiles=profiles, **value)
        if not profiles or {Path(name).name for name in (plans.body, plans.head)} != {plans.body, plans.head}:
            raise ValueError("no profiles, or plans outside its folder")
    except FileNotFoundError as error:
        raise BundleError(f"{path}: is missing; build the plans with `dpo-fast build`") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BundleError(f"{path}: is damaged ({error}); build the plans again with `dpo-fast build`") from error
    return plans


def _range(sizes: Any) -> Range:
    smallest, tuned, largest = sizes
    if not all(type(size) is int for size in sizes) or not 0 < smallest <= tuned <= largest:
        raise ValueError(f"{sizes!r} is no range")
    return smallest, tuned, largest
