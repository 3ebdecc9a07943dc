"""Further operators' signatures of studies: kept, listed, and asked for before a study runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import String, select
from sqlalchemy.orm import Mapped, mapped_column

from consilium_common.errors import ConsiliumError
from consilium_common.identity.certificates import Role
from consilium_common.study.approval import standing
from consilium_common.wire.statements import check_signed, cosignature_statement
from consilium_server.database import insert_new
from consilium_server.registry import Registry
from consilium_server.tables import Base, Member, StudyRow, now

if TYPE_CHECKING:
    from consilium_common.identity.trust import Trust


class Cosignature(Base):
    """A further operator's signature of a study."""

    __tablename__ = "cosignatures"
    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    operator: Mapped[str] = mapped_column(primary_key=True)
    signature: Mapped[str]
    signer_pem: Mapped[str]
    signed_at: Mapped[str]


def cosign(
    registry: Registry,
    trust: Trust,
    row: StudyRow,
    operator: Member,
    signature: str,
) -> bool:
    """Keep an operator's signature of a study; returns whether it was there before.

    Raises
    ------
    ConsiliumError
        ``study.signature-not-asked`` when the study names others; ``identity.bad-signature``.
    """
    approval = row.study.approval
    if approval is None or operator.name not in approval.operators:
        named = "nobody" if approval is None else ", ".join(approval.operators)
        raise ConsiliumError(
            "study.signature-not-asked",
            f"The study does not ask for the signature of {operator.name}; it names {named}.",
            hint="Name the operators under `approval` in the study's file and propose it again.",
        )
    check_signed(
        cosignature_statement(row.digest, operator.name),
        signature,
        operator.signer_pem,
        trust,
        name=operator.name,
        role=Role.PROPOSER,
    )
    values = {
        "digest": row.digest,
        "operator": operator.name,
        "signature": signature,
        "signer_pem": operator.signer_pem,
        "signed_at": now(),
    }
    with registry.transaction() as session:
        # The first one stays: a signature is given once, and a second would say the same.
        made = insert_new(session, Cosignature, values)
        added = session.execute(made.returning(Cosignature.operator)).scalar()
    return added is None


def cosignatures(registry: Registry, digest: str) -> list[Cosignature]:
    """Return the further signatures of a study, the earliest first."""
    with registry.transaction() as session:
        query = select(Cosignature).where(Cosignature.digest == digest)
        return list(session.scalars(query.order_by(Cosignature.signed_at, Cosignature.operator)))


def signature_rows(registry: Registry, digest: str) -> list[dict[str, str]]:
    """Return the further signatures as a site is given them: it checks each by itself."""
    return [
        {"operator": one.operator, "signature": one.signature, "signer_pem": one.signer_pem}
        for one in cosignatures(registry, digest)
    ]


def signatures_overview(registry: Registry, row: StudyRow) -> dict[str, Any]:
    """Return who has signed a study and what is missing, as plain values for people."""
    approval = row.study.approval
    given = cosignatures(registry, row.digest)
    names = [row.proposed_by, *(one.operator for one in given)]
    return {
        "signed": [
            {"operator": row.proposed_by, "at": row.proposed_at},
            *({"operator": one.operator, "at": one.signed_at} for one in given),
        ],
        "needed": 1 if approval is None else approval.signatures,
        "of": [row.proposed_by] if approval is None else list(approval.operators),
        "missing": 0 if approval is None else approval.missing(names),
        "standing": standing(approval, names, row.proposed_by),
    }


def require_signatures(registry: Registry, row: StudyRow) -> None:
    """Refuse to run a study that lacks signatures it asks for.

    Raises
    ------
    ConsiliumError
        ``study.signatures-missing``.
    """
    found = signatures_overview(registry, row)
    if found["missing"]:
        raise ConsiliumError(
            "study.signatures-missing",
            f"The study lacks signatures: {found['standing']}.",
            hint=f"Named operators sign it with `consilium study sign {row.digest[:12]}`.",
        )
