"""The Fleet calls that carry no reply: each made anew from values that the aggregator knows.

A protocol call has no free content. It names this site's node and key, runs, messages and objects
that the aggregator itself named before, and Flower's fixed interval; anything else is refused.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from typing import Any, Final

from consilium_client.flower_private_fleet import (
    Asked,
    activated_node,
    asked_in,
    bundle_named,
    heartbeat_seconds,
    make_request,
    pulled_object,
    refusal,
    require_own_bundle,
)

_log = logging.getLogger(__name__)

#: Messages and runs remembered; a SuperNode works on one at a time.
_MOST: Final = 64


class FleetCalls:
    """What the link knows of the conversation between SuperNode and SuperLink.

    Parameters
    ----------
    public_key : bytes
        The node's key as Flower writes it.
    """

    def __init__(self, public_key: bytes) -> None:
        self._key = public_key
        self.node_id: int | None = None
        self._asked: OrderedDict[str, Asked] = OrderedDict()
        #: Records of settings that were pulled, by id: a SuperNode pulls equal objects once.
        self._settings: OrderedDict[str, bytes] = OrderedDict()
        #: Hash of the bundle of each run, as the aggregator named it; empty before.
        self._runs: OrderedDict[int, str] = OrderedDict()

    def own_node(self) -> int:
        """Return this site's node, or raise ``privacy.egress`` before it is activated."""
        if self.node_id is None:
            raise refusal("a call of a node that is not activated")
        return self.node_id

    def asked(self, message_id: str) -> Asked:
        """Return a message that the aggregator sent, or raise ``privacy.egress``."""
        found = self._asked.get(message_id)
        if found is None:
            raise refusal("a reply to a message that nobody sent")
        return found

    def of_run(self, run_id: int) -> list[Asked]:
        """Return the messages of a run that were not answered."""
        return [one for one in self._asked.values() if one.run_id == run_id and not one.replied]

    def made_anew(self, call: str, request: Any) -> bytes:
        """Return the one body that a protocol call may have, or raise ``privacy.egress``.

        Parameters
        ----------
        request
            The parsed request of any call but PushMessages and PushObject.
        """
        made = make_request(call, **self._values(call, request))
        if made != request:
            raise refusal(f"a {call} with content of its own")
        body: bytes = made.SerializeToString(deterministic=True)
        return body

    def answered(self, call: str, request: Any, content: bytes) -> Asked | None:
        """Learn from an answer; return the message whose instructions are known with it, if any.

        Raises
        ------
        ConsiliumError
            ``run.foreign-bundle``, ``network.bad-answer``: it must not reach the SuperNode.
        """
        if call == "ActivateNode":
            self.node_id = activated_node(content)
        elif call == "GetRun":
            self._remember(self._runs, int(request.run_id), bundle_named(content))
        elif call == "GetFab":
            require_own_bundle(content)
        elif call == "PullMessages":
            return self._take(content)
        elif call == "PullObject":
            return self._see(str(request.object_id), pulled_object(content))
        return None

    def _values(self, call: str, request: Any) -> dict[str, Any]:
        if call == "RegisterNode":
            return {"public_key": self._key}
        if call == "ActivateNode":
            return {"public_key": self._key, "heartbeat_interval": heartbeat_seconds()}
        if call in ("DeactivateNode", "UnregisterNode"):
            return {"node_id": self.own_node()}
        node = {"node": {"node_id": self.own_node()}}
        if call == "SendNodeHeartbeat":
            return {**node, "heartbeat_interval": heartbeat_seconds()}
        if call == "PullMessages":
            return node
        run_id = int(request.run_id)
        if run_id not in self._runs:
            raise refusal(f"a {call} for a run that nobody named")
        node["run_id"] = run_id  # type: ignore[assignment]
        if call == "GetRun":
            return node
        if call == "GetFab":
            return {**node, "hash_str": self._runs[run_id]}
        field = "object_id" if call == "PullObject" else "message_object_id"
        named = getattr(request, field, "")
        if not any(one.run_id == run_id and named in one.objects for one in self._asked.values()):
            raise refusal(f"a {call} for an object that nobody named")
        return {**node, field: named}

    def _take(self, content: bytes) -> Asked | None:
        asked = asked_in(content)
        if asked is None or asked.message_id in self._asked:
            return None
        self._remember(self._asked, asked.message_id, asked)
        if asked.run_id not in self._runs:
            self._remember(self._runs, asked.run_id, "")
        for object_id in asked.objects & self._settings.keys():
            asked.see_object(object_id, self._settings[object_id])
        return None if asked.config is None else asked

    def _see(self, object_id: str, content: bytes) -> Asked | None:
        last = None
        for asked in self._asked.values():
            if asked.see_object(object_id, content):
                self._remember(self._settings, object_id, content)
                last = asked
        return last

    @staticmethod
    def _remember(known: OrderedDict[Any, Any], key: Any, value: Any) -> None:
        known[key] = value
        known.move_to_end(key)
        while len(known) > _MOST:
            known.popitem(last=False)
