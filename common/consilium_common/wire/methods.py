"""Every method that the aggregator's port answers, and which roles may call it.

Anything that stands in neither table does not exist: the gateway has no handler for it.
"""

from __future__ import annotations

import re
from typing import Final

from consilium_common import __version__
from consilium_common.errors import ConsiliumError
from consilium_common.identity.certificates import Role

#: Flower's Fleet calls, and the path under which SuperNode and SuperLink speak each over HTTPS.
#: The two that register nodes are answered by Flower with a refusal while node authentication is
#: on; they are here because the protocol knows them.
FLEET_PATHS: Final[dict[str, str]] = {
    "RegisterNode": "register-node",
    "ActivateNode": "activate-node",
    "DeactivateNode": "deactivate-node",
    "UnregisterNode": "unregister-node",
    "SendNodeHeartbeat": "send-node-heartbeat",
    "PullMessages": "pull-messages",
    "PushMessages": "push-messages",
    "GetRun": "get-run",
    "GetFab": "get-fab",
    "PushObject": "push-object",
    "PullObject": "pull-object",
    "ConfirmMessageReceived": "confirm-message-received",
}
FLEET_SERVICE: Final = "flwr.proto.Fleet"
FLEET_CALL_BY_PATH: Final[dict[str, str]] = {path: call for call, path in FLEET_PATHS.items()}

ENROL: Final = "/consilium.v1.Enrolment/Enrol"
MEMBER_RENEW: Final = "/consilium.v1.Member/Renew"
MEMBER_TRUST: Final = "/consilium.v1.Member/Trust"
MEMBER_PROBE: Final = "/consilium.v1.Member/Probe"
SITE_HELLO: Final = "/consilium.v1.Site/Hello"
SITE_STUDIES: Final = "/consilium.v1.Site/Studies"
SITE_DECIDE: Final = "/consilium.v1.Site/Decide"
SITE_PROGRESS: Final = "/consilium.v1.Site/Progress"
SITE_WITNESS: Final = "/consilium.v1.Site/Witness"
SITE_FETCH: Final = "/consilium.v1.Site/Fetch"
SITE_DELIVER: Final = "/consilium.v1.Site/Deliver"
OPERATOR_PROPOSE: Final = "/consilium.v1.Operator/Propose"
OPERATOR_SIGN: Final = "/consilium.v1.Operator/Sign"
OPERATOR_STUDIES: Final = "/consilium.v1.Operator/Studies"
OPERATOR_SHOW: Final = "/consilium.v1.Operator/Show"
OPERATOR_RUN: Final = "/consilium.v1.Operator/Run"
OPERATOR_PAUSE: Final = "/consilium.v1.Operator/Pause"
OPERATOR_RESUME: Final = "/consilium.v1.Operator/Resume"
OPERATOR_STOP: Final = "/consilium.v1.Operator/Stop"
OPERATOR_LOG: Final = "/consilium.v1.Operator/Log"
OPERATOR_SITES: Final = "/consilium.v1.Operator/Sites"
OPERATOR_INVITE: Final = "/consilium.v1.Operator/Invite"
OPERATOR_REVOKE: Final = "/consilium.v1.Operator/Revoke"
AUDIT_RECORDS: Final = "/consilium.v1.Audit/Records"
AUDIT_LOG: Final = "/consilium.v1.Audit/Log"

_SITE: Final = frozenset({Role.SITE})
_OPERATOR: Final = frozenset({Role.OPERATOR})
#: An auditor reads what an operator reads, and changes nothing.
_READER: Final = frozenset({Role.OPERATOR, Role.AUDITOR})
#: Roles that people and sites hold for long; an invitation is none of them.
MEMBER_ROLES: Final = frozenset({Role.SITE, Role.OPERATOR, Role.AUDITOR})

#: Our own methods and the roles that may call each.
SERVICE_ROLES: Final[dict[str, frozenset[Role]]] = {
    ENROL: frozenset({Role.INVITATION}),
    MEMBER_RENEW: MEMBER_ROLES,
    MEMBER_TRUST: MEMBER_ROLES,
    MEMBER_PROBE: MEMBER_ROLES,
    SITE_HELLO: _SITE,
    SITE_STUDIES: _SITE,
    SITE_DECIDE: _SITE,
    SITE_PROGRESS: _SITE,
    SITE_WITNESS: _SITE,
    OPERATOR_PROPOSE: _OPERATOR,
    OPERATOR_SIGN: _OPERATOR,
    OPERATOR_STUDIES: _READER,
    OPERATOR_SHOW: _READER,
    OPERATOR_RUN: _OPERATOR,
    OPERATOR_PAUSE: _OPERATOR,
    OPERATOR_RESUME: _OPERATOR,
    OPERATOR_STOP: _OPERATOR,
    OPERATOR_LOG: _READER,
    OPERATOR_SITES: _READER,
    OPERATOR_INVITE: _OPERATOR,
    OPERATOR_REVOKE: _OPERATOR,
    AUDIT_RECORDS: _READER,
    AUDIT_LOG: _READER,
}

#: The two that are streams: a model to a site, an update from it.
STREAM_ROLES: Final[dict[str, frozenset[Role]]] = {SITE_FETCH: _SITE, SITE_DELIVER: _SITE}

#: Methods that change something for others, or hand out evidence: each call, done or refused,
#: stands in the aggregator's audit log.
PRIVILEGED: Final = frozenset(
    {
        ENROL,
        MEMBER_RENEW,
        SITE_DECIDE,
        OPERATOR_PROPOSE,
        OPERATOR_SIGN,
        OPERATOR_RUN,
        OPERATOR_PAUSE,
        OPERATOR_RESUME,
        OPERATOR_STOP,
        OPERATOR_INVITE,
        OPERATOR_REVOKE,
        AUDIT_RECORDS,
        AUDIT_LOG,
    }
)

#: Roles that may make Flower's Fleet calls.
FLEET_ROLES: Final = _SITE

#: Version of what our own methods say; it changes when one side could misread the other.
PROTOCOL: Final = 1

#: Media type of Flower's calls over HTTPS.
PROTOBUF_MEDIA_TYPE: Final = "application/protobuf"
#: Headers of Flower's node authentication that travel as gRPC metadata, unchanged.
FLEET_HEADER_PREFIX: Final = "flwr-"
#: Trailing metadata of a Fleet call: the SuperLink's HTTP status, when it is not 200.
HTTP_STATUS_KEY: Final = "consilium-http-status"
#: With messages that were pulled comes a receipt; the next pull shows it, behind the session that
#: it was given in. A pull that does not is answered with the same messages again: they were lost on
#: the way, and Flower hands out a message once.
PULLED_KEY: Final = "consilium-pulled"
#: Trailing metadata of our own calls: the error as JSON.
ERROR_KEY: Final = "consilium-error-bin"

#: Largest message either way: a piece of public starting weights, a page of records.
MAX_MESSAGE_BYTES: Final = 8 * 1024 * 1024
#: Bytes of one message of a stream. Of two hundred slow lines the aggregator holds a few each:
#: four times as large, it needed twice the memory, and was a third faster.
CHUNK_BYTES: Final = 256 * 1024


def fleet_method(call: str) -> str:
    """Return the gRPC method path of a Fleet call."""
    return f"/{FLEET_SERVICE}/{call}"


def check_protocol(
    theirs: object, *, release: object = "", who: str = "the other side", here: str = "this side"
) -> None:
    """Refuse another version of the protocol, naming both releases and who must update.

    Parameters
    ----------
    theirs
        ``protocol`` as the other side said it; a release before the first version says nothing.
    release
        The other side's release, for people.
    who : str
        The other side in words: ``"the aggregator"``, ``"site north"``.
    here : str
        This side, where the words travel to the other.

    Raises
    ------
    ConsiliumError
        ``network.version``.
    """
    if type(theirs) is int and theirs == PROTOCOL:
        return
    # A release is said by the other side: only what looks like one is repeated.
    known = isinstance(release, str) and re.fullmatch(r"[0-9A-Za-z.+-]{1,40}", release)
    version = theirs if type(theirs) is int else 0
    older, newer = (who, here) if version < PROTOCOL else (here, who)
    raise ConsiliumError(
        "network.version",
        f"{who[0].upper()}{who[1:]} runs release {release if known else 'unknown'}"
        f" (protocol {version}); {here} runs {__version__} (protocol {PROTOCOL}).",
        hint=f"They do not fit. Update {older} to the release of {newer}.",
    )
