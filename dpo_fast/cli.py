"""The command line: arguments in, a table or JSON out, errors as one line and an exit code.

Exit codes: 0 done; 2 the input is at fault; 3 a check failed; 1 a bug. Results go to standard output, everything else
to standard error. Heavy packages are imported by the command that needs them, so that --help is at once there.
"""

import sys
from typing import Annotated

import typer

from dpo_fast import __version__
from dpo_fast.commands import compare, evaluate, export, generate, machine, publish, report, rescore, verify, watch
from dpo_fast.commands.output import say
from dpo_fast.errors import DpoFastError

INTERRUPTED = 130  # as shells have it: 128 + SIGINT

app = typer.Typer(
    name="dpo-fast",
    help="Evaluate DPO-trained language models on inference engines, with TRL's numbers.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def show_version(wanted: bool) -> None:
    """Print the version and leave."""
    if wanted:
        typer.echo(f"dpo-fast {__version__}")
        raise typer.Exit


@app.callback()
def options_of_all(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Evaluate DPO-trained language models on inference engines, with TRL's numbers."""


app.command("export")(export.export_command)
app.command("build")(export.build_command)
app.command("refit")(export.refit_command)
app.command("evaluate")(evaluate.evaluate_command)
app.command("merge")(rescore.merge_command)
app.command("rescore")(rescore.rescore_command)
app.command("report")(report.report_command)
app.command("compare")(compare.compare_command)
app.command("advise")(compare.advise_command)
app.command("generate")(generate.generate_command)
app.command("watch")(watch.watch_command)
app.command("verify")(verify.verify_command)
app.command("check-signature")(verify.check_signature_command)
app.command("push")(publish.push_command)
app.command("doctor")(machine.doctor_command)
app.command("demo")(machine.demo_command)


def main() -> None:
    """Run the command line of this process."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run a command line, and turn errors into one line and an exit code.

    Args:
        arguments: what follows the program's name; the help is shown where nothing does.

    Returns:
        The exit code; see the module's docstring.
    """
    try:
        code = app(arguments or ["--help"], prog_name="dpo-fast", standalone_mode=False)
    except DpoFastError as error:
        say(f"dpo-fast: {error}")
        return error.exit_code
    except typer.TyperException as error:  # an option that does not exist, or a value that is not of its type
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "dpo-fast"
        say(f"dpo-fast: {error.format_message().rstrip('.')}; see `{command} --help`")
        return error.exit_code
    except KeyboardInterrupt:
        code = INTERRUPTED
    if code == INTERRUPTED:  # which Typer makes of a KeyboardInterrupt
        say("dpo-fast: interrupted; an evaluation goes on from where it was when the same command is run again")
    return code or 0
