"""Who joins, who is refused, and what revocation does to a site that is connected."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
from federation import Federation, Site, consilium, small_study, wait_for

from consilium_client.data.doctor.fixes import open_to_others
from consilium_client.home import SiteHome
from consilium_common.demo.hospitals import NAMES


def try_to_join(federation: Federation, invitation: Path, home: Path) -> tuple[str, int]:
    answer = consilium("site", "join", invitation, "--home", home)
    # A failed attempt leaves no half identity behind: the next one starts afresh.
    assert not (home / "site.json").exists()
    assert list((home / "identity").glob("*")) == []
    return answer.code, answer.status


def test_an_invitation_works_once(federation: Federation, tmp_path: Path) -> None:
    invitation = federation.invite("once")
    consilium("site", "join", invitation, "--home", tmp_path / "first").data  # noqa: B018
    # What the aggregator's log says in detail, the wire does not.
    assert try_to_join(federation, invitation, tmp_path / "second") == ("identity.refused", 5)


def test_an_expired_invitation_is_refused_by_both_sides(
    federation: Federation, tmp_path: Path
) -> None:
    invitation = federation.invite("late", "--hours", "0")
    assert try_to_join(federation, invitation, tmp_path / "site") == (
        "identity.invitation-expired",
        5,
    )
    # A site whose clock is wrong, or who edits the date, is refused by the aggregator.
    content = json.loads(invitation.read_text())
    content["expires"] = "2099-01-01T00:00:00+00:00"
    edited = tmp_path / "edited.invitation"
    edited.write_text(json.dumps(content))
    assert try_to_join(federation, edited, tmp_path / "site")[0].startswith("identity.")


def test_an_invitation_of_another_consortium_ends_before_anything_is_sent(
    federation: Federation, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    for command in (
        ("init", "--address", federation.address),
        ("invite", "stray", "--out", tmp_path / "stray.invitation"),
    ):
        consilium("server", *command, "--home", elsewhere).data  # noqa: B018
    assert try_to_join(federation, tmp_path / "stray.invitation", tmp_path / "site") == (
        "identity.wrong-aggregator",
        5,
    )


@pytest.mark.parametrize(
    ("content", "code"),
    [(None, "identity.no-invitation"), (b"", "identity.bad-invitation")],
    ids=["missing", "empty"],
)
def test_a_file_that_is_no_invitation_is_named(
    federation: Federation, tmp_path: Path, content: bytes | None, code: str
) -> None:
    path = tmp_path / "letter"
    if content is not None:
        path.write_bytes(content)
    answer = consilium("site", "join", path, "--home", tmp_path / "site")
    assert answer.code == code
    assert answer.error["where"] == str(path)


def test_private_keys_are_readable_by_their_owner_alone(federation: Federation) -> None:
    folders = [federation.home, *(site.home for site in federation.sites.values())]
    keys = [path for folder in folders for path in (folder / "identity").glob("*key*")]
    assert len(keys) >= 3 + 3 * 3
    for path in (*folders, *keys):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
    for site in federation.sites.values():
        assert open_to_others(SiteHome(site.home)) == ()  # what the doctor holds a site to


def test_a_revoked_site_is_refused_while_it_is_connected_and_left_out_of_its_study(
    federation: Federation,
) -> None:
    guest = federation.join("guest")
    guest("data", "import", federation.folder / "images" / NAMES[1]).data  # noqa: B018
    guest.start()
    assert guest.running is not None
    digest = federation.propose(
        small_study("revoked", training={"steps_per_round": 20}, federation={"rounds": 60})
    )
    federation.approve(digest, *NAMES[:2], "guest")
    federation.study("run", digest).data  # noqa: B018
    federation.wait_until(digest, lambda data: took_part(data, "guest"), "a round with the guest")

    revoked = federation.server("revoke", "guest").data
    assert len(revoked.pop("fingerprint")) == 64
    assert revoked == {"name": "guest", "role": "site", "status": "revoked"}
    assert guest("studies").code == "identity.refused"
    at = len(federation.show(digest)["rounds"])
    found = federation.wait_until(
        digest,
        lambda data: len(data["rounds"]) >= at + 2,
        "two more rounds without the guest",
    )
    assert found["rounds"][-1]["sites"] == sorted(NAMES[:2])
    federation.study("stop", digest).data  # noqa: B018
    wait_for(lambda: "revoked or replaced" in guest.running.output, "the site to say so")
    (row,) = [s for s in federation.server("sites").data["sites"] if s["name"] == "guest"]
    assert (row["status"], row["online"]) == ("revoked", False)

    # Ctrl-C ends a site that is refused, too.
    guest.stop()
    rejoins_with_a_new_invitation(federation, guest)


def took_part(data: dict[str, object], site: str) -> bool:
    rounds = data["rounds"]
    assert isinstance(rounds, list)
    return any(site in row["sites"] for row in rounds)


def rejoins_with_a_new_invitation(federation: Federation, site: Site) -> None:
    old = site.home.rename(site.home.with_name("site-guest-before"))
    again = federation.join(site.name)
    assert again("studies").status == 0
    # The identity from before stays refused.
    assert consilium("site", "studies", "--home", old).code == "identity.refused"
