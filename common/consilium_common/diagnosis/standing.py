"""What can be said of certificates and keys on this machine without asking anybody."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509

from consilium_common.diagnosis.steps import Found
from consilium_common.errors import ConsiliumError
from consilium_common.identity.certificates import Certified, Role, due_for_renewal
from consilium_common.identity.trust import Trust
from consilium_common.identity.words import fingerprint_words
from consilium_common.report.wording import moment, plural

#: A file from the future by more than this: the clock was set back, or was wrong then.
_FUTURE = timedelta(minutes=10)


def check_clock(certificates: list[tuple[str, x509.Certificate]], files: list[Path]) -> Found:
    """Compare this machine's clock with what must lie behind it: certificates and our own files.

    Parameters
    ----------
    certificates : list of (whose, certificate)
        That were valid when they came here.
    files : list of Path
        That were written here; missing ones are left out.

    Raises
    ------
    ConsiliumError
        ``network.clock`` when one begins, or was written, in the future.
    """
    now = datetime.now(UTC)
    for whose, certificate in certificates:
        begins = certificate.not_valid_before_utc
        if begins > now:
            raise _behind(now, f"{whose} certificate is valid from {moment(begins)}")
    for path in files:
        if path.exists():
            written = datetime.fromtimestamp(path.stat().st_mtime, UTC)
            if written > now + _FUTURE:
                raise _behind(now, f"{path.name} was written here at {moment(written)}")
    return Found(f"{moment(now)}; nothing here is from later", facts={"now": now.isoformat()})


def _behind(now: datetime, against: str) -> ConsiliumError:
    return ConsiliumError(
        "network.clock",
        f"This machine's clock says {moment(now)}, but {against}.",
        hint="Set the clock, best by NTP (`timedatectl` shows its state). If the clock is right, "
        "ask the aggregator operator, whose clock was ahead.",
    )


def check_standing(
    certificate: x509.Certificate, trust: Trust, role: Role, name: str, *, by_itself: bool
) -> Found:
    """Judge one's own certificate: consortium, time, key, usage, role, name.

    Parameters
    ----------
    by_itself : bool
        Whether a running process renews it when it is due.

    Raises
    ------
    ConsiliumError
        ``identity.expired`` and others of :meth:`Trust.check`; ``identity.wrong-role``,
        ``identity.wrong-name``.
    """
    certified = trust.check(certificate)
    if certified.role is not role:
        raise ConsiliumError(
            "identity.wrong-role",
            f"The certificate here is that of {_a(certified.role)}, not of {_a(role)}.",
            hint=f"Put the {role}'s own certificate back, or join again with an invitation for "
            f"{_a(role)}.",
        )
    if certified.name != name:
        raise ConsiliumError(
            "identity.wrong-name",
            f"The certificate here is that of {certified.name!r}, and this is {name!r}.",
            hint="Two identities were mixed: restore this one's folder from your backup.",
        )
    words = fingerprint_words(certificate)
    said = f"{role} {name}, until {moment(certified.not_after)}; words: {words}"
    facts = _facts(certified, words)
    if due_for_renewal(certificate):
        todo = (
            "It is renewed by itself while the site runs: start it (`consilium site start`)."
            if by_itself
            else "Renew it before that day."
        )
        return Found.warning(f"{said}; due for renewal", todo, **facts)
    return Found(said, facts=facts)


def expiring(members: list[tuple[str, x509.Certificate]]) -> Found:
    """Say whose certificates have expired or are due.

    Parameters
    ----------
    members : list of (name, certificate)
        Of those whose certificates are in force.
    """
    now = datetime.now(UTC)
    gone = [name for name, one in members if one.not_valid_after_utc < now]
    due = [name for name, one in members if name not in gone and due_for_renewal(one, now=now)]
    facts = {"members": len(members), "expired": gone, "due": due}
    said = plural(len(members), "member")
    if not gone and not due:
        return Found(f"{said}, none of whose certificates is due", facts=facts)
    parts = [f"{said}"]
    if gone:
        parts.append(f"expired: {', '.join(gone)}")
    if due:
        parts.append(f"due: {', '.join(due)}")
    return Found.warning(
        "; ".join(parts),
        "Who is due renews by itself while it is connected; ask whether it runs. Who has expired "
        "needs a new invitation: `consilium server invite NAME`.",
        **facts,
    )


def _facts(certified: Certified, words: str) -> dict[str, str]:
    return {
        "role": str(certified.role),
        "name": certified.name,
        "serial": certified.serial,
        "valid_until": certified.not_after.isoformat(),
        "words": words,
    }


def _a(role: Role) -> str:
    return f"an {role}" if str(role)[0] in "aeio" else f"a {role}"
