"""Refused handshakes stand in our log with their reason, and a flood of them fills nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

from consilium_server.handshakes import Refusal, RefusalLog, refusal_of

PREFIX = "Handshake failed with error SSL_ERROR_SSL: error:1000007d:SSL routines:OPENSSL_internal:"


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("CERTIFICATE_VERIFY_FAILED: certificate has expired", "identity.expired"),
        ("CERTIFICATE_VERIFY_FAILED: certificate is not yet valid", "identity.not-yet-valid"),
        ("CERTIFICATE_VERIFY_FAILED: unsupported certificate purpose", "identity.wrong-usage"),
        ("CERTIFICATE_VERIFY_FAILED: unable to get local issuer certificate", "identity.foreign"),
        ("CERTIFICATE_VERIFY_FAILED: a reason of a later release", "identity.foreign"),
        ("PEER_DID_NOT_RETURN_A_CERTIFICATE: whatever", "identity.no-certificate"),
        ("HTTP_REQUEST: whatever", "network.no-tls"),
        ("WRONG_VERSION_NUMBER", "network.no-tls"),
        ("NO_SHARED_CIPHER", "network.no-tls13"),
        ("KEY_USAGE_BIT_INCORRECT: whatever", "identity.wrong-usage"),
        ("A_REASON_OF_A_LATER_RELEASE", "network.handshake"),
    ],
)
def test_each_reason_has_its_own_code(words: str, code: str) -> None:
    refusal = refusal_of((PREFIX + words).encode())
    assert refusal is not None
    assert refusal.code == code


def test_other_lines_of_the_core_are_no_refusals() -> None:
    assert refusal_of(b"Log level INFO is not suitable for production.") is None


def test_a_flood_of_refusals_is_a_few_entries_and_a_sum() -> None:
    told: list[tuple[str, str]] = []
    now = [0.0]
    log = RefusalLog(lambda code, words: told.append((code, words)), clock=lambda: now[0])
    for _ in range(10_000):
        log.note(Refusal("identity.expired", "expired"))
    log.note(Refusal("identity.foreign", "foreign"))
    assert len(told) == 6
    now[0] = 61.0
    log.note(Refusal("identity.foreign", "foreign"))
    assert ("identity.expired", "expired (9995 more times)") in told
    assert len(told) == 8


def test_what_is_no_line_of_the_core_reaches_standard_error_unchanged_even_in_a_flood() -> None:
    """More than a pipe holds, refusals among it, and the log writes to the same pipe."""
    script = f"""
    import logging, os, sys
    logging.basicConfig(stream=sys.stderr, format="%(message)s")
    from consilium_server.handshakes import reworded
    core = (b"I1120 20:26:42.224129   28030 ssl_transport_security.cc:2563] "
            + {PREFIX!r}.encode() + b"HTTP_REQUEST: x\\n")
    with reworded():
        for number in range(3000):
            os.write(2, core)
            os.write(2, b"ours %d\\n" % number)
        os.write(2, b"E1120 20:26:42.224129   28030 x.cc:1] an error of the core\\n")
        os.write(2, b"no end of line")
    print("after", file=sys.stderr)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        stderr=subprocess.PIPE,
        timeout=60,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    text = done.stderr.decode()
    assert [f"ours {number}" in text for number in (0, 1500, 2999)] == [True] * 3
    assert text.count("ours ") == 3000
    assert "ssl_transport_security" not in text
    assert text.count("refused in the TLS handshake: network.no-tls:") == 6
    assert "(2995 more times)" in text
    assert "an error of the core" in text
    assert "no end of line" in text
    assert text.rstrip().endswith("after")
