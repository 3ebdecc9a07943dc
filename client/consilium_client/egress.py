"""The gate: what may leave a site is decided here, by what was approved, stored and charged.

Flower names every object by the SHA-256 of its content. A reply's objects are registered when the
reply is made; the gate passes exactly those, after it has looked itself whether the study is
approved and, in a private study, whether the ledger has charged and released this very update.
"""

from __future__ import annotations

import hashlib
import json
import logging
from typing import Final

from consilium_client.flower_private import CRASHED_REASON, Push, reason_code
from consilium_client.home import SiteHome
from consilium_client.store import StudyStore, public_error
from consilium_common.errors import ConsiliumError
from consilium_common.ledger.store import Ledger

_log = logging.getLogger(__name__)

#: An error reply's one object: metadata, a code and fixed words.
_ERROR_OBJECT_BYTES: Final = 4096


class EgressGate:
    """Judges outgoing calls; keeps no state that a crash could lose.

    Parameters
    ----------
    home : SiteHome
        Its ledger and store are read afresh for every message.
    site : str
        Name of the site in the ledger.
    """

    def __init__(self, home: SiteHome, site: str) -> None:
        self._home = home
        self._site = site
        self._store = StudyStore(home)
        self._ledger: Ledger | None = None
        self._crash_objects: set[str] = set()

    def check_message(self, push: Push) -> None:
        """Raise ``privacy.egress`` unless every object of the message may leave."""
        if push.error_reason is not None:
            self._check_error(push)
            return
        for object_id in push.object_ids:
            permitted = self._store.outgoing(object_id)
            if permitted is None:
                raise self._refusal("an object that no approved study has stored")
            digest, round_index, kind = permitted
            approved = self._store.approved(digest)
            if kind == "train" and approved.study.privacy.mode == "patient":
                assert round_index is not None
                self._check_charged(digest, round_index)

    def check_object(self, object_id: str, content: bytes) -> None:
        """Raise ``privacy.egress`` unless the content is the object it is named, and permitted."""
        if hashlib.sha256(content).hexdigest() != object_id:
            raise self._refusal("an object whose content does not match its name")
        if object_id in self._crash_objects:
            if len(content) > _ERROR_OBJECT_BYTES or CRASHED_REASON.encode() not in content:
                raise self._refusal("an error reply with other content")
            self._crash_objects.discard(object_id)
            return
        if self._store.outgoing(object_id) is None:
            raise self._refusal("an object that no approved study has stored")

    def _check_error(self, push: Push) -> None:
        reason = push.error_reason or ""
        if len(push.object_ids) != 1:
            raise self._refusal("an error reply with content")
        if reason == CRASHED_REASON:
            self._crash_objects.add(push.object_ids[0])
            return
        code = reason_code(reason)
        if code is None or not _is_plain_error(reason, code):
            raise self._refusal("an error reply with words of its own")

    def _check_charged(self, digest: str, round_index: int) -> None:
        update = self._store.update(digest, round_index)
        if self._ledger is None:
            # Kept open: opening reads the whole chain, later looks read what was appended.
            try:
                self._ledger = Ledger.open(self._home.ledger, site=self._site)
            except ConsiliumError as error:
                _log.error("%s", error)
                raise self._refusal("an update while the ledger cannot be read") from error
        charge = self._ledger.find_charge(digest, round_index)
        if update is None or charge is None or charge.update != update.sha256:
            raise self._refusal("an update that the ledger has not charged")

    def _refusal(self, what: str) -> ConsiliumError:
        _log.error("refused to let out %s", what)
        return ConsiliumError("privacy.egress", f"Refused to let out {what}.")


def error_reason(error: ConsiliumError) -> str:
    """Return the words of an error reply: a code and nothing of the site's."""
    return json.dumps(public_error(error), sort_keys=True)


def _is_plain_error(reason: str, code: str) -> bool:
    try:
        return reason == error_reason(ConsiliumError(code, ""))
    except ValueError:
        return False
