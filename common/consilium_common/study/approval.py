"""Whose signatures a study needs before a site may approve it: k of n named operators."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Annotated, Self

from pydantic import Field, model_validator

from consilium_common.study.strict import Model

#: As a certificate carries it.
OperatorName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]


class Approval(Model):
    """Several operators must have signed the study's digest; the proposer may be one of them."""

    #: Names of the operators whose signature counts, as their certificates carry them.
    operators: Annotated[list[OperatorName], Field(min_length=1, max_length=32)]
    #: How many of them must have signed.
    signatures: Annotated[int, Field(ge=1, le=32)]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.operators)) != len(self.operators):
            raise ValueError("operators has a name twice")
        if self.signatures > len(self.operators):
            raise ValueError(
                f"signatures asks for {self.signatures} of {len(self.operators)} operators"
            )
        return self

    def missing(self, signed: Collection[str]) -> int:
        """Return how many signatures are still missing where the operators ``signed`` have given
        theirs. Whoever is not named counts for nothing, and nobody counts twice.
        """
        return max(0, self.signatures - len(set(self.operators) & set(signed)))


def in_words(approval: Approval | None) -> str:
    """Say whose signatures are needed."""
    if approval is None:
        return "The signature of the operator who proposes it."
    if len(approval.operators) == approval.signatures:
        return f"The signatures of {_listed(approval.operators)}."
    return f"The signatures of any {approval.signatures} of {_listed(approval.operators)}."


def standing(approval: Approval | None, signed: Iterable[str], proposed_by: str) -> str:
    """Say who has signed and who still has to, in one line."""
    names = sorted(set(signed) | {proposed_by})
    if approval is None:
        return f"signed by {proposed_by}"
    counted = [name for name in names if name in approval.operators]
    line = f"{len(counted)} of {approval.signatures} signatures"
    line += f" ({', '.join(counted)})" if counted else ""
    open_ = [name for name in approval.operators if name not in counted]
    if approval.missing(names):
        line += f"; may still sign: {', '.join(open_)}"
    return line


def _listed(names: list[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
