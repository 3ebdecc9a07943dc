"""Buffered, drawn and cyclic rounds over real processes and the one port."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from federation import PRIVATE, Federation, consilium, small_study

from consilium_common.demo.hospitals import NAMES


def test_a_private_buffered_study_charges_each_step_once_and_reconciles(
    federation: Federation, tmp_path: Path
) -> None:
    changes = {part: dict(values) for part, values in PRIVATE.items()}
    changes["federation"] = {
        **changes.get("federation", {}),
        "rounds": 4,
        "quorum": 2,
        "buffered": {"size": 2, "most_staleness": 3},
    }
    found = federation.run_to_end(small_study("buffered", **changes))
    assert found["state"] == "finished"
    assert [len(row["sites"]) for row in found["rounds"]] == [2, 2, 2, 2]
    used = Counter(site for row in found["rounds"] for site in row["sites"])
    for name in NAMES:
        home = federation.sites[name].home
        export = tmp_path / f"{name}.jsonl"
        consilium("audit", "export", home / "ledger.db", export).data  # noqa: B018
        key = home / "identity" / "ledger-public.pem"
        (report,) = consilium("audit", "verify", export, "--key", key).data["ledgers"]
        costs = [s for s in report["studies"] if s["study"] == found["digest"]]
        # Never more than the rounds that the site approved; an update may come too late to count.
        assert used[name] <= sum(cost["released"] for cost in costs) <= 4


def test_sites_are_drawn_in_turn_and_the_deadline_is_learned(federation: Federation) -> None:
    changes = {
        "rounds": 3,
        "quorum": 2,
        "sites_per_round": 2,
        "deadline_seconds": "learned",
        "grace_seconds": 1,
    }
    found = federation.run_to_end(small_study("drawn", federation=changes))
    sites = [row["sites"] for row in found["rounds"]]
    assert Counter(name for row in sites for name in row) == dict.fromkeys(NAMES, 2)
    cyclic = {"rounds": 3, "quorum": 1, "strategy": {"name": "cyclic"}}
    found = federation.run_to_end(small_study("cyclic", federation=cyclic))
    assert [row["sites"] for row in found["rounds"]] == [[name] for name in sorted(NAMES)]
