"""The site's certificate is renewed before it ends, and a new authority followed, by themselves.

The keys stay: the TLS key is the Flower node's key too, so the SuperNode runs on and knows nothing
of it. The old certificate is good until the new one was used once, so whatever breaks off in
between leaves a certificate that works.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Final

from cryptography import x509

from consilium_client.greeting import Greeting
from consilium_client.home import SiteHome
from consilium_client.identity import JOIN_AGAIN, SiteIdentity
from consilium_client.lock import renewing
from consilium_common.errors import ConsiliumError
from consilium_common.files import write_atomic
from consilium_common.identity.authority import signing_request
from consilium_common.identity.certificates import (
    RENEW_DAYS,
    Role,
)
from consilium_common.identity.enrolment import check_answer
from consilium_common.identity.keys import load_tls_key
from consilium_common.wire.methods import MEMBER_RENEW, MEMBER_TRUST

_log = logging.getLogger(__name__)

_CALL_SECONDS: Final = 10.0
_LONGEST_PAUSE: Final = timedelta(hours=1)
_SHORTEST_PAUSE: Final = timedelta(seconds=0.1)
#: Asked by the aggregator again and again, the site still renews at most this often.
_ASKED_PAUSE: Final = timedelta(minutes=1)
#: That a certificate ends and cannot be renewed is said again after so long.
_SAY_AGAIN: Final = timedelta(days=1)
#: What is wrong with whom the aggregator says to trust, and not with this site's own certificate.
_OF_TRUST: Final = frozenset({"identity.untrusted-authority", "identity.foreign"})
#: A clock that is further off than this disturbs certificates and signed times.
_SKEW: Final = timedelta(minutes=2)


def renew(home: SiteHome, identity: SiteIdentity) -> x509.Certificate | None:
    """Have the keys certified for another period and store that; None: the authority is offline.

    Raises
    ------
    ConsiliumError
        ``network.*``, ``identity.*``; the certificate in force stays.
    """
    signer = identity.signer()
    name = identity.config.name
    # First: what the aggregator certifies now may need an authority that is not known here yet.
    follow_trust(home, identity)
    key = load_tls_key(identity.folder / "site-key.pem")
    with renewing(home), identity.caller() as caller:
        answer = caller.call(
            MEMBER_RENEW,
            {
                "request_pem": signing_request(key, name).decode(),
                "signer_request_pem": signing_request(signer, name).decode(),
            },
            timeout=_CALL_SECONDS,
        )
        if isinstance(answer, dict) and answer.get("waiting") is True:
            return None
        if not isinstance(answer, dict):
            raise _bad_answer()
        holder = name, Role.SITE
        check_answer(answer, identity.trust, holder, key.public_key(), signer.public_key())
        # Both certify the keys that the site has: in every mixture with the old ones they work.
        write_atomic(identity.folder / "ledger-signer.pem", answer["signer_pem"].encode())
        write_atomic(identity.folder / "site.pem", answer["certificate_pem"].encode())
    return identity.current_certificate()


def follow_trust(home: SiteHome, identity: SiteIdentity) -> bool:
    """Ask whom to trust, and store a new authority that a trusted one vouches for.

    Returns
    -------
    bool
        Whether anything changed.

    Raises
    ------
    ConsiliumError
        ``identity.untrusted-authority`` and others of ``identity.*``, ``network.*``; trust is as
        it was.
    """
    with renewing(home), identity.caller() as caller:
        answer = caller.call(MEMBER_TRUST, {}, timeout=_CALL_SECONDS)
        try:
            bundle, cross = answer["authority_pem"].encode(), answer["cross_pem"]
            crossing = None if cross is None else cross.encode()
        except (KeyError, TypeError, AttributeError) as error:
            raise _bad_answer() from error
        before = identity.trust
        after = before.follow(bundle, crossing)
        # Our own certificate has to stay one of ours, or the next start would refuse it.
        after.check(identity.current_certificate())
        if after.pem() == before.pem():
            return False
        write_atomic(identity.folder / "authority.pem", after.pem())
    return True


class Renewal:
    """Renews while the site runs.

    Parameters
    ----------
    say : callable
        Tells the site operator what they should know.
    """

    def __init__(self, home: SiteHome, identity: SiteIdentity, say: Callable[[str], None]) -> None:
        self._home = home
        self._identity = identity
        self._say = say
        self._wake = asyncio.Event()
        self._asked = False
        self._renewed_at: datetime | None = None
        self._announced = ""
        self._said_at: datetime | None = None
        self._said = ""
        self._skewed = False

    def heard(self, greeting: Greeting) -> None:
        """Take note of what the aggregator says of certificates, authorities and its clock."""
        self._asked = greeting.renew
        if self._asked or greeting.trust != self._announced:
            self._announced = greeting.trust
            self._wake.set()
        self._compare_clocks(greeting)

    async def renew_for_ever(self) -> None:
        """Renew when it is due, follow a new authority when there is one."""
        while True:
            pause = _LONGEST_PAUSE
            try:
                if self._announced not in ("", self._identity.trust.digest):
                    await asyncio.to_thread(self._follow)
                if self._is_due():
                    await asyncio.to_thread(self._renew)
                self._said = ""
                pause = self._until_due()
            except ConsiliumError as error:
                pause = self._complain(error)
            except Exception as error:
                _log.exception("unforeseen")
                pause = self._complain(ConsiliumError("internal.unexpected", type(error).__name__))
            # Not wait_for, which may lose a cancellation that comes together with the event.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause.total_seconds()):
                    await self._wake.wait()
            self._wake.clear()

    def _is_due(self) -> bool:
        if self._identity.trust.wants_renewal(self._identity.current_certificate()):
            return True
        recently = (
            self._renewed_at is not None and datetime.now(UTC) - self._renewed_at < _ASKED_PAUSE
        )
        return self._asked and not recently

    def _until_due(self) -> timedelta:
        certificate = self._identity.current_certificate()
        begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        due = end - min(timedelta(days=RENEW_DAYS), (end - begin) / 3)
        now = datetime.now(UTC)
        # One that is due as soon as it is there is used for a good part of what it lives.
        pause = due - now if due > now else (end - now) / 3
        return max(_SHORTEST_PAUSE, min(pause, _LONGEST_PAUSE))

    def _renew(self) -> None:
        renewed = renew(self._home, self._identity)
        self._renewed_at = datetime.now(UTC)
        if renewed is None:
            raise ConsiliumError(
                "identity.waiting",
                "The request for a new certificate waits for the consortium's offline authority.",
                hint="Nothing to do here; the aggregator operator was asked.",
            )
        self._asked = False
        self._say(f"the certificate was renewed; it ends on {renewed.not_valid_after_utc:%Y-%m-%d}")

    def _follow(self) -> None:
        if follow_trust(self._home, self._identity):
            self._say("the consortium has a new authority; the one before it vouches for it")

    def _complain(self, error: ConsiliumError) -> timedelta:
        """Say what failed, each trouble at once and then daily; return when to try again."""
        end = self._identity.current_certificate().not_valid_after_utc
        now = datetime.now(UTC)
        left = end - now
        if left <= timedelta(0):
            error = ConsiliumError(
                "identity.expired", f"It expired on {end:%Y-%m-%d}.", hint=JOIN_AGAIN
            )
        if error.code != self._said or self._said_at is None or now - self._said_at > _SAY_AGAIN:
            self._said, self._said_at = error.code, now
            days = max(0, left.days)
            ends = f"{end:%Y-%m-%d %H:%M} UTC (in {days} days)"
            if left <= timedelta(0):
                said = f"CERTIFICATE: this site is shut out: {error}"
            elif error.code in _OF_TRUST:
                said = (
                    "AUTHORITY: what the aggregator says of the consortium's authorities is not"
                    " believed. Nothing was changed, and the site goes on with its certificate"
                    f" until {ends}, or until the aggregator refuses it: {error}"
                )
            else:
                said = (
                    "CERTIFICATE: it was not renewed, and this site is shut out when it ends on"
                    f" {ends}: {error}"
                )
            self._say(said)
        return max(_SHORTEST_PAUSE, min(left / 20, _LONGEST_PAUSE))

    def _compare_clocks(self, greeting: Greeting) -> None:
        if greeting.time is None:
            return
        skew = datetime.now(UTC) - greeting.time
        if abs(skew) > _SKEW and not self._skewed:
            self._say(
                f"this machine's clock is {abs(skew.total_seconds()) / 60:.0f} minutes"
                f" {'ahead of' if skew > timedelta(0) else 'behind'} the aggregator's:"
                " set one of them right, or certificates and signed times will fail"
            )
        self._skewed = abs(skew) > _SKEW


def _bad_answer() -> ConsiliumError:
    return ConsiliumError(
        "network.bad-answer",
        "The aggregator's answer is of no use: it holds no certificates.",
        hint="Site and aggregator may run versions that do not fit; update the older one.",
    )
