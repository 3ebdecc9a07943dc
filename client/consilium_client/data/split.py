"""Patients by keyed hash: the only name they have outside cases.csv, and the split it fixes."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import tempfile
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESSIV

from consilium_client.data.schema import Case, SplitFractions
from consilium_client.home import SiteHome
from consilium_common.errors import ConsiliumError
from consilium_common.files import sync_folder, write_atomic

Split = Literal["train", "validation", "test"]
SPLITS: Final[tuple[Split, ...]] = ("train", "validation", "test")

KEY_BYTES: Final = 32
_NAME_BYTES: Final = 16
_PSEUDONYM_LENGTH: Final = 64

# Each use of the key has its own prefix, so that no hash of one use tells about another.
_NAME: Final = b"consilium/patient/v1\0"
_SPLIT: Final = b"consilium/split/v1\0"
_CHECK: Final = b"consilium/patient-key-check/v1\0"
_PSEUDONYM: Final = b"consilium/pseudonym/v1\0"


@dataclass(frozen=True)
class PatientKey:
    """The site's secret that names patients and fixes their split.

    Parameters
    ----------
    secret : bytes
        32 random bytes. They never leave the site: who holds them can test guesses of identifiers.
    """

    secret: bytes = field(repr=False)

    def name(self, patient_id: str) -> str:
        """Return the patient's keyed hash, 32 hexadecimal digits (HMAC-SHA256, first half).

        A pseudonym that this key has given means the patient it was given to: a de-identified copy
        of the cohort is the same patients, with the same budget and the same split.
        """
        given = self._given(patient_id)
        return (given or self._mac(_NAME, patient_id))[:_NAME_BYTES].hex()

    def pseudonym(self, patient_id: str) -> str:
        """Return what stands for the patient's number in a de-identified copy.

        64 characters, as many as a DICOM LO has room for: the patient's name and place on the line
        of splits, encrypted under this key (AES-SIV, RFC 5297), so that the copy cannot be laid
        beside the ledger by anybody without it. The same patient always gets the same one.
        """
        if self._given(patient_id) is not None:
            return patient_id.strip()
        body = self._mac(_NAME, patient_id)[:_NAME_BYTES] + self._mac(_SPLIT, patient_id)[:8]
        return base64.b32encode(self._cipher().encrypt(body, None)).decode().lower()

    def split(self, patient_id: str, fractions: SplitFractions) -> Split:
        """Return the patient's split; it depends on this patient and the fractions alone."""
        # 64 bits as a number in [0, 1): the same patient always falls on the same point of the
        # line, whoever else is in the cohort.
        given = self._given(patient_id)
        place = given[_NAME_BYTES:] if given else self._mac(_SPLIT, patient_id)[:8]
        point = int.from_bytes(place, "big") / 2**64
        if point < fractions.test:
            return "test"
        if point < fractions.test + fractions.validation:
            return "validation"
        return "train"

    @property
    def fingerprint(self) -> str:
        """Value that tells two keys apart without revealing either, 64 hexadecimal digits."""
        return hmac.new(self.secret, _CHECK, hashlib.sha256).hexdigest()

    def _given(self, patient_id: str) -> bytes | None:
        """Return what is inside a pseudonym of this key; None for every other identifier."""
        text = patient_id.strip()
        if len(text) != _PSEUDONYM_LENGTH:
            return None
        try:
            return self._cipher().decrypt(base64.b32decode(text, casefold=True), None)
        except (binascii.Error, ValueError, InvalidTag):
            return None

    def _cipher(self) -> AESSIV:
        return AESSIV(hmac.new(self.secret, _PSEUDONYM, hashlib.sha256).digest())

    def _mac(self, use: bytes, patient_id: str) -> bytes:
        # Spaces around (DICOM pads to even length) and the Unicode form are not identity.
        plain = unicodedata.normalize("NFC", patient_id.strip())
        return hmac.new(self.secret, use + plain.encode(), hashlib.sha256).digest()


def open_patient_key(home: SiteHome) -> PatientKey:
    """Read the site's patient key; make it where the site has never had one.

    A lost key is never replaced in silence: with a new one every patient would have a new name,
    and the budget that the ledger has charged to the old name would be forgotten.

    Raises
    ------
    ConsiliumError
        ``state.patient-key`` when the key is missing, foreign, damaged or open to others.
    """
    path = home.identity / "patient_key"
    check = home.data / "patient_key.check"
    if not path.exists():
        if check.exists():
            raise ConsiliumError(
                "state.patient-key",
                "The key that names this site's patients is gone.",
                where=str(path),
                hint="Restore it from your backup: with a new key the ledger's charges would no "
                "longer belong to the patients they were made for.",
            )
        _create(path)
    try:
        mode = path.stat().st_mode & 0o777
        secret = path.read_bytes()
    except OSError as error:
        raise ConsiliumError(
            "state.patient-key",
            f"The key that names this site's patients cannot be read: {error.strerror or error}.",
            where=str(path),
        ) from error
    if mode & 0o077:
        raise ConsiliumError(
            "state.patient-key",
            f"The key that names this site's patients is open to others (mode {mode:04o}).",
            where=str(path),
            hint=f"Close it: chmod 600 '{path}'.",
        )
    key = PatientKey(secret)
    if len(secret) != KEY_BYTES:
        raise ConsiliumError(
            "state.patient-key",
            f"The key that names this site's patients has {len(secret)} bytes, not {KEY_BYTES}.",
            where=str(path),
            hint="Restore it from your backup.",
        )
    if not check.exists():
        write_atomic(check, (key.fingerprint + "\n").encode())
    elif not hmac.compare_digest(check.read_text().strip(), key.fingerprint):
        raise ConsiliumError(
            "state.patient-key",
            "The key that names this site's patients is not the one its data was imported with.",
            where=str(path),
            hint="Restore the right key from your backup.",
        )
    return key


def _create(path: Path) -> None:
    """Write a new key; of several processes that try at once, one wins and all use its key."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".patient_key.")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            os.fchmod(stream.fileno(), 0o600)
            stream.write(os.urandom(KEY_BYTES))
            stream.flush()
            os.fsync(stream.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            return
        sync_folder(path.parent)
    finally:
        Path(temporary).unlink(missing_ok=True)


def assign_splits(
    cases: Iterable[Case], key: PatientKey, fractions: SplitFractions
) -> Mapping[str, Split]:
    """Return the split of every patient, by keyed name.

    A ``split`` written in cases.csv for any case of a patient holds for the whole patient.

    Raises
    ------
    ConsiliumError
        ``data.two-splits`` when cases of one patient are written into different splits.
    """
    written: dict[str, dict[Split, str]] = {}
    splits: dict[str, Split] = {}
    for case in cases:
        name = key.name(case.patient_id)
        splits.setdefault(name, key.split(case.patient_id, fractions))
        if case.split is not None:
            written.setdefault(name, {}).setdefault(case.split, case.case_id)
    for name, choices in written.items():
        if len(choices) > 1:
            raise ConsiliumError(
                "data.two-splits",
                f"Cases of one patient are written into {' and '.join(sorted(choices))}.",
                where="cases.csv, cases " + " and ".join(sorted(choices.values())),
                hint="Give all cases of a patient the same split, or leave the column empty.",
            )
        splits[name] = next(iter(choices))
    return splits
