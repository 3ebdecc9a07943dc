"""Every method that the aggregator's port answers, and which roles may call it.

Anything that stands in neither table does not exist: the gateway has no handler for it.
"""

from __future__ import annotations

from typing import Final

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
SITE_HELLO: Final = "/consilium.v1.Site/Hello"
SITE_STUDIES: Final = "/consilium.v1.Site/Studies"
SITE_DECIDE: Final = "/consilium.v1.Site/Decide"
SITE_PROGRESS: Final = "/consilium.v1.Site/Progress"
SITE_WITNESS: Final = "/consilium.v1.Site/Witness"
OPERATOR_PROPOSE: Final = "/consilium.v1.Operator/Propose"
OPERATOR_STUDIES: Final = "/consilium.v1.Operator/Studies"
OPERATOR_SHOW: Final = "/consilium.v1.Operator/Show"
OPERATOR_RUN: Final = "/consilium.v1.Operator/Run"
OPERATOR_STOP: Final = "/consilium.v1.Operator/Stop"
OPERATOR_SITES: Final = "/consilium.v1.Operator/Sites"

#: Our own methods and the roles that may call each.
SERVICE_ROLES: Final[dict[str, frozenset[Role]]] = {
    ENROL: frozenset({Role.INVITATION}),
    SITE_HELLO: frozenset({Role.SITE}),
    SITE_STUDIES: frozenset({Role.SITE}),
    SITE_DECIDE: frozenset({Role.SITE}),
    SITE_PROGRESS: frozenset({Role.SITE}),
    SITE_WITNESS: frozenset({Role.SITE}),
    OPERATOR_PROPOSE: frozenset({Role.OPERATOR}),
    OPERATOR_STUDIES: frozenset({Role.OPERATOR}),
    OPERATOR_SHOW: frozenset({Role.OPERATOR}),
    OPERATOR_RUN: frozenset({Role.OPERATOR}),
    OPERATOR_STOP: frozenset({Role.OPERATOR}),
    OPERATOR_SITES: frozenset({Role.OPERATOR}),
}

#: Media type of Flower's calls over HTTPS.
PROTOBUF_MEDIA_TYPE: Final = "application/protobuf"
#: Headers of Flower's node authentication that travel as gRPC metadata, unchanged.
FLEET_HEADER_PREFIX: Final = "flwr-"
#: Trailing metadata of a Fleet call: the SuperLink's HTTP status, when it is not 200.
HTTP_STATUS_KEY: Final = "consilium-http-status"
#: Trailing metadata of our own calls: the error as JSON.
ERROR_KEY: Final = "consilium-error-bin"

#: Largest message either way: Flower's chunks are 5 MB; the rest is small.
MAX_MESSAGE_BYTES: Final = 8 * 1024 * 1024


def fleet_method(call: str) -> str:
    """Return the gRPC method path of a Fleet call."""
    return f"/{FLEET_SERVICE}/{call}"
