"""The command line.

Commands are imported when they are called, and import what they need when they run.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

import click

from privfl import environment
from privfl._version import __version__
from privfl.cli.help import example
from privfl.errors import EXIT_USER, PrivflError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

_COMMANDS = {
    "train": "Train one model at all sites of an experiment.",
    "plan": "Say what an experiment would cost in privacy, before anything runs.",
    "budget": "Show, report, verify or export what sites have spent.",
    "init": "Write a commented starter experiment that runs as it stands.",
    "keys": "Make a site's identity, or show its public key.",
    "doctor": "Show versions, MPI and threads, and test the encryption.",
}


# Commands that other packages bring: the audits, which privfl itself never imports.
_ENTRY_POINTS = "privfl.commands"


def _brought() -> dict[str, EntryPoint]:
    from importlib.metadata import entry_points

    return {point.name: point for point in entry_points(group=_ENTRY_POINTS)}


class _Lazy(click.Group):
    def list_commands(self, context: click.Context) -> list[str]:
        return [*_COMMANDS, *_brought()]

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        command: click.Command | None = None
        if name in _COMMANDS:
            command = importlib.import_module(f"privfl.cli.{name}").command
        elif (point := _brought().get(name)) is not None:
            command = point.load()
        return command

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        brought = {name: point.load().short_help for name, point in _brought().items()}
        with formatter.section("Commands"):
            formatter.write_dl([*_COMMANDS.items(), *brought.items()])


@click.group(
    cls=_Lazy,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=example("mpiexec -n 5 privfl train", "privfl init mine, for an experiment of your own"),
)
@click.version_option(__version__, prog_name="privfl")
def cli() -> None:
    """Train one model on records that may not leave their sites, and know what it cost in privacy.

    Differentially private federated learning over MPI, with encrypted aggregation and an epsilon
    for every site.
    """


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command. A user's mistake is one sentence, printed once per job, with exit code 2."""
    try:
        code = cli.main(arguments, prog_name="privfl", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(EXIT_USER)
    except click.ClickException as error:
        where = (
            f" (see `{error.ctx.command_path} --help`)"
            if isinstance(error, click.UsageError) and error.ctx
            else ""
        )
        _complain(error.format_message().rstrip(".") + where)
        sys.exit(EXIT_USER)
    except click.Abort:
        sys.exit(130)
    except PrivflError as error:
        _complain(str(error))
        sys.exit(error.exit_code)


def _complain(sentence: str) -> None:
    # Every rank of a job meets the same mistake; only the first one speaks.
    if environment.launcher_rank() in (None, 0):
        sys.stderr.write(f"privfl: {sentence}\n")
