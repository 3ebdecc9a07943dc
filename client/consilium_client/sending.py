"""Replies on their way: which objects of each the aggregator asked for, and what is still missing.

An object is named by the SHA-256 of its content, so content that has the name of a permitted object
is that object. The message itself is sent as the gate made it; the SuperNode, who knows it by the
name of its own, is told that name.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Final

from consilium_client.egress import EgressGate, Passed
from consilium_client.flower_private_fleet import (
    accepted,
    push_object,
    read_request,
    refusal,
    renamed,
)

#: Sessions remembered; one reply is sent at a time.
_MOST: Final = 16


@dataclass(eq=False)
class Sending:
    """One reply under way."""

    passed: Passed = field(repr=False)
    node_id: int
    run_id: int
    session: str
    theirs: str  #: the message's id at the SuperNode
    wanted: frozenset[str]
    missing: set[str]
    #: Objects whose sending failed once. They may have come all the same, and then the aggregator
    #: takes them no second time: the SuperNode would give up the whole reply for that.
    tried: set[str] = field(default_factory=set)

    def name(self, object_id: str) -> str:
        """Return our name of an object that the SuperNode names."""
        return self.passed.reply.message_id if object_id == self.theirs else object_id


class Sendings:
    """The replies under way.

    Parameters
    ----------
    gate : EgressGate
        Says whether the site still takes part, and is told what was sent whole.
    """

    def __init__(self, gate: EgressGate) -> None:
        self._gate = gate
        self._by_session: OrderedDict[str, Sending] = OrderedDict()

    def begin(
        self, node_id: int, run_id: int, theirs: str, passed: Passed, response: bytes
    ) -> bytes:
        """Note which objects the aggregator asks for; return its response for the SuperNode."""
        session, asked_for = accepted(response)
        reply = passed.reply
        wanted = asked_for & {reply.message_id, *reply.content_ids()}
        sending = Sending(passed, node_id, run_id, session, theirs, wanted, set(wanted))
        self._by_session[session] = sending
        while len(self._by_session) > _MOST:
            self._by_session.popitem(last=False)
        self._finish(sending)
        return renamed(response, reply.message_id, theirs)

    def object(self, body: bytes) -> tuple[Sending, str, bytes]:
        """Return what an object belongs to, its name at the SuperNode, and the body that sends it.

        Parameters
        ----------
        body : bytes
            The SuperNode's PushObject request.

        Raises
        ------
        ConsiliumError
            ``privacy.egress`` unless the object is of a reply under way and the content is the
            object it is named; those of :meth:`EgressGate.require_standing`.
        """
        request = read_request("PushObject", body)
        theirs = str(request.object_id)
        sending = self._by_session.get(str(request.session_id))
        if (
            sending is None
            or request.run_id != sending.run_id
            or request.node.node_id != sending.node_id
        ):
            raise refusal("an object of no reply under way")
        self._gate.require_standing(sending.passed)
        name = sending.name(theirs)
        if name not in sending.wanted:
            raise refusal("an object that no approved study has stored")
        if name == sending.passed.reply.message_id:
            return sending, theirs, self._message(sending)
        if hashlib.sha256(request.object_content).hexdigest() != name:
            raise refusal("an object whose content does not match its name")
        # Every field of it is what we would write: written anew, it would be these same bytes.
        return sending, theirs, body

    def whole_error(self, passed: Passed) -> bytes | None:
        """Return the body of the call that sends an error reply's one object; None: it is there."""
        for sending in self._by_session.values():
            if sending.passed is passed and sending.missing:
                return self._message(sending)
        return None

    def stored(self, sending: Sending, object_id: str) -> None:
        """Note that the aggregator has an object, as the SuperNode names it."""
        sending.missing.discard(sending.name(object_id))
        self._finish(sending)

    @staticmethod
    def _message(sending: Sending) -> bytes:
        reply = sending.passed.reply
        return push_object(
            sending.node_id, sending.run_id, sending.session, reply.message_id, reply.message
        )

    def _finish(self, sending: Sending) -> None:
        if not sending.missing and sending.passed.receipt is not None:
            self._gate.sent(sending.passed.receipt)
