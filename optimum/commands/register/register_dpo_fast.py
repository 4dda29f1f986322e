"""`optimum-cli export dpo`: the exporter as optimum's subcommand, with the options of `dpo-fast export` itself.

optimum looks for such files in every distribution's `optimum/commands/register`, which is a namespace: no
`__init__.py` belongs here.
"""

import sys
from argparse import SUPPRESS, ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand


class DpoExportCommand(BaseOptimumCLICommand):
    """Hands its arguments to `dpo-fast export`."""

    COMMAND = CommandInfo(name="dpo", help="Export a DPO policy and its reference as log-prob graphs (dpo_fast).")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Take the options from the command itself, so that they are said once."""
        import typer

        from dpo_fast.cli import app

        command = typer.main.get_command(app).commands["export"]
        for option in command.params:
            names = [name for name in option.opts if name not in ("-h", "--help")]
            if not names:
                continue
            text = (option.help or "").replace("%", "%%")
            if option.is_flag:
                parser.add_argument(*names, action="store_true", default=SUPPRESS, dest=names[0], help=text)
            else:
                metavar = names[0].lstrip("-").upper()
                parser.add_argument(
                    *names, required=option.required, default=SUPPRESS, dest=names[0], metavar=metavar, help=text
                )

    def run(self) -> None:
        """Run the command, and end this process with its exit code."""
        from dpo_fast.cli import run

        arguments = ["export"]
        for name, value in vars(self.args).items():
            if name.startswith("--"):
                arguments += [name] if value is True else [name, value]
        sys.exit(run(arguments))


REGISTER_COMMANDS = [(DpoExportCommand, ExportCommand)]
