"""The root command. Groups are found as entry points and imported only when they are called."""

from __future__ import annotations

import atexit
import gc
import os
import sys
from importlib.metadata import entry_points
from typing import Annotated, Any

import click
import typer
from typer.core import TyperGroup

from consilium_common import __version__
from consilium_common.console import MODE, print_error, to_reader
from consilium_common.errors import ConsiliumError
from consilium_common.models.kept import keep_networks

#: One line per group, so that ``--help`` imports none of them.
GROUPS = {
    "site": "Run a hospital site: data, approval, training, budget.",
    "server": "Run the aggregator: identities, gateway, sites.",
    "study": "Propose, run and watch studies.",
    "audit": "Verify ledgers and privacy, offline.",
    "identity": "Your own identity as an operator or auditor, on your own computer.",
    "demo": "Three hospitals and an aggregator on this machine, end to end.",
}


class _LazyGroups(TyperGroup):
    """Lists groups from a table and imports a group's module only when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(GROUPS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in GROUPS:
            return None
        if ctx.resilient_parsing or ctx.params.get("_listing"):
            return click.Command(cmd_name, help=GROUPS[cmd_name])
        found = [p for p in entry_points(group="consilium.commands") if p.name == cmd_name]
        if not found:
            raise ConsiliumError("internal.installation", f"The command {cmd_name} is missing.")
        loaded: Any = found[0].load()
        return typer.main.get_command(loaded)

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # Click asks for every command to print its short help: answer from the table.
        ctx.params["_listing"] = True
        super().format_help(ctx, formatter)


app = typer.Typer(
    cls=_LazyGroups,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Federated learning for medical imaging: models confer, images never travel.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"consilium {__version__}")
        raise typer.Exit


@app.callback()
def root(
    json_output: Annotated[
        bool, typer.Option("--json", help="Print exactly one JSON envelope on stdout.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Federated learning for medical imaging: models confer, images never travel."""
    MODE.json = json_output
    MODE.debug = debug
    keep_networks()


def main() -> None:
    """Entry point of the ``consilium`` command."""
    # numpy's matrices are small here; its waiting threads would spin against our own.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # As it ends Python would look for cycles among all that torch and MONAI have made: most of a
    # second after the answer, and many on a machine with too much to do.
    atexit.register(gc.freeze)
    # --json is accepted anywhere on the line, as people type it.
    arguments = sys.argv[1:]
    for flag in ("--json", "--debug"):
        if flag in arguments:
            arguments.remove(flag)
            arguments.insert(0, flag)
    command = typer.main.get_command(app)
    sys.stdout = to_reader(sys.stdout)  # also of help, which Typer prints by itself
    try:
        status = command(args=arguments, prog_name="consilium", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(2)
    except click.UsageError as error:
        MODE.json = "--json" in arguments
        print_error(
            ConsiliumError(
                "usage.arguments",
                error.format_message(),
                hint=f"Try `{error.ctx.command_path} --help`." if error.ctx else "",
            )
        )
        sys.exit(2)
    except ConsiliumError as error:
        print_error(error)
        sys.exit(error.exit_status)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    sys.exit(status if isinstance(status, int) else 0)
