"""What the doctor found, as a person reads it in a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpo_fast.text import one_line

LONGEST_CELL = 200  # characters of what a driver or an error says


def print_examination(examined: Mapping[str, Any], console: Console) -> None:
    """Print the machine and its recipes.

    Args:
        examined: what `dpo_fast.doctor.examine` returns.
        console: where to.
    """
    machine = examined["machine"]
    console.print(_machine_table(machine))
    table = Table(title="recipes", title_justify="left", header_style="bold")
    for column in ("recipe", "export", "build", "run"):
        table.add_column(column, no_wrap=True)
    table.add_column("what mends it", overflow="fold")
    for verdict in examined["recipes"]:
        states = (_yes_or_no(verdict[name]) for name in ("can_export", "can_build", "can_run"))
        table.add_row(verdict["recipe"], *states, Text("\n".join(verdict["remedies"])))
    console.print(table)


def print_outcomes(outcomes: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Print the self-tests, with the limit of each and its reason.

    Args:
        outcomes: what `dpo_fast.self_test.self_test` returns.
        console: where to.
    """
    table = Table(
        title="self-test: log-probs against PyTorch's, nats a token", title_justify="left", header_style="bold"
    )
    for column in ("recipe", "result", "step", "seconds", "mean error", "limit", "largest"):
        table.add_column(column, justify="left" if column in ("recipe", "result", "step") else "right")
    for outcome in outcomes:
        first: tuple[Text, ...] = (Text(outcome["recipe"]), _result(outcome))
        for step in outcome["steps"] or [{"name": "", "seconds": None, "mean": None, "largest": None}]:
            compared = step["mean"] is not None
            table.add_row(
                *first,
                step["name"],
                "" if step["seconds"] is None else f"{step['seconds']:.1f}",
                f"{step['mean']:.2g}" if compared else "",
                f"{outcome['limit']:g}" if compared else "",
                f"{step['largest']:.2g}" if compared else "",
            )
            first = Text(), Text()
    console.print(table)
    for reason in dict.fromkeys(outcome["reason"] for outcome in outcomes if outcome["reason"]):
        console.print(reason, highlight=False, markup=False)
    for outcome in outcomes:
        if outcome["error"]:
            line = f"{outcome['recipe']}: {one_line(outcome['error'], 2 * LONGEST_CELL)}"
            console.print(line, style="red", highlight=False, markup=False)


def _machine_table(machine: Mapping[str, Any]) -> Table:
    """What the machine has, a line each."""
    table = Table(title="this machine", title_justify="left", show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")

    def add(name: str, text: str) -> None:
        table.add_row(name, Text(one_line(text, LONGEST_CELL)))  # as `Text`, markup in names is not obeyed

    hardware = machine["hardware"]
    add("processor", f"{hardware['processor']}, {hardware['cores']} cores, {hardware['system']}")
    for gpu in machine["gpus"]:
        capability = f"compute capability {gpu['capability']}"
        add("GPU", f"{gpu['name']}, {capability}, {gpu['memory_mib']:,} MiB, driver {gpu['driver']}")
    if machine["gpu_problem"]:
        add("GPU", machine["gpu_problem"])
    add("CUDA", f"the driver takes up to {machine['cuda']}" if machine["cuda"] else "no driver")
    for name, module in machine["modules"].items():
        add(name, _module(name, module, machine))
    return table


def _module(name: str, module: Mapping[str, Any], machine: Mapping[str, Any]) -> str:
    """A package in a few words."""
    if module["version"] is None:
        return "not installed"
    text = str(module["version"])
    if module["problem"]:
        return f"{text}, cannot be imported: {module['problem']}"
    if name == "torch":
        text += ", computes on the GPU" if machine["torch_cuda"] else ", on the CPU alone"
    if name == "onnxruntime":
        text += f" (installed as {' and '.join(module['distributions'])}): {', '.join(machine['providers'])}"
    if name == "openvino":
        text += ", with bfloat16" if machine["bfloat16"] else ", without bfloat16"
    return text


def _yes_or_no(state: bool | None) -> Text:
    if state is None:
        return Text("–", style="dim")
    return Text("yes", style="green") if state else Text("no", style="red")


def _result(outcome: Mapping[str, Any]) -> Text:
    """Passed, failed, or built without having been run."""
    if not outcome["passed"]:
        return Text("failed", style="red")
    return Text("passed", style="green") if outcome["ran"] else Text("built, not run", style="yellow")
