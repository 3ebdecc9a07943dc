"""What each node may ask after: the runs and objects of the messages that it was handed itself.

Flower's SuperLink tells any node of its federation about any run and object. Another site's
message names that site's cohort, so a site gets here what came to it, and nothing else.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from consilium_common.errors import ConsiliumError
from consilium_server.flower_private import asked_after, messages_in

#: Messages of a node that are remembered; a SuperNode works on one at a time.
_MOST: Final = 64
#: The calls that name a run, and some of them an object of it.
_NAMING: Final = frozenset({"GetRun", "GetFab", "PullObject", "ConfirmMessageReceived"})


class HandedOut:
    """Remembers for as long as the SuperLink does, which lives no longer than the gateway."""

    def __init__(self) -> None:
        #: Of each node, by message: its run and the ids of all that is in it.
        self._messages: dict[str, OrderedDict[str, tuple[int, frozenset[str]]]] = {}

    def note(self, node: str, content: bytes) -> None:
        """Take in the answer to a node's PullMessages."""
        known = self._messages.setdefault(node, OrderedDict())
        for message, run, objects in messages_in(content):
            known[message] = run, objects
            known.move_to_end(message)
        while len(known) > _MOST:
            known.popitem(last=False)

    def require(self, node: str, call: str, body: bytes) -> None:
        """Refuse a call about a run or an object that did not come to the node.

        Raises
        ------
        ConsiliumError
            ``run.not-expected``.
        """
        if call not in _NAMING:
            return
        run, named = asked_after(call, body)
        if not any(
            run == one and (named is None or named in objects)
            for one, objects in self._messages.get(node, {}).values()
        ):
            what = "run" if named is None else "object"
            raise ConsiliumError("run.not-expected", f"The site was handed no such {what}.")
