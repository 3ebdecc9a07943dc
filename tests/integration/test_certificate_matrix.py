"""Every certificate that must not open the port: refused with its own reason in the aggregator's
log and on the caller's own side, and with none on the wire."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from federation import Federation, consilium, wait_for

from consilium_common.errors import ConsiliumError
from consilium_common.identity.authority import Authority, certificate_pem
from consilium_common.identity.certificates import SERVER_NAME, Role, urn
from consilium_common.identity.keys import load_tls_key
from consilium_common.wire.channel import CHANNEL_OPTIONS, Caller, Credentials
from consilium_common.wire.methods import ERROR_KEY, OPERATOR_SITES, SITE_HELLO
from consilium_common.wire.tls13 import grpc

SITE = "north"
#: What an HTTP/2 client says first: the preface and empty settings.
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])

AnyKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    with Federation(tmp_path_factory.mktemp("matrix")) as running:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(running.join, (SITE, "gone")))
        running.server("revoke", "gone").data  # noqa: B018
        yield running


@pytest.fixture(scope="module")
def authority(federation: Federation) -> Authority:
    return Authority.load(federation.home / "identity")


def p384() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP384R1())


@dataclass(frozen=True)
class Made:
    """A certificate of the consortium's authority that no command would make."""

    key: AnyKey
    role: Role = Role.SITE
    starts: timedelta = timedelta(minutes=-10)
    ends: timedelta = timedelta(days=10)
    signs: bool = True  #: key usage digitalSignature
    purpose: x509.ObjectIdentifier | None = ExtendedKeyUsageOID.CLIENT_AUTH

    def by(self, issuer: Authority, shown: Authority) -> Credentials:
        """Have ``issuer`` certify it; the caller itself trusts ``shown``."""
        now = datetime.now(UTC)
        usage = dict.fromkeys(
            (
                "content_commitment",
                "data_encipherment",
                "key_agreement",
                "key_cert_sign",
                "crl_sign",
                "encipher_only",
                "decipher_only",
            ),
            False,
        )
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, SITE)]))
            .issuer_name(issuer.certificate.subject)
            .public_key(self.key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + self.starts)
            .not_valid_after(now + self.ends)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(
                x509.KeyUsage(
                    digital_signature=self.signs, key_encipherment=not self.signs, **usage
                ),
                critical=True,
            )
            .add_extension(
                x509.SubjectAlternativeName(
                    [x509.UniformResourceIdentifier(urn(issuer.consortium, self.role, SITE))]
                ),
                critical=False,
            )
        )
        if self.purpose is not None:
            builder = builder.add_extension(x509.ExtendedKeyUsage([self.purpose]), critical=True)
        pem = self.key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        certificate = builder.sign(issuer.key, hashes.SHA384())
        return Credentials(certificate_pem(shown.certificate), certificate_pem(certificate), pem)


def own_credentials(federation: Federation, name: str) -> Credentials:
    folder = federation.sites[name].home / "identity"
    return Credentials(
        (folder / "authority.pem").read_bytes(),
        (folder / "site.pem").read_bytes(),
        (folder / "site-key.pem").read_bytes(),
    )


DAYS = timedelta(days=1)
#: What the caller's own side says, by the code of its error. What it cannot know it does not guess.
OWN_WORDS = {
    "expired": f"The certificate of {SITE!r} expired on ",
    "not-yet-valid": "This computer's clock is probably behind: ",
    "wrong-usage": f"The certificate of {SITE!r} does not allow the use that site certificates",
    "weak-key": "The certificate's key is neither EC P-384 nor Ed25519.",
    "foreign": f"The certificate of {SITE!r} was issued by another consortium.",
    "wrong-role": "The certificate",
    "refused": "The aggregator refuses this certificate, which is valid in itself: ",
}
#: Per case: the certificate, what the aggregator's log says, what the caller finds on its own side.
MADE = {
    "expired": (Made(p384(), starts=-2 * DAYS, ends=-DAYS), "expired", "expired"),
    "not yet valid": (Made(p384(), starts=DAYS), "not-yet-valid", "not-yet-valid"),
    "of a server": (
        Made(p384(), role=Role.SERVER, purpose=ExtendedKeyUsageOID.SERVER_AUTH),
        "wrong-usage",
        "wrong-role",
    ),
    "for servers": (
        Made(p384(), purpose=ExtendedKeyUsageOID.SERVER_AUTH),
        "wrong-usage",
        "wrong-usage",
    ),
    "for no purpose": (Made(p384(), purpose=None), "wrong-usage", "wrong-usage"),
    "that may not sign": (Made(p384(), signs=False), "wrong-usage", "wrong-usage"),
    "of a weak curve": (Made(ec.generate_private_key(ec.SECP256R1())), "weak-key", "weak-key"),
    "of RSA": (Made(rsa.generate_private_key(65537, 2048)), "weak-key", "weak-key"),
    # TLS does not even ask for such a key's signature, so its holder presents nothing.
    "of a signer": (
        Made(ed25519.Ed25519PrivateKey.generate(), role=Role.SIGNER, purpose=None),
        "no-certificate",
        "wrong-role",
    ),
    "never issued": (Made(p384()), "replaced", "refused"),
}

CASES = [*MADE, "of another consortium", "revoked", "of a site, for an operator's call", "none"]


def the_case(
    federation: Federation, authority: Authority, name: str
) -> tuple[Credentials, str, str]:
    if name in MADE:
        made, logged, own = MADE[name]
        return made.by(authority, authority), logged, own
    if name == "of another consortium":
        return Made(p384()).by(Authority.create("elsewhere"), authority), "foreign", "foreign"
    if name == "revoked":
        return own_credentials(federation, "gone"), "revoked", "refused"
    if name == "none":
        return Credentials(certificate_pem(authority.certificate), b"", b""), "no-certificate", ""
    return own_credentials(federation, SITE), "wrong-role", "wrong-role"


def log_since(federation: Federation, start: int) -> str:
    assert federation.running is not None
    return federation.running.output[start:]


@pytest.mark.parametrize("name", CASES)
def test_a_certificate_is_refused_with_its_reason_in_both_logs_and_none_on_the_wire(
    federation: Federation, authority: Authority, name: str
) -> None:
    credentials, logged, own = the_case(federation, authority, name)
    method = OPERATOR_SITES if "operator" in name else SITE_HELLO
    assert federation.running is not None
    start = len(federation.running.output)

    if own:
        with (
            Caller(federation.address, credentials) as caller,
            pytest.raises(ConsiliumError) as caught,
        ):
            caller.call(method, {})
        assert caught.value.code == f"identity.{own}"
        assert caught.value.message.startswith(OWN_WORDS[own])
        assert caught.value.hint
    said = on_the_wire(federation, credentials, method)
    assert said in (b"", ONE_SENTENCE)

    wait_for(
        lambda: f"identity.{logged}" in log_since(federation, start),
        f"identity.{logged} in the aggregator's log",
        timeout=10,
    )


#: All that is ever said to a caller whose certificate is refused after TLS.
ONE_SENTENCE = json.dumps(
    {
        "code": "identity.refused",
        "hint": "Ask the aggregator operator, whose log says why.",
        "message": "The aggregator refuses this certificate.",
        "where": "",
    },
    separators=(",", ":"),
).encode()


def on_the_wire(federation: Federation, credentials: Credentials, method: str) -> bytes:
    """Return what the aggregator says to this caller: nothing in TLS, or our one sentence."""
    for_grpc = grpc.ssl_channel_credentials(
        credentials.authority, credentials.key or None, credentials.certificate or None
    )
    with grpc.secure_channel(federation.address, for_grpc, options=CHANNEL_OPTIONS) as channel:
        try:
            channel.unary_unary(method)(b"{}", timeout=10)
        except grpc.RpcError as error:
            trailing = dict(error.trailing_metadata() or ())
            if ERROR_KEY not in trailing:
                assert error.code() is grpc.StatusCode.UNAVAILABLE
                assert after_the_handshake(federation, credentials) == b""
                return b""
            assert set(trailing) == {ERROR_KEY}
            assert error.code() is grpc.StatusCode.PERMISSION_DENIED
            assert error.details() == "identity.refused"
            return bytes(trailing[ERROR_KEY])
    raise AssertionError("the call was answered")


def after_the_handshake(federation: Federation, credentials: Credentials) -> bytes:
    """Return all that the aggregator sends once it has seen this certificate, as it is on the wire.

    In TLS 1.3 it judges a caller's certificate after its own part of the handshake is done: what
    follows could be an alert that names the reason, and each reason has an alert of its own.
    """
    context = ssl.create_default_context(cadata=credentials.authority.decode())
    context.set_alpn_protocols(["h2"])
    if credentials.certificate:
        folder = federation.folder
        (folder / "caller.pem").write_bytes(credentials.certificate + credentials.key)
        context.load_cert_chain(folder / "caller.pem")
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    stream = context.wrap_bio(incoming, outgoing, server_hostname=SERVER_NAME)
    with socket.create_connection(("127.0.0.1", federation.port), timeout=10) as raw:
        while True:
            try:
                stream.do_handshake()
                break
            except ssl.SSLWantReadError:
                raw.sendall(outgoing.read())
                incoming.write(raw.recv(65536))
        stream.write(PREFACE)
        came = b""
        with contextlib.suppress(ConnectionError):  # it may hang up before it has read it all
            raw.sendall(outgoing.read())
            while content := raw.recv(65536):
                came += content
    return came


def test_a_good_certificate_is_answered_on_the_same_port(federation: Federation) -> None:
    with Caller(federation.address, own_credentials(federation, SITE)) as caller:
        assert caller.call("/consilium.v1.Site/Studies", {}) is not None


@pytest.mark.parametrize("own", ["expired", "wrong-usage", "foreign"])
def test_a_site_says_itself_what_is_wrong_with_its_certificate(
    federation: Federation, authority: Authority, own: str
) -> None:
    site = federation.sites[SITE]
    path = site.home / "identity" / "site.pem"
    kept = path.read_bytes()
    key = load_tls_key(site.home / "identity" / "site-key.pem")
    issuer = Authority.create("elsewhere") if own == "foreign" else authority
    made = {
        "expired": Made(key, starts=-2 * DAYS, ends=-DAYS),
        "wrong-usage": Made(key, purpose=None),
        "foreign": Made(key),
    }[own]
    try:
        path.write_bytes(made.by(issuer, authority).certificate)
        error = site("studies").error
        assert error["code"] == f"identity.{own}"
        assert error["message"].startswith(OWN_WORDS[own])
        if own == "expired":
            # And in the log of the site that was to run, which ends.
            site.launch()
            assert site.running is not None
            wait_for(site.running.ended, "the site's end")
            assert f"identity.expired: {OWN_WORDS[own]}" in site.running.output
    finally:
        path.write_bytes(kept)
    assert site("studies").status == 0


def test_a_stranger_s_invitation_or_answer_teaches_nothing_either(federation: Federation) -> None:
    """A used invitation is refused with the same sentence; the operator's log says it was used."""
    invitation = federation.invite("late")
    for folder in ("late", "again"):
        answer = consilium("site", "join", invitation, "--home", federation.folder / folder)
        if folder == "late":
            assert answer.status == 0
    assert answer.code.startswith("identity.")
    assert "identity.invitation-used" in log_since(federation, 0)
