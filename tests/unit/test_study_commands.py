"""An operator's commands about a study, from draft to end, against the aggregator's real port."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from aggregator_samples import Aggregator, consilium
from state_samples import a_site, add_round, put

from consilium_common.study.check import check
from consilium_common.study.examples import example_files
from consilium_server.round_tables import SiteRound
from consilium_server.tables import Approval, now

STUDY = next(path for path in example_files() if path.stem == "hippocampus")


@pytest.fixture
def aggregator(tmp_path: Path) -> Iterator[Aggregator]:
    made = Aggregator(tmp_path)
    with made.open():
        yield made


def study(aggregator: Aggregator, *arguments: object) -> Any:
    return consilium("study", *map(str, arguments), "--home", aggregator.home.path)


def approve(aggregator: Aggregator, digest: str, *sites: str) -> None:
    with aggregator.registry.transaction() as session:
        for site in sites:
            session.merge(a_site(site))
            session.merge(
                Approval(
                    digest=digest,
                    site=site,
                    decision="approved",
                    why="",
                    cohort_size=9,
                    evaluation_size=3,
                    signature="",
                    decided_at=now(),
                )
            )


def test_a_draft_is_kept_and_proposed_later_by_its_digest(aggregator: Aggregator) -> None:
    kept = study(aggregator, "propose", STUDY, "--draft")
    digest = kept["digest"]
    assert (kept["state"], kept["known"]) == ("draft", False)
    assert study(aggregator, "propose", STUDY, "--draft")["known"] is True
    assert aggregator.registry.study(digest).signature == ""
    assert study(aggregator, "run", digest) == "study.draft"
    proposed = study(aggregator, "propose", digest[:10])
    assert (proposed["digest"], proposed["state"], proposed["known"]) == (digest, "proposed", False)
    assert study(aggregator, "propose", digest)["known"] is True
    # What is proposed does not become a draft again.
    assert study(aggregator, "propose", STUDY, "--draft")["state"] == "proposed"
    row = aggregator.registry.study(digest)
    assert row.signature != ""
    assert [(e.before, e.after) for e in aggregator.registry.history(digest)] == [
        ("", "draft"),
        ("draft", "proposed"),
    ]
    assert study(aggregator, "propose", "feedface") == "study.unknown"


def test_proposing_to_more_sites_stands_in_the_study_s_log(aggregator: Aggregator) -> None:
    with aggregator.registry.transaction() as session:
        for site in ("east", "north"):
            session.add(a_site(site))
    for site in ("east", "north", "north"):
        digest = study(aggregator, "propose", STUDY, "--site", site)["digest"]
    study(aggregator, "propose", STUDY)
    history = aggregator.registry.history(digest)
    assert [event.why for event in history] == [
        "proposed by operator",
        "proposed to east, north by operator",
        "proposed to all sites by operator",
    ]
    assert {(event.after, event.who) for event in history} == {("proposed", "operator")}


def test_a_study_is_queued_paused_resumed_and_stopped_and_its_log_says_by_whom(
    aggregator: Aggregator,
) -> None:
    digest = study(aggregator, "propose", STUDY)["digest"]
    assert study(aggregator, "run", digest) == "study.not-approved"
    assert study(aggregator, "pause", digest) == "study.not-running"
    assert study(aggregator, "resume", digest) == "study.not-paused"
    approve(aggregator, digest, "east", "north", "south")
    queued = study(aggregator, "run", digest, "--priority", "3")
    assert (queued["state"], queued["place"], queued["priority"]) == ("queued", 1, 3)
    assert study(aggregator, "run", digest) == "study.queued"
    assert study(aggregator, "run", digest, "--priority", "4")["priority"] == 4
    assert study(aggregator, "pause", digest)["state"] == "paused"
    assert study(aggregator, "run", digest) == "study.paused"
    assert study(aggregator, "resume", digest)["state"] == "queued"
    put(aggregator.registry, digest, "running", "its sites are there and free")
    assert study(aggregator, "run", digest) == "study.running"
    asked = study(aggregator, "pause", digest)
    assert (asked["state"], asked["pause_asked"]) == ("running", True)
    assert study(aggregator, "resume", digest)["pause_asked"] is False
    assert study(aggregator, "pause", digest, "--now")["state"] == "paused"
    assert study(aggregator, "stop", digest)["state"] == "stopped"
    assert study(aggregator, "stop", digest) == "study.not-running"
    assert study(aggregator, "run", digest)["state"] == "queued"
    put(aggregator.registry, digest, "finished", "all rounds are done")
    assert study(aggregator, "run", digest) == "study.finished"

    add_round(aggregator.registry, digest, 0)
    log = study(aggregator, "log", digest)
    assert all(row["who"] and row["why"] for row in log["history"])
    people = [row["why"] for row in log["history"] if row["who"] == "operator"]
    assert people == [
        "proposed by operator",
        "queued by operator",
        "priority 4 by operator",
        "paused by operator",
        "resumed by operator",
        "operator wants it paused after the round under way",
        "operator wants it to go on",
        "paused by operator",
        "stopped by operator",
        "queued by operator",
    ]
    assert [row["number"] for row in log["rounds"]] == [0]
    assert study(aggregator, "log", digest, "--round", "2") == "study.no-round"
    with aggregator.registry.transaction() as session:
        session.add(
            SiteRound(
                digest=digest, number=0, site="north", outcome="left-out", why="far", cosine=-0.5
            )
        )
    (part,) = study(aggregator, "log", digest, "--round", "1")["parts"]
    assert (part["site"], part["outcome"], part["cosine"]) == ("north", "left-out", -0.5)
    (line,) = study(aggregator, "list")["studies"]
    assert (line["state"], line["place"], line["rounds_done"]) == ("finished", None, 1)


def test_a_clone_is_the_same_study_until_it_is_changed(
    aggregator: Aggregator, tmp_path: Path
) -> None:
    digest = study(aggregator, "propose", STUDY)["digest"]
    same, renamed = tmp_path / "same.yaml", tmp_path / "renamed.yaml"
    assert study(aggregator, "clone", digest, "--out", same)["of"] == digest
    assert check(same).study.digest == digest
    assert study(aggregator, "clone", digest, "--out", same) == "state.exists"
    wrong = tmp_path / "wrong.yaml"
    assert study(aggregator, "clone", digest, "--out", wrong, "--name", "Two words") == "usage.name"
    assert not wrong.exists()
    assert next(iter(yaml.safe_load(same.read_text()))) == "schema"
    study(aggregator, "clone", digest, "--out", renamed, "--name", "second")
    document = yaml.safe_load(renamed.read_text())
    document["federation"]["rounds"] = 3
    renamed.write_text(yaml.safe_dump(document))
    other = study(aggregator, "propose", renamed)["digest"]
    add_round(aggregator.registry, other, 0, seconds=4.0)
    found = study(aggregator, "compare", digest, other)
    changed = {row["key"]: row["is"] for row in found["differences"]}
    assert changed["name"] == "second"
    assert changed["federation.rounds"] == "3"
    assert [one["seconds_per_round"] for one in found["studies"]] == [None, 4.0]
