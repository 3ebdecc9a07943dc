"""The gate: what may leave a site is decided here, by what was approved, stored and charged.

Flower names every object by the SHA-256 of its content. A reply's objects are registered when the
reply is made; the gate passes exactly those, after it has looked itself whether the study is
approved. In a private study it passes nothing but what the ledger has charged and released, byte
for byte: a round's update, the noised figures of an evaluation, or the noised statistics. An
evaluation without figures passes too: it says nothing.
"""

from __future__ import annotations

import hashlib
import json
import logging
from typing import Final

from consilium_client.flower_private import CRASHED_REASON, Push, object_ids, reason_code
from consilium_client.home import SiteHome
from consilium_client.store import StudyStore, public_error
from consilium_common.errors import ConsiliumError
from consilium_common.ledger.entries import Purpose
from consilium_common.ledger.store import Ledger
from consilium_common.wire.messages import to_server

_log = logging.getLogger(__name__)

#: What a message of Flower's kind asks for.
_PURPOSES: Final[dict[str, Purpose]] = {
    "train": "training",
    "evaluate": "evaluation",
    "query": "statistics",
}
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
        permitted = [self._store.outgoing(object_id) for object_id in push.object_ids]
        if not permitted or None in permitted:
            raise self._refusal("an object that no approved study has stored")
        # As a rule all are of one reply; the record of no figures is the same in every reply.
        for digest, round_index, kind in {row for row in permitted if row is not None}:
            study = self._store.approved(digest).study
            if study.privacy.mode == "patient":
                assert round_index is not None  # errors have none, and belong to no study
                self._check_released(push, digest, round_index, kind)

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

    def _check_released(self, push: Push, digest: str, round_index: int, kind: str) -> None:
        """Refuse a private study's reply that holds other than what the ledger has released.

        Objects are named by their content: the names that a reply may have are computed here anew,
        from what is stored under the hash that the ledger names.
        """
        content = set(push.object_ids[1:])  # the first is the message: metadata without content
        if kind == "evaluate" and content == set(object_ids(to_server(None, None))):
            return
        purpose = _PURPOSES.get(kind)
        if purpose is None:
            raise self._refusal("a reply of a kind that no study has")
        update = self._store.update(digest, round_index, purpose)
        charge = self._open_ledger().find_charge(digest, round_index, purpose)
        if update is None or charge is None or charge.update != update.sha256:
            raise self._refusal(f"the result of a private {purpose} that was never released")
        if purpose == "training":
            released = to_server(update.blob, None)
        else:
            released = to_server(None, json.loads(update.blob))
        if content != set(object_ids(released)):
            raise self._refusal("other content than the ledger has released")

    def _open_ledger(self) -> Ledger:
        if self._ledger is None:
            # Kept open: opening reads the whole chain, later looks read what was appended.
            try:
                self._ledger = Ledger.open(self._home.ledger, site=self._site)
            except ConsiliumError as error:
                _log.error("%s", error)
                raise self._refusal("an update while the ledger cannot be read") from error
        return self._ledger

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
