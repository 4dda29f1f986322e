"""Every error that dpo_fast raises on purpose, in one tree.

::

    DpoFastError                      exit code 1
    ├── InputError                    exit code 2: the user's input is at fault
    │   ├── UsageError                an argument, or a combination of arguments
    │   ├── DatasetError              a data set that cannot be read
    │   │   └── RowError              one row of it
    │   ├── CheckpointError           a model or tokenizer folder
    │   ├── BundleError               a bundle that is missing, incomplete or altered
    │   ├── BuildError                a graph that an engine's builder refuses, or a machine that cannot build it
    │   ├── OutputExistsError         an output that would be overwritten
    │   ├── StorageError              the disk: full, read-only, no permission
    │   ├── HubError                  the Hugging Face Hub refused or could not be reached
    │   ├── TrackerError              an experiment tracker did not take what it was told
    │   └── MissingDependencyError    an extra that is not installed
    ├── InterruptedRunError           exit code 128 + the signal's number: Ctrl-C or SIGTERM
    └── CheckFailedError              exit code 3: a check did not pass
        ├── SelfCheckError            an exported graph differs from its PyTorch model
        ├── VerificationError         an engine does not make the original's decisions, or nobody can tell
        ├── EngineOutputError         an engine returned NaN, or too few values
        └── PartsFailedError          a cluster's workers failed at some parts each time; all others are done

A message names the value, the place (file, row, tensor) and the way out, in one line.
"""

from typing import Any


class DpoFastError(Exception):
    """Base of the tree; `exit_code` is what the command line returns for it."""

    exit_code = 1

    def __reduce__(self) -> tuple[Any, ...]:
        # Workers send errors home: made anew without `__init__`, whose arguments are other ones in some classes.
        return _made_anew, (type(self), self.args), self.__dict__


def _made_anew(kind: type[DpoFastError], args: tuple[Any, ...]) -> DpoFastError:
    """An error as it was before it travelled."""
    return kind.__new__(kind, *args)


class InputError(DpoFastError):
    """The user's input is at fault; the message says what to do."""

    exit_code = 2


class UsageError(InputError):
    """An argument, or a combination of arguments, that cannot be used."""


class DatasetError(InputError):
    """A data set that cannot be found, read, or used for preferences."""


class RowError(DatasetError):
    """One row of a data set cannot be used.

    Attributes:
        row: 1-based number of the row in the data set (the line, in a JSONL file).
        reason: what is wrong with it and what to do, without the row's number.
    """

    def __init__(self, row: int, reason: str) -> None:
        self.row = row
        self.reason = reason
        super().__init__(f"row {row}: {reason}")


class CheckpointError(InputError):
    """A model or tokenizer folder that cannot be used."""


class BundleError(InputError):
    """A bundle that is missing, incomplete, or not what its manifest says."""


class BuildError(InputError):
    """A graph that an engine's builder refuses, or that cannot be built on this machine."""


class OutputExistsError(InputError):
    """An output folder that exists and would be overwritten."""


class StorageError(InputError):
    """The disk refused: full, read-only, or no permission."""


class HubError(InputError):
    """The Hugging Face Hub refused, or could not be reached."""


class TrackerError(InputError):
    """An experiment tracker did not take what it was told; the results on disk are whole."""


class MissingDependencyError(InputError):
    """A package that an extra of dpo_fast installs is not there."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package {package!r}: pip install 'dpo-fast[{extra}]'")


class InterruptedRunError(DpoFastError):
    """A run was asked to stop, and has stopped in good order; the message says how it goes on."""

    def __init__(self, number: int, message: str) -> None:
        self.exit_code = 128 + number  # as shells have it
        super().__init__(message)


class CheckFailedError(DpoFastError):
    """A check ran and did not pass."""

    exit_code = 3


class SelfCheckError(CheckFailedError):
    """An exported graph does not say what its PyTorch model says."""


class VerificationError(CheckFailedError):
    """A verification's verdict is "fail" or "cannot tell"."""


class EngineOutputError(CheckFailedError):
    """An engine returned NaN, infinities where none can be, or another number of values than was asked for."""


class PartsFailedError(CheckFailedError):
    """Some parts of a run failed as often as they were tried; the message names them and their rows."""
