"""What the aggregator may know of an error at a site: one of these codes and fixed words.

A code is a string that the process that trains could choose. So the codes are listed: any other
leaves as ``run.site-failed``.
"""

from __future__ import annotations

import json
from typing import Final

from consilium_client.store import public_error
from consilium_common.errors import ConsiliumError

#: What a code becomes that is not listed here.
UNLISTED: Final = "run.site-failed"

PUBLIC_CODES: Final = frozenset(
    f"{category}.{name}"
    for category, names in {
        "data": "cases channels class-missing codec dimensions format geometry label label-values "
        "manifest missing missing-slices mixed-geometry no-manifest no-patients not-finite purged "
        "size too-large truncated",
        "identity": "expired key-exposed no-key not-joined",
        "internal": "installation ledger-fork unexpected unknown",
        "privacy": "already-charged already-released budget charge-invalid charge-released "
        "charge-voided clipping cohort cohort-too-small delta-invalid delta-too-large egress "
        "engine epsilon-invalid event-invalid ledger-corrupt ledger-key ledger-read "
        "ledger-rolled-back ledger-site ledger-write mechanism-differs metrics-refused network "
        "no-ledger no-policy no-test-patients non-private-refused nothing-to-charge "
        "policy-invalid receipts-broken round-unknown second-release second-update "
        "threat-model-refused too-few-sites truth uncharged-update unknown-charge unreachable "
        "update-lost witness-conflict",
        "run": "bad-message bad-update cohort-size declared diverged foreign-bundle no-model "
        "not-expected out-of-memory round site-failed worker-busy worker-died worker-hung",
        "state": "bad-config busy device disk folder patient-key precision quota receipts store",
        "study": "automatic-bounds automatic-ended decided-anew invalid network not-approved "
        "outside-hours patches start trainable withdrawn withheld",
    }.items()
    for name in names.split()
)


def error_reason(error: ConsiliumError) -> str:
    """Return the words of an error reply: a listed code and nothing of the site's."""
    code = error.code if error.code in PUBLIC_CODES else UNLISTED
    return json.dumps(public_error(ConsiliumError(code, "")), sort_keys=True)


def listed_code(reason: str) -> str | None:
    """Return the code in words that are exactly those of :func:`error_reason`, else None."""
    try:
        code = json.loads(reason)["code"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if not isinstance(code, str) or code not in PUBLIC_CODES:
        return None
    return code if reason == error_reason(ConsiliumError(code, "")) else None
