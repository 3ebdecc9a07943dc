"""The steps of `consilium site doctor`, in an order in which each relies on those before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from consilium_client.data.doctor.outcome import data_part
from consilium_client.data.doctor.site import Part, cache, disk, rights
from consilium_client.data.findings import Finding
from consilium_client.doctor.refused import check_refused
from consilium_client.home import SiteHome
from consilium_client.identity import (
    JOIN_AGAIN,
    LOGIN_FILE,
    SiteConfig,
    SiteIdentity,
    complete_join,
    read_config,
)
from consilium_client.joining import given_login
from consilium_common.diagnosis.exchange import Exchange
from consilium_common.diagnosis.machine import check_disk, check_gpu, check_memory, check_secrets
from consilium_common.diagnosis.reaching import look_up, try_proxy, try_tcp
from consilium_common.diagnosis.standing import check_clock, check_standing
from consilium_common.diagnosis.steps import Check, Found
from consilium_common.diagnosis.target import Target, parse_address
from consilium_common.diagnosis.tls import try_tls
from consilium_common.errors import ConsiliumError
from consilium_common.identity.certificates import Role, read_certificate
from consilium_common.identity.invitation import read_invitation
from consilium_common.identity.trust import Trust
from consilium_common.identity.words import fingerprint_words
from consilium_common.wire.channel import Credentials
from consilium_common.wire.proxy import NO_PROXY, check_setting, choose_proxy, read_login
from consilium_common.wire.unavailable import own_trouble

if TYPE_CHECKING:
    from consilium_client.data.importing import Progress

#: Files of the identity folder whose content is secret; the patients' key is the data's matter.
_SECRETS: Final = ("site-key.pem", "site-key.openssh", "ledger-key.pem", LOGIN_FILE)
#: Less than this share of the budget is left: soon no study fits any more.
_LITTLE: Final = 0.1
_TABLE: Final = "See the findings below; `consilium site data check` shows them with pictures."


@dataclass(frozen=True)
class Way:
    """The way out that `site join` would be given.

    Attributes
    ----------
    proxy : str or None
        As :func:`consilium_common.wire.proxy.check_setting` takes it; None: straight.
    login_file : Path or None
        File with ``user:password`` for the proxy.
    """

    proxy: str | None = None
    login_file: Path | None = None

    @property
    def options(self) -> str:
        """The same as options of `site join`, each with a space before it."""
        login = f" --proxy-login {self.login_file}" if self.login_file else ""
        return f" --proxy {self.proxy}{login}" if self.proxy else login


@dataclass
class SiteDoctor:
    """What is found on the way, so that later steps can use it.

    Parameters
    ----------
    invitation : Path, optional
        For a site that has not joined yet: whom to reach stands in it. It is not used up.
    study : Path, optional
        A study's file: do the cases fit it as well?
    way : Way
        With an invitation: the way out that joining would take.
    """

    home: SiteHome
    invitation: Path | None = None
    study: Path | None = None
    progress: Progress | None = None
    config: SiteConfig | None = None
    target: Target | None = None
    findings: list[Finding] = field(default_factory=list)
    way: Way = Way()

    def network_checks(self) -> Iterator[Check]:
        """Yield the steps from the configuration to the TLS handshake."""
        yield Check("configuration", "read site.json", self._configuration)
        yield Check("rights", "looked who may read the site's files", self._rights)
        if (target := self.target) is None:
            return
        yield Check("clock", "compared this machine's clock with certificates", self._clock)
        yield Check("DNS", "looked up the aggregator's name", partial(look_up, target))
        yield Check("TCP", "opened a connection", partial(try_tcp, target))
        yield Check("proxy", "looked for a proxy on the way out", partial(try_proxy, target))
        yield Check("TLS", "shook hands with the aggregator", partial(try_tls, target))

    def checks(self) -> Iterator[Check]:
        """Yield all steps."""
        yield from self.network_checks()
        if self.config is not None:
            yield from self._member_checks(self.config)
        yield Check("disk", "looked for room", self._disk)
        yield Check("memory", "looked for free memory", check_memory)
        device = self.config.device if self.config else "auto"
        yield Check("GPU", "looked for one and computed on it", partial(check_gpu, device))
        yield Check("cache", "read the cache of images", lambda: self._found(cache(self.home)))
        yield Check("data", "checked every case, and the cohort", self._data)
        yield Check("budget", "read policy and ledger", self._budget)

    def _member_checks(self, config: SiteConfig) -> Iterator[Check]:
        exchange = Exchange(lambda: SiteIdentity.load(self.home).caller())
        steps: tuple[tuple[str, str, Callable[[], Found]], ...] = (
            ("identity", "judged this site's own certificate", partial(self._identity, config)),
            ("revocation", "called the aggregator with it", exchange.admitted),
            ("version", "compared releases", exchange.fits),
            ("clock skew", "compared clocks with the aggregator", exchange.skew),
            ("speed", "sent and fetched a few MB", exchange.speed),
            ("egress", "looked what the link refused", partial(check_refused, self.home)),
        )
        try:
            for name, tried, look in steps:
                yield Check(name, tried, look)
        finally:
            exchange.close()

    # --- the network's part ------------------------------------------------------------------

    def _configuration(self) -> Found:
        home = self.home
        complete_join(home)
        if self.way != Way() and (self.invitation is None or home.config.is_file()):
            raise ConsiliumError(
                "usage.proxy",
                "The proxy of a site that has joined stands in its configuration.",
                where=str(home.config),
                hint='Change "proxy" there, and the login in the identity folder; --proxy goes with'
                " --invitation, before joining.",
            )
        if home.config.is_file():
            self.config = read_config(home)
            folder = home.path / "identity"
            trust = Trust.read(folder / "authority.pem")
            self.target = self._target(
                self.config.address,
                trust,
                str(home.config),
                proxy=self.config.proxy,
                credentials=_own_credentials(folder, trust),
            )
            words = fingerprint_words(self.target.trust.authorities[0])
            return Found(
                f"site {self.config.name} of {self.config.consortium!r}, whose authority's words "
                f"are: {words}",
                facts={"site": self.config.name, "address": self.config.address, "words": words},
            )
        if self.invitation is not None:
            invited = read_invitation(self.invitation)
            trust = Trust.load(invited.authority_pem.encode(), where=str(self.invitation))
            self.target = self._target(
                invited.address,
                trust,
                str(self.invitation),
                proxy=self.way.proxy or NO_PROXY,
                credentials=Credentials(
                    trust.tls_pem(),
                    invited.certificate_pem.encode(),
                    invited.private_key_pem.encode(),
                ),
            )
            return Found(
                f"not joined yet; invited as {invited.name} until {invited.expires:%Y-%m-%d %H:%M}",
                f"When all is well here: consilium site join {self.invitation}{self.way.options}",
            )
        return Found.skipped(
            "this site has not joined a consortium yet",
            "Run `consilium site join INVITATION`; `--invitation FILE` looks at the way to the "
            "aggregator before that.",
        )

    def _target(
        self,
        address: str,
        trust: Trust,
        where: str,
        *,
        proxy: str,
        credentials: Credentials | None,
    ) -> Target:
        host, port = parse_address(address, where=where)
        kept = self.home.path / "identity" / LOGIN_FILE
        login = given_login(self.way.login_file) if self.way.login_file else read_login(kept)
        chosen = choose_proxy(check_setting(proxy), address, login=login)
        return Target(host, port, trust, chosen, credentials)

    def _rights(self) -> Found:
        folder = self.home.path / "identity"
        check_secrets(folder / name for name in _SECRETS)
        return self._found(rights(self.home))

    def _clock(self) -> Found:
        assert self.target is not None
        folder = self.home.path / "identity"
        known = [("The authority's", one) for one in self.target.trust.authorities]
        if (folder / "site.pem").exists():
            known.append(("This site's", read_certificate(folder / "site.pem")))
        return check_clock(known, [self.home.config, self.home.ledger, self.home.studies])

    # --- the member's part -------------------------------------------------------------------

    def _identity(self, config: SiteConfig) -> Found:
        folder = self.home.path / "identity"
        trust, certificate = (
            Trust.read(folder / "authority.pem"),
            read_certificate(folder / "site.pem"),
        )
        try:
            found = check_standing(certificate, trust, Role.SITE, config.name, by_itself=True)
            trouble = own_trouble(
                Credentials(
                    trust.tls_pem(),
                    (folder / "site.pem").read_bytes(),
                    (folder / "site-key.pem").read_bytes(),
                )
            )
        except ConsiliumError as error:
            if error.code == "identity.expired":
                error.hint = JOIN_AGAIN
            raise
        except OSError as error:
            raise ConsiliumError(
                "identity.no-key",
                f"Cannot read the private key: {error.strerror or error}.",
                where=str(folder / "site-key.pem"),
                hint="Restore it from your backup, or join again with a new invitation.",
            ) from error
        if trouble is not None:
            raise trouble
        return found

    # --- the site's own part -----------------------------------------------------------------

    def _disk(self) -> Found:
        check_disk(self.home.path)
        return self._found(disk(self.home))

    def _data(self) -> Found:
        part, error = data_part(self.home, study=self.study, progress=self.progress)
        found = self._found(part)
        if error is not None:
            raise error
        return found

    def _budget(self) -> Found:
        from consilium_client.budget.policy import load_policy
        from consilium_client.budget.table import budget_table
        from consilium_common.ledger.conflict import refuse_conflict
        from consilium_common.ledger.store import Ledger

        if self.config is None and not self.home.policy.exists():
            return Found.skipped("no policy yet; joining writes one to adapt")
        policy = load_policy(self.home)
        refuse_conflict(self.home.ledger)
        whole = f"ε {policy.budget.epsilon:g} at δ {policy.budget.delta:g} per patient"
        if not self.home.ledger.exists():
            return Found(f"{whole}; nothing was ever charged")
        with Ledger.open(self.home.ledger) as ledger:
            left = budget_table(ledger, policy).remaining
        said = f"{whole}; ε {left:.2f} left for the patient who has spent most"
        facts = {"epsilon": policy.budget.epsilon, "delta": policy.budget.delta, "left": left}
        if left < _LITTLE * policy.budget.epsilon:
            return Found.warning(
                said,
                "Studies will leave patients out: `consilium site budget` shows who has how much; "
                "whether to raise the budget is for the privacy officer.",
                **facts,
            )
        return Found(said, facts=facts)

    def _found(self, part: Part) -> Found:
        """Return a part of the site as a step; its findings are shown together at the end."""
        self.findings += part.findings
        facts = {"findings": [finding.to_dict() for finding in part.findings]}
        if part.findings:
            return Found.warning(part.said, _TABLE, **facts)
        return Found(part.said, facts=facts)


def _own_credentials(folder: Path, trust: Trust) -> Credentials | None:
    """Return the site's credentials for a handshake; None where they cannot be read."""
    try:
        certificate = (folder / "site.pem").read_bytes()
        return Credentials(trust.tls_pem(), certificate, (folder / "site-key.pem").read_bytes())
    except OSError:
        return None  # a later step says so
