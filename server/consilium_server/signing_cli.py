"""`consilium study sign`: a further operator signs a study that asks for several signatures."""

from __future__ import annotations

from typing import Annotated

import typer

from consilium_common.console import command, note, result
from consilium_common.errors import ConsiliumError
from consilium_common.identity.cli import Connect
from consilium_common.wire import methods
from consilium_server.options import DEFAULT_HOME, Home


@command
def sign(
    study: Annotated[str, typer.Argument(help="Name, or the first digits of the digest.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    home: Home = DEFAULT_HOME,
    connect: Connect = None,
) -> None:
    """Read a study in words and sign its digest, where it names you among its operators."""
    from consilium_common.identity.personal import person
    from consilium_common.study.load import study_from_canonical
    from consilium_common.study.plan import describe
    from consilium_common.wire.statements import cosignature_statement

    who = person(connect, home)
    with who.caller() as caller:
        shown = caller.call(methods.OPERATOR_SHOW, {"digest": study})
        # What is signed is what is read: the digest is computed here, from the study itself.
        found = study_from_canonical(shown["study"])
        if found.digest != shown["digest"]:
            raise ConsiliumError(
                "study.digest", "The aggregator shows a study under another study's digest."
            )
        if found.approval is None or who.name not in found.approval.operators:
            raise ConsiliumError(
                "study.signature-not-asked",
                f"The study does not ask for the signature of {who.name}.",
                where=f"study {found.digest[:12]}",
                hint="Operators are named under `approval` in the study's file.",
            )
        if not yes:
            note("\n".join(describe(found)))
            note(f"  Now: {shown['signatures']['standing']}.")
            typer.confirm(f"Sign {found.digest} as {who.name}?", abort=True, err=True)
        answer = caller.call(
            methods.OPERATOR_SIGN,
            {
                "digest": found.digest,
                "signature": who.sign(cosignature_statement(found.digest, who.name)),
            },
        )
    before = " (you had signed it before)" if answer["known"] else ""
    result(answer, f"Signed {found.name} ({found.digest[:12]}){before}: {answer['standing']}.")
