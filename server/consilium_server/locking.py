"""The authority's key is put under a passphrase later, or under another one."""

from __future__ import annotations

from consilium_common.errors import ConsiliumError
from consilium_common.identity.keys import save_private
from consilium_server.changing import changing_keys
from consilium_server.rotation import Custody, write_enrolment


def lock_authority(custody: Custody, passphrase: bytes) -> None:
    """Put the authority's key under ``passphrase``, whether it was open or under another one.

    The aggregator gets its enrolment key first, so that it can go on inviting; then one file is
    replaced.

    Raises
    ------
    ConsiliumError
        ``identity.rotation-open`` while the key of the authority before lies here too;
        ``state.running``, ``state.disk``; what
        :meth:`~consilium_server.rotation.Custody.authority` raises for the passphrase that opens
        the key now.
    """
    home = custody.home
    with changing_keys(home):
        authority = custody.authority()
        if custody.offline is None and (home.identity / "authority-old-key.pem").exists():
            raise ConsiliumError(
                "identity.rotation-open",
                "A rotation of the authority is under way, and its old key lies here as well.",
                where=str(home.identity),
                hint="Finish it first: `consilium server rotate authority --finish`.",
            )
        write_enrolment(home.identity, authority)
        save_private(custody.folder / "authority-key.pem", authority.key, passphrase)
