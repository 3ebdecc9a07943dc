"""``consilium audit``: commands for the privacy officer; nothing here needs a network or a site."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from consilium_common.console import command, note, result
from consilium_common.errors import ConsiliumError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from rich.console import Console

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Verify ledgers and privacy, offline.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
@command
def verify(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="ledger.db or exported .jsonl.")
    ],
    key: Annotated[
        list[Path],
        typer.Option(
            metavar="PUBLIC.pem",
            help="The site's public ledger key. Once for all files, or once per file in order.",
        ),
    ],
    head: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SEQUENCE:HASH",
            help="A head noted earlier, once per file in order: finds entries cut off at the end.",
        ),
    ] = None,
    delta: Annotated[
        float | None,
        typer.Option(help="δ for the worst patient (default: that of the site's policy)."),
    ] = None,
) -> None:
    """Verify every link and signature, and recompute ε by PLD, PRV and RDP."""
    from consilium_common.audit.ledger_report import ledger_report
    from consilium_common.ledger.entries import Head

    keys = [_public_key(path) for path in key]
    if len(keys) == 1:
        keys = keys * len(files)
    if len(keys) != len(files):
        raise ConsiliumError(
            "usage.keys",
            f"There are {len(files)} files and {len(keys)} keys.",
            hint="Give one --key for all files, or one per file in the same order.",
        )
    heads = [Head.parse(text) for text in head or []]
    if heads and len(heads) != len(files):
        raise ConsiliumError(
            "usage.heads",
            f"There are {len(files)} files and {len(heads)} heads.",
            hint="Give one --head per file in the same order, or none.",
        )
    expected: list[Head | None] = list(heads) if heads else [None] * len(files)
    reports = []
    broken: list[ConsiliumError] = []
    for path, public_key, expected_head in zip(files, keys, expected, strict=True):
        try:
            reports.append(
                ledger_report(path, public_key, expected_head=expected_head, delta=delta)
            )
        except ConsiliumError as error:
            broken.append(error)
    if broken:
        # One envelope, one error: the first. The other files' outcomes are diagnostics.
        for report in reports:
            note(f"{report.file}: verified, {report.entries} entries, head {report.head}")
        for other in broken[1:]:
            note(str(other))
        raise broken[0]

    def people(console: Console) -> None:
        for report in reports:
            report.print_to(console)

    result({"ledgers": [report.to_dict() for report in reports]}, people)


@app.command()
@command
def export(
    ledger: Annotated[Path, typer.Argument(metavar="LEDGER.db", help="A site's ledger.")],
    out: Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="The file to write.")],
) -> None:
    """Write a ledger as one line of canonical JSON per entry, to hand to an auditor."""
    from consilium_common.ledger.store import Ledger

    if out.suffix != ".jsonl":
        raise ConsiliumError(
            "usage.export", "An export ends in .jsonl.", where=str(out), hint="Rename the output."
        )
    if out.exists():
        raise ConsiliumError(
            "state.exists",
            "The file exists; an earlier export is evidence and is not overwritten.",
            where=str(out),
            hint="Choose another name.",
        )
    with Ledger.open(ledger) as opened:
        head = opened.export_jsonl(out)
        site = opened.site
    result(
        {"file": str(out), "site": site, "entries": head.sequence + 1, "head": str(head)},
        f"Wrote {head.sequence + 1} entries of {site} to {out}.\n"
        f"Head {head}: note it where the site cannot change it, and give it to "
        "`consilium audit verify --head` later.",
    )


def _public_key(path: Path) -> Ed25519PublicKey:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        found = load_pem_public_key(path.read_bytes())
    except OSError as error:
        raise ConsiliumError(
            "identity.no-key",
            f"Cannot read the public key: {error.strerror or error}.",
            where=str(path),
            hint="Ask the site for its public ledger key.",
        ) from error
    except (ValueError, UnsupportedAlgorithm):
        found = None
    if not isinstance(found, Ed25519PublicKey):
        raise ConsiliumError(
            "identity.bad-key",
            "The file does not hold an Ed25519 public key in PEM.",
            where=str(path),
            hint="Ask the site for its public ledger key, the one it published when it joined.",
        )
    return found
