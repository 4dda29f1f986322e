"""Errors travel from one process to another as they are."""

import pickle

import pytest

from dpo_fast import errors
from dpo_fast.errors import DpoFastError, InterruptedRunError, MissingDependencyError, RowError


def classes(of: type[DpoFastError] = DpoFastError) -> list[type[DpoFastError]]:
    return [of, *(each for child in of.__subclasses__() for each in classes(child))]


EXAMPLES = {
    RowError: RowError(3, "'chosen' is empty"),
    MissingDependencyError: MissingDependencyError("ray", "ray", "--cluster"),
    InterruptedRunError: InterruptedRunError(15, "stopped"),
}


@pytest.mark.parametrize("kind", classes(), ids=lambda kind: kind.__name__)
def test_errors_can_be_pickled(kind: type[DpoFastError]) -> None:
    error = EXAMPLES.get(kind) or kind("what is wrong")
    again = pickle.loads(pickle.dumps(error))

    assert type(again) is kind
    assert str(again) == str(error)
    assert vars(again) == vars(error)
    assert again.exit_code == error.exit_code


def test_the_tree_is_as_it_is_drawn() -> None:
    for kind in classes():
        assert kind.__name__ in (errors.__doc__ or "")
