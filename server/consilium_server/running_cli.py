"""`consilium study run`, `pause`, `resume`, `stop`, `watch` and `log`: a study's runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from consilium_common.console import command, note, result
from consilium_common.identity.cli import Connect
from consilium_common.wire import methods
from consilium_server.home import ServerHome
from consilium_server.options import DEFAULT_HOME, Home

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer()

Which = Annotated[str, typer.Argument(help="Name, or the first digits of the digest.")]


def ask(home: Path, connect: Path | None, method: str, request: dict[str, Any]) -> Any:
    """Ask the aggregator as the operator of ``home``, or with the certificate in ``connect``."""
    from consilium_common.identity.personal import connect as connect_to

    with connect_to(connect, home) as caller:
        return caller.call(method, request)


def ask_study(home: Path, connect: Path | None, study: str) -> dict[str, Any]:
    """Ask the aggregator for all that it knows of one study."""
    from consilium_common.identity.personal import connect as connect_to
    from consilium_server.overview_pages import whole_study

    with connect_to(connect, home) as caller:
        return whole_study(lambda request: caller.call(methods.OPERATOR_SHOW, request), study)


@app.command()
@command
def run(
    study: Which,
    *,
    priority: Annotated[
        int | None,
        typer.Option(min=-100, max=100, help="Of queued studies the highest comes first."),
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Stay and watch it.")] = False,
    home: Home = DEFAULT_HOME,
    connect: Connect = None,
) -> None:
    """Queue an approved study, or one that stopped or failed, from its last round.

    It starts at once where enough of its sites are online and free.
    """
    data = ask(home, connect, methods.OPERATOR_RUN, {"digest": study, "priority": priority})
    if watch:
        follow_study(home, connect, data["digest"])
    else:
        result(data, _standing(data))


@app.command()
@command
def pause(
    study: Which,
    *,
    now: Annotated[
        bool,
        typer.Option("--now", help="At once: the round under way is left and asked again later."),
    ] = False,
    home: Home = DEFAULT_HOME,
    connect: Connect = None,
) -> None:
    """Pause a study after the round under way; it keeps its finished rounds."""
    data = ask(home, connect, methods.OPERATOR_PAUSE, {"digest": study, "now": now})
    result(data, _standing(data))


@app.command()
@command
def resume(study: Which, home: Home = DEFAULT_HOME, connect: Connect = None) -> None:
    """Let a paused study go on from its last finished round."""
    data = ask(home, connect, methods.OPERATOR_RESUME, {"digest": study})
    result(data, _standing(data))


@app.command()
@command
def stop(study: Which, home: Home = DEFAULT_HOME, connect: Connect = None) -> None:
    """Stop a study; finished rounds are kept and it can be run on."""
    data = ask(home, connect, methods.OPERATOR_STOP, {"digest": study})
    result(data, "Stopped. Go on with `consilium study run`.")


@app.command()
@command
def watch(study: Which, home: Home = DEFAULT_HOME, connect: Connect = None) -> None:
    """Watch a study live until it ends; ends with an error status when the study does.

    Ctrl-C ends the watching alone. A connection that breaks is made again for ten minutes.
    """
    follow_study(home, connect, study)


@app.command()
@command
def log(
    study: Which,
    *,
    number: Annotated[
        int | None,
        typer.Option("--round", min=1, help="Show each site's part in this round alone."),
    ] = None,
    home: Home = DEFAULT_HOME,
    connect: Connect = None,
) -> None:
    """Show what became of a study: every change of its state, by whom and why, and its rounds."""
    request: dict[str, Any] = {"digest": study}
    if number is not None:
        request["round"] = number - 1
    data = ask(home, connect, methods.OPERATOR_LOG, request)

    def people(console: Console) -> None:
        from consilium_server.watching import log_view, round_view

        console.print(log_view(data) if number is None else round_view(data))

    result(data, people)


def follow_study(home: Path, connect: Path | None, study: str) -> None:
    """Watch a study to its end and print its result."""
    from consilium_common.console import print_error
    from consilium_common.errors import ConsiliumError
    from consilium_common.identity.personal import connect as connect_to
    from consilium_server.overview_pages import whole_study
    from consilium_server.watching import evaluation_line, follow

    with connect_to(connect, home) as caller:

        def show(request: dict[str, Any]) -> Any:
            return caller.call(methods.OPERATOR_SHOW, request)

        try:
            data = follow(lambda: whole_study(show, study), note)
        except KeyboardInterrupt:
            print_error(
                ConsiliumError(
                    "run.interrupted",
                    "Nobody watches the study here any more; it goes on at the aggregator.",
                    hint=f"Look again with `consilium study watch {study}`; end it with"
                    f" `consilium study stop {study}`.",
                )
            )
            raise typer.Exit(130) from None
    if data["state"] != "finished":
        raise ConsiliumError(
            "run.failed" if data["state"] == "failed" else "run.stopped",
            f"The study {data['name']} {data['state']}: {data['reason']}",
            hint="Mend the cause, then go on with `consilium study run`; no round is lost.",
        )
    why = f": {data['reason']}" if data["reason"] else ""
    lines = [f"{data['name']} finished after {len(data['rounds'])} rounds{why}."]
    if data["evaluation"]:
        lines.append(evaluation_line(data["evaluation"]))
    if connect is None:
        folder = ServerHome.existing(home).study_folder(data["digest"])
        lines.append(f"The model: {folder / 'model.safetensors'}")
    result(data, "\n".join(lines))


def _standing(data: dict[str, Any]) -> str:
    look = f"Watch it with `consilium study watch {data['digest'][:12]}`."
    if data["pause_asked"]:
        return f"It pauses when the round under way has ended. {look}"
    if data["state"] == "queued":
        why = data["waits_for"] or "the aggregator starts it in a moment"
        return f"Queued, place {data['place']}: {why}. {look}"
    if data["state"] == "paused":
        return f"Paused. Go on with `consilium study resume {data['digest'][:12]}`."
    return f"{data['state'].capitalize()}. {look}"
