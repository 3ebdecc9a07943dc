"""``consilium site egress``: receipts of what left this site, and what is stored and has not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from consilium_client.home import SiteHome
from consilium_client.identity_cli import DEFAULT_HOME, Home
from consilium_common.console import command, result

if TYPE_CHECKING:
    from rich.console import Console


@command
def egress(
    study: Annotated[str, typer.Argument(help="First digits of a digest; all if empty.")] = "",
    home: Home = DEFAULT_HOME,
) -> None:
    """List the signed receipts of all that left this site, and what is stored and has not left."""
    from consilium_client.evidence import egress_rows

    site = SiteHome.existing(home)
    receipts, updates = _receipts(site, study), egress_rows(site, study)
    left = {_round(receipt["release"]) for receipt in receipts}
    waiting = [row for row in updates if _round(row) not in left]

    def people(console: Console) -> None:
        from rich.table import Table

        if not updates and not receipts:
            console.print("Nothing was stored yet: nothing has left this site.")
        if receipts:
            table = Table("receipt", "study", "what", "bytes", "SHA-256", "left (UTC)", "charge")
            for row in receipts:
                release, paid = row["release"], row["release"]["event"]
                table.add_row(
                    str(row["sequence"]),
                    *_described(release),
                    _time(row["time"]) + ("" if row["sent"] else " (not whole)"),
                    "no privacy" if paid is None else f"entry {paid['sequence']}",
                )
            console.print(table)
        if waiting:
            console.print("Stored, and without a receipt: it has not left under this release.")
            table = Table("study", "what", "bytes", "SHA-256", "stored (UTC)")
            for row in waiting:
                table.add_row(*_described(row), _time(row["stored_at"]))
            console.print(table)

    result({"updates": updates, "receipts": receipts}, people)


def _receipts(site: SiteHome, study: str) -> list[dict[str, Any]]:
    if not site.receipts.exists():
        return []
    from consilium_client.identity import read_config
    from consilium_client.receipts import receipt_rows
    from consilium_common.audit.evidence import read_key

    key = read_key(site.identity / "ledger-public.pem")
    return receipt_rows(site.receipts, key, read_config(site).name, study)


def _round(row: dict[str, Any]) -> tuple[str, str, int]:
    return row["study"], row["purpose"], row["round"]


def _described(row: dict[str, Any]) -> tuple[str, str, str, str]:
    number = row["round"]
    what = {
        "training": f"update of round {number + 1}",
        "evaluation": f"figures after round {number}",
        "statistics": "noised statistics",
    }
    return row["study"][:12], what[row["purpose"]], str(row["bytes"]), row["sha256"][:12]


def _time(text: str) -> str:
    return text[:16].replace("T", " ")
