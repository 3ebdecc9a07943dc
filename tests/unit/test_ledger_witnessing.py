"""The site's ledger and the aggregator's witness, each its real code, over calls that may fail."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from ledger_samples import charge
from site_samples import JoinedSite, joined_site

from consilium_client import witnessing
from consilium_client.identity import SiteIdentity
from consilium_client.witnessing import Witnessing
from consilium_common.canonical import canonical_json
from consilium_common.errors import ConsiliumError
from consilium_common.identity.authority import Authority, certificate_pem
from consilium_common.identity.certificates import Role
from consilium_common.identity.keys import new_signing_key, new_tls_key
from consilium_common.ledger.conflict import conflict_file
from consilium_common.ledger.store import Ledger
from consilium_common.ledger.verify import verify_file
from consilium_common.ledger.witness import WitnessRecord
from consilium_common.wire.methods import SITE_WITNESS
from consilium_server.registry import Registry
from consilium_server.witness import Witness, WitnessKey


class Aggregator:
    """The aggregator's witness behind a caller: JSON both ways, gone when told so."""

    def __init__(self, folder: Path, site: JoinedSite) -> None:
        folder.mkdir(exist_ok=True)
        self.site = site
        self.key = WitnessKey.ensure(folder, site.authority)
        self.witness = Witness(Registry(folder / "registry.db"), self.key)
        self.signer_pem = (site.home.identity / "ledger-signer.pem").read_text()
        self.sent: list[list[int]] = []
        self.down = False
        self.lose_answers = False
        self.change: Callable[[dict[str, Any]], None] = lambda answer: None

    def call(self, method: str, request: dict[str, Any], **_: Any) -> Any:
        assert method == SITE_WITNESS
        assert set(request) == {"heads"}
        if self.down:
            raise ConsiliumError("network.unreachable", "Nobody answers.")
        heads = json.loads(canonical_json(request))["heads"]
        for head in heads:  # nothing of an entry's content leaves
            assert set(head) == {"sequence", "hash", "signature"}
        self.sent.append([head["sequence"] for head in heads])
        answer = self.witness.countersign(self.site.identity.config.name, self.signer_pem, heads)
        if self.lose_answers:
            raise ConsiliumError("network.timeout", "The answer was lost.")
        answer = json.loads(canonical_json(answer))
        self.change(answer)
        return answer

    def close(self) -> None:
        self.down = True


@dataclass(frozen=True)
class Identity(SiteIdentity):
    """The site's identity, whose calls go to the aggregator of the test."""

    aggregator: Any = None

    def caller(self) -> Any:
        return self.aggregator


@dataclass
class House:
    """One site with its witnessing, and the aggregator."""

    site: JoinedSite
    aggregator: Aggregator
    said: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        found = SiteIdentity.load(self.site.home)
        identity = Identity(
            found.config,
            found.folder,
            found.authority,
            found.certificate,
            aggregator=self.aggregator,
        )
        self.aggregator.down = False
        self.witnessing = Witnessing(self.site.home, identity, self.said.append)

    def ledger(self) -> Ledger:
        name = self.site.identity.config.name
        return Ledger.open(self.site.home.ledger, self.site.signer, site=name)

    def charge(self, *rounds: int) -> None:
        with self.ledger() as ledger:
            for index in rounds:
                charge(ledger, index)

    def refusal(self) -> ConsiliumError:
        with pytest.raises(ConsiliumError) as caught:
            self.witnessing.catch_up()
        return caught.value

    def witnessed(self) -> tuple[int, int]:
        """Entries, and those witnessed: everything verified with both public keys."""
        found = verify_file(
            self.site.home.ledger,
            self.site.signer.public_key(),
            witness_key=self.aggregator.key.key.public_key(),
        )
        assert found.ok, found.problem
        return found.entries, found.witnessed


@pytest.fixture
def house(tmp_path: Path) -> House:
    site = joined_site(tmp_path / "site")
    return House(site, Aggregator(tmp_path / "aggregator", site))


def test_each_new_entry_is_witnessed_and_an_idle_ledger_asks_nothing(house: House) -> None:
    house.charge(0)
    house.witnessing.catch_up()
    assert house.aggregator.sent == [[], [0, 1, 2]]
    assert house.witnessed() == (3, 3)
    for _ in range(3):
        house.witnessing.catch_up()
    assert len(house.aggregator.sent) == 2
    house.charge(1)
    house.witnessing.catch_up()
    assert house.aggregator.sent[2:] == [[3]]
    assert house.witnessed() == (4, 4)
    assert house.said == []


def test_a_site_without_a_ledger_asks_once_and_makes_none(house: House) -> None:
    for _ in range(3):
        house.witnessing.catch_up()
    assert house.aggregator.sent == [[]]
    assert not house.site.home.ledger.exists()
    house.charge(0)
    house.witnessing.catch_up()
    assert house.witnessed() == (3, 3)


def test_a_site_that_was_offline_catches_up_in_batches(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(witnessing, "BATCH", 4)
    house.charge(*range(7))
    house.aggregator.down = True
    assert house.refusal().code == "network.unreachable"
    assert house.witnessed() == (9, 0)
    house.aggregator.down = False
    house.witnessing.catch_up()
    assert house.aggregator.sent == [[], [0, 1, 2, 3], [4, 5, 6, 7], [8]]
    assert house.witnessed() == (9, 9)


def test_an_answer_that_was_lost_is_asked_for_again(house: House) -> None:
    house.charge(0, 1)
    house.aggregator.lose_answers = True
    assert house.refusal().code == "network.timeout"
    house.witnessing._known = -1  # what a site knows that got one answer and then none
    assert house.refusal().code == "network.timeout"
    assert house.aggregator.sent[-1] == [0, 1, 2, 3]
    house.aggregator.lose_answers = False
    house.restart()
    house.witnessing.catch_up()
    assert house.witnessed() == (4, 4)


def test_a_ledger_put_back_from_an_old_copy_is_marked_and_refused(house: House) -> None:
    house.charge(0)
    old = house.site.home.path / "old.db"
    shutil.copy(house.site.home.ledger, old)
    house.charge(1, 2)
    house.witnessing.catch_up()
    new = house.site.home.path / "new.db"
    house.witnessing.close()
    shutil.copy(house.site.home.ledger, new)
    for side in house.site.home.path.glob("ledger.db*"):
        side.unlink()
    shutil.copy(old, house.site.home.ledger)

    house.restart()
    error = house.refusal()
    assert error.code == "privacy.witness-conflict"
    assert "rolled back" in error.message
    assert "entry 4" in error.message
    assert house.refusal().code == "privacy.ledger-rolled-back"
    with pytest.raises(ConsiliumError, match="ledger-rolled-back"):
        house.charge(1)
    # Taking the mark away does not help: the aggregator is asked again.
    conflict_file(house.site.home.ledger).unlink()
    assert house.refusal().code == "privacy.witness-conflict"
    # The right copy does.
    shutil.copy(new, house.site.home.ledger)
    conflict_file(house.site.home.ledger).unlink()
    house.witnessing.catch_up()
    house.charge(3)
    house.witnessing.catch_up()
    assert house.witnessed() == (6, 6)


def test_a_ledger_that_was_rolled_back_and_grew_again_is_found_by_its_hashes(house: House) -> None:
    house.charge(0)
    old = house.site.home.path / "old.db"
    shutil.copy(house.site.home.ledger, old)
    house.charge(1, 2)
    house.witnessing.catch_up()
    house.witnessing.close()
    for side in house.site.home.path.glob("ledger.db*"):
        side.unlink()
    shutil.copy(old, house.site.home.ledger)
    house.charge(7, 8, 9)
    house.restart()
    error = house.refusal()
    assert error.code == "privacy.witness-conflict"
    assert "rewritten" in error.message
    with pytest.raises(ConsiliumError, match="ledger-rolled-back"):
        house.charge(10)


def test_a_file_replaced_under_a_running_site_is_noticed(house: House) -> None:
    house.charge(0)
    old = house.site.home.path / "old.db"
    shutil.copy(house.site.home.ledger, old)
    house.charge(1)
    house.witnessing.catch_up()
    for side in house.site.home.path.glob("ledger.db*"):
        side.unlink()
    old.rename(house.site.home.ledger)
    assert house.refusal().code == "privacy.witness-conflict"


def test_a_ledger_that_was_deleted_is_not_begun_anew(house: House) -> None:
    house.charge(0)
    house.witnessing.catch_up()
    house.witnessing.close()
    for side in house.site.home.path.glob("ledger.db*"):
        side.unlink()
    house.restart()
    assert house.refusal().code == "privacy.witness-conflict"
    with pytest.raises(ConsiliumError, match="ledger-rolled-back"):
        house.charge(0)
    assert not house.site.home.ledger.exists()


def test_an_aggregator_that_lost_its_records_gets_them_again(house: House) -> None:
    house.charge(0, 1)
    house.witnessing.catch_up()
    new = Registry(house.site.home.path / "registry.db")
    house.aggregator.witness = Witness(new, house.aggregator.key)
    house.restart()
    house.witnessing.catch_up()
    assert house.aggregator.sent[-1] == [0, 1, 2, 3]
    assert "lost its records" in house.said[0]
    house.charge(2)
    house.witnessing.catch_up()
    assert house.witnessed() == (5, 5)
    assert len(house.said) == 1


def other_entry(answer: dict[str, Any]) -> None:
    for record in answer["records"]:
        record["statement"]["hash"] = "0" * 64


def forged(answer: dict[str, Any]) -> None:
    for record in answer["records"]:
        record["signature"] = "0" * 128


def later_time(answer: dict[str, Any]) -> None:
    for record in answer["records"]:
        record["statement"]["time"] = "2099-01-01T00:00:00.000000Z"


def fewer(answer: dict[str, Any]) -> None:
    answer["records"] = answer["records"][1:]


def no_records(answer: dict[str, Any]) -> None:
    answer["records"] = None


def known_text(answer: dict[str, Any]) -> None:
    answer["known"] = "2"


def known_true(answer: dict[str, Any]) -> None:
    answer["known"] = True


def no_certificate(answer: dict[str, Any]) -> None:
    answer["witness_pem"] = "no PEM"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (other_entry, "network.bad-answer"),
        (forged, "privacy.witness-invalid"),
        (later_time, "privacy.witness-invalid"),
        (fewer, "network.bad-answer"),
        (no_records, "network.bad-answer"),
        (known_text, "network.bad-answer"),
        (known_true, "network.bad-answer"),
        (no_certificate, "identity.bad-certificate"),
    ],
)
def test_an_answer_that_does_not_hold_is_not_kept(
    house: House, change: Callable[[dict[str, Any]], None], code: str
) -> None:
    house.charge(0)
    house.aggregator.change = change
    assert house.refusal().code == code
    assert house.witnessed() == (3, 0)
    assert not conflict_file(house.site.home.ledger).exists()
    house.charge(1)  # training goes on: the trouble is the aggregator's
    house.aggregator.change = lambda answer: None
    house.witnessing.catch_up()
    assert house.witnessed() == (4, 4)


def test_only_this_consortium_s_witness_is_believed(house: House) -> None:
    house.charge(0)
    key, tls = new_signing_key().public_key(), new_tls_key().public_key()
    ours, other = house.site.authority, Authority.create("others")
    for authority, public, role, name, code in (
        (other, key, Role.WITNESS, "aggregator", "identity.foreign"),
        (ours, key, Role.SIGNER, "aggregator", "identity.bad-certificate"),
        (ours, key, Role.WITNESS, "somebody", "identity.bad-certificate"),
        (ours, tls, Role.WITNESS, "aggregator", "identity.weak-key"),
    ):
        pem = certificate_pem(authority.issue(public, role, name)).decode()

        def change(answer: dict[str, Any], pem: str = pem) -> None:
            answer["witness_pem"] = pem

        house.aggregator.change = change
        assert house.refusal().code == code
    assert not house.site.home.witness_certificate.exists()
    house.aggregator.change = lambda answer: None
    house.witnessing.catch_up()
    assert house.site.home.witness_certificate.read_text() == house.aggregator.key.pem


def test_another_witness_key_than_before_is_not_believed_silently(
    house: House, tmp_path: Path
) -> None:
    house.charge(0)
    house.witnessing.catch_up()
    house.aggregator = Aggregator(tmp_path / "second", house.site)
    house.restart()
    assert house.refusal().code == "identity.witness-changed"


def test_the_task_works_beside_the_loop_and_ends_when_it_is_told(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(witnessing, "_POLL_SECONDS", 0.01)
    house.charge(0)

    async def scene() -> None:
        task = asyncio.create_task(house.witnessing.witness_for_ever())
        await until(lambda: house.witnessed() == (3, 3))
        house.aggregator.down = True
        house.charge(1)
        await asyncio.sleep(0.05)
        house.aggregator.down = False
        await until(lambda: house.witnessed() == (4, 4))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(scene())
    assert house.aggregator.down  # the connection was closed
    assert house.said == []  # that the aggregator was away is said by the link


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


def test_a_call_that_hangs_ends_with_the_site(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    called, closed = threading.Event(), threading.Event()

    def hang(*_: Any, **__: Any) -> Any:
        called.set()
        assert closed.wait(20)
        raise ConsiliumError("network.failed", "The call failed (CANCELLED).")

    monkeypatch.setattr(house.aggregator, "call", hang)
    monkeypatch.setattr(house.aggregator, "close", closed.set)

    async def scene() -> None:
        task = asyncio.create_task(house.witnessing.witness_for_ever())
        await until(called.is_set)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, 20)

    asyncio.run(scene())
    assert closed.is_set()


def test_a_trouble_is_said_once_and_again_after_it_was_gone(house: House) -> None:
    house.charge(0)
    house.aggregator.change = forged
    for _ in range(3):
        assert house.witnessing._try()
    assert len(house.said) == 1
    assert "privacy.witness-invalid" in house.said[0]
    house.aggregator.change = lambda answer: None
    assert not house.witnessing._try()
    house.charge(1)
    house.aggregator.change = forged
    assert house.witnessing._try()
    assert len(house.said) == 2


def test_what_nobody_foresaw_is_said_and_tried_again(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    house.charge(0)
    with monkeypatch.context() as patch:
        patch.setattr(WitnessRecord, "from_dict", lambda value: 1 // 0)
        assert house.witnessing._try()
    assert house.said == ["the ledger is not witnessed: [internal.unexpected] ZeroDivisionError"]
    assert not house.witnessing._try()
    assert house.witnessed() == (3, 3)
