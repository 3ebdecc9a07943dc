"""A key's fingerprint as six words, to be read over the telephone."""

from __future__ import annotations

from typing import Final

from cryptography import x509

from consilium_common.identity.certificates import describe_public_key
from consilium_common.identity.keys import PublicKey, public_fingerprint

#: Words of a fingerprint; 11 bits each, 66 together. Whoever wanted another key with the same
#: words would have to make 2^66 keys.
WORDS: Final = 6


def fingerprint_words(holder: x509.Certificate | PublicKey) -> str:
    """Return six words for the key of a certificate, or for a key.

    They are the first 66 bits of the SHA-256 of the public key (SubjectPublicKeyInfo, DER), 11
    bits a word, from the English list of BIP-39.
    """
    from mnemonic import Mnemonic

    key = describe_public_key(holder) if isinstance(holder, x509.Certificate) else holder
    bits = int(public_fingerprint(key), 16)
    words = Mnemonic("english").wordlist
    return " ".join(words[bits >> (256 - 11 * place) & 2047] for place in range(1, WORDS + 1))
