"""The process of one contender: runs one task, and says what came of it in lines of JSON.

python -m gpu.work '{"task": "torch", "arguments": {…}}'
"""

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

from dpo_fast.errors import DpoFastError

# Modules that have a function `run`, which takes the arguments and yields what is to be said.
TASKS = ("peak", "with_engine", "with_torch", "with_trl", "verify_families")


def main() -> int:
    """Run the task of the command line; the exit code is 0 if it went well."""
    # Libraries print where results belong, from C too: all but results goes to standard error.
    results = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    job = json.loads(sys.argv[1])
    try:
        if job["task"] not in TASKS:
            raise ValueError(f"the task {job['task']!r} is not one of {', '.join(TASKS)}")
        run: Callable[..., Iterator[dict[str, Any]]] = import_module(f"gpu.{job['task']}").run
        for said in run(**job["arguments"]):
            print(json.dumps(said), file=results, flush=True)
    except DpoFastError as error:
        print(one_line(error), file=sys.stderr)
        return error.exit_code
    except Exception as error:
        traceback.print_exc()
        print(f"{type(error).__name__}: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


def one_line(error: Exception) -> str:
    """What an error says, without its line breaks."""
    return " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(main())
