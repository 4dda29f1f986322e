"""Everything that a binding offers, as JSON: ``python dump_surface.py tensorrt_bindings``.

{"version": …, "names": […], "members": {class: {name: [signature, …]}}}; an enumeration is a class, a property has no
signature, and a class in a class is named "Outer.Inner" as well.
"""

import importlib
import inspect
import json
import re
import sys
from typing import Any


def signatures(value: Any) -> list[str]:
    """The overloads that pybind11 writes into a docstring, without module names."""
    name = getattr(value, "__name__", "")
    found = re.findall(rf"^(?:\d+\. )?({re.escape(name)}\(.*\) -> .*)$", getattr(value, "__doc__", None) or "", re.M)
    return [re.sub(r"\b(?:\w+\.)+(?=[A-Za-z_])", "", text) for text in found if "*args" not in text]


def main(module_name: str) -> None:
    module = importlib.import_module(module_name)
    members: dict[str, dict[str, list[str]]] = {}

    def add(prefix: str, owner: Any) -> None:
        for name, value in inspect.getmembers(owner):
            if name.startswith("__") and name != "__init__":
                continue
            if inspect.isclass(value) and name != "__init__":
                key = prefix + name
                members[key] = {
                    member: signatures(content)
                    for member, content in inspect.getmembers(value)
                    if not member.startswith("__") or member == "__init__"
                }
                if not prefix:
                    add(f"{name}.", value)

    add("", module)
    names = [name for name in dir(module) if not name.startswith("__")] + ["__version__", "__name__"]
    json.dump({"version": module.__version__, "names": names, "members": members}, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
