"""A study's run on the aggregator: what is asked when, what is averaged, noted, shown and kept."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from server_samples import SITES, House, a_study, private

from consilium_common.canonical import canonical_json
from consilium_common.errors import ConsiliumError
from consilium_common.models.registry import initial_weights
from consilium_common.models.weights import pack
from consilium_common.wire.messages import to_server
from consilium_server.released import checked_figures, noisy_score
from consilium_server.rounds import concluding
from consilium_server.watching import evaluation_line, one_line, study_view


@pytest.fixture(autouse=True)
def _task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages ask which task makes them; here it is any."""
    from flwr.supercore.task_identity import TaskIdentity

    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 3)


def words(data: dict[str, Any]) -> str:
    from rich.console import Console

    console = Console(width=160)
    with console.capture() as capture:
        console.print(study_view(data))
    return capture.get()


def test_a_run_s_process_loads_the_app_after_flower() -> None:
    # Flower brings gRPC; nothing that the app imports may want to restrict it afterwards.
    code = "import flwr.serverapp, consilium_server.app"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr.decode()


# --- the order of things -----------------------------------------------------------------------


def test_a_private_study_evaluates_the_start_first_and_never_twice(tmp_path: Path) -> None:
    house = House(tmp_path, private(evaluation={"every": 1}))

    def broken(site: str, kind: str, number: int) -> Any:
        if (kind, number) == ("train", 1):
            raise ConsiliumError("run.failed", "Not now.")

    house.answers.instead = broken
    waits_for = house.stuck()
    assert waits_for.startswith("waiting for 2 more sites; east: run.failed: Not now.; north: ")
    assert house.answers.asked == [
        ("evaluate", 0),
        ("train", 0),
        ("evaluate", 1),
        ("train", 1),
    ]
    house.answers.instead = lambda *_: None
    house.answers.asked.clear()
    house.run()
    assert house.answers.asked == [("train", 1), ("evaluate", 2)]
    assert house.answers.last == [("evaluate", 2)]
    assert house.registry.study(house.study.digest).state == "finished"
    assert [row["rounds_done"] for row in house.show()["evaluations"]] == [0, 1, 2]


def test_a_study_that_releases_nothing_evaluates_the_start_and_keeps_no_figure(
    tmp_path: Path,
) -> None:
    study = private(evaluation={"release": "none", "epsilon": None})
    house = House(tmp_path, study)
    house.answers.instead = lambda site, kind, number: (
        # A site that sends a figure nobody asked for.
        to_server(None, {"sum": 1.0}) if kind == "evaluate" else None
    )
    house.run()
    assert house.answers.asked[0] == ("evaluate", 0)
    shown = house.show()
    assert shown["evaluation"] == {}
    assert [row["figures"] for row in shown["evaluations"]] == [{}, {}]
    assert [row["sites"] for row in shown["evaluations"]] == [list(SITES), list(SITES)]
    assert shown["evaluation_epsilon"] == {}
    assert {row.purpose for row in house.registry.received("north")} == {"training"}


def test_a_study_without_privacy_is_not_evaluated_before_it_begins(tmp_path: Path) -> None:
    house = House(tmp_path, a_study(evaluation={"release": "exact"}))
    figures = {"dice.organ.total": 3.0, "dice.organ.count": 4.0, "cases": 4.0}
    house.answers.instead = lambda site, kind, number: (
        to_server(None, figures) if kind == "evaluate" else None
    )
    house.run()
    assert house.answers.asked == [("train", 0), ("train", 1), ("evaluate", 2)]
    (end,) = house.registry.history(house.study.digest)
    assert (end.after, end.who, end.why) == ("finished", "aggregator", "all 2 rounds are done")
    shown = house.show()
    assert shown["evaluation"]["mean_dice"] == 0.75
    assert shown["evaluation"]["cases"] == 12
    assert shown["rounds"][-1]["metrics"]["evaluation"]["north"] == figures
    assert shown["rounds"][0]["metrics"] == {}
    assert "12 test cases" in evaluation_line(shown["evaluation"])


# --- stage 0 decides ---------------------------------------------------------------------------


def test_a_start_that_is_good_enough_ends_the_study_before_any_private_step(
    tmp_path: Path,
) -> None:
    house = House(tmp_path, private(evaluation={"sufficient": 0.8}))
    # 4, 8 and 12 patients declared: 1/2 + 8/24.
    house.answers.sums = {"east": 1.0, "north": 3.0, "south": 4.0}
    house.run()
    assert house.answers.asked == [("evaluate", 0)]
    row = house.registry.study(house.study.digest)
    assert row.state == "finished"
    assert row.reason.startswith("the starting model already scores .83 ± ")
    assert row.reason.endswith("no budget was spent on training")
    start = initial_weights(house.study)
    for name, tensor in house.model.items():
        np.testing.assert_array_equal(tensor, start[name])
    shown = house.show()
    assert (shown["epsilon"], set(shown["evaluation_epsilon"])) == ({}, set(SITES))


def test_a_start_that_is_not_good_enough_is_trained(tmp_path: Path) -> None:
    house = House(tmp_path, private(evaluation={"sufficient": 0.9}))
    house.answers.sums = {"east": 1.0, "north": 3.0, "south": 4.0}
    house.run()
    assert ("train", 1) in house.answers.asked
    shown = house.show()
    found = shown["evaluation"]
    assert (found["rounds_done"], found["patients"]) == (2, 24)
    assert found["score"] == pytest.approx(0.5 + 8 / 24)
    from consilium_common.privacy.accounting import epsilon_of, parameters

    plan = parameters(house.study)
    assert plan is not None
    assert plan.evaluation_noise is not None
    expected = plan.evaluation_noise * 0.5 * np.sqrt(3) / 24
    assert found["standard_error"] == pytest.approx(expected)
    # Trained and evaluated patients are different people: two figures, never added.
    assert shown["epsilon"]["north"] == pytest.approx(
        epsilon_of([plan.event_total], plan.delta), abs=1e-4
    )
    assert shown["evaluation_epsilon"]["north"] == pytest.approx(0.5, abs=0.01)
    assert "(noise), 3 sites, 24 patients declared" in one_line(shown)
    text = words(shown)
    assert "the starting model: score" in text
    assert "ε tests" in text


def test_a_site_that_sends_anything_but_one_finite_sum_is_left_out(tmp_path: Path) -> None:
    house = House(tmp_path, private(evaluation={}))
    house.answers.instead = lambda site, kind, number: (
        to_server(None, {"sum": 1.0, "cases": 7.0})
        if (kind, site) == ("evaluate", "south")
        else None
    )
    house.run()
    (first, last) = house.show()["evaluations"]
    for row in (first, last):
        assert row["sites"] == ["east", "north"]
        assert "run.bad-figures" in row["dropped"]["south"]
        assert row["patients"] == 12


def test_without_a_quorum_of_scores_no_private_step_is_taken(tmp_path: Path) -> None:
    house = House(tmp_path, private(evaluation={}))
    house.answers.instead = lambda site, kind, number: (
        to_server(None, {"sum": float("nan")}) if kind == "evaluate" and site != "north" else None
    )
    assert house.stuck().startswith("waiting for 1 more site; east: run.bad-figures: ")
    assert house.answers.asked == [("evaluate", 0)]
    assert house.show()["evaluations"] == []
    # What did come is noted, once.
    (row,) = house.registry.received("north")
    assert row.sha256 == hashlib.sha256(canonical_json({"sum": 0.0})).hexdigest()
    house.answers.instead = lambda *_: None
    house.run()
    assert house.registry.study(house.study.digest).state == "finished"


# --- what is aggregated ------------------------------------------------------------------------


def test_only_trained_tensors_are_averaged_and_the_rest_stays_as_it_began(
    tmp_path: Path,
) -> None:
    study = a_study(model={"trainable": "first+last"}, federation={"weighting": "uniform"})
    house = House(tmp_path, study)
    trained = house.answers.trained
    start = initial_weights(study)
    assert trained < set(start)
    house.run()
    model = house.model
    assert set(model) == set(start)
    for name, tensor in start.items():
        # Two rounds, in each the mean of +1, +2 and +3.
        expected = tensor + 4 if name in trained else tensor
        np.testing.assert_allclose(model[name], expected, rtol=1e-6, atol=1e-6)
    # Sites are sent the whole model.
    assert set(house.answers.models["train", 1]) == set(start)


@pytest.mark.parametrize("sent", ["the whole model", "one tensor too few", "a NaN"])
def test_an_update_that_is_not_what_the_study_declares_is_left_out(
    tmp_path: Path, sent: str
) -> None:
    house = House(tmp_path, a_study(model={"trainable": "first+last"}))
    weights = initial_weights(house.study)
    if sent != "the whole model":
        weights = {name: weights[name] for name in sorted(house.answers.trained)}
        name = min(weights)
        if sent == "a NaN":
            weights[name] = np.full_like(weights[name], np.nan)
        else:
            del weights[name]
    house.answers.instead = lambda site, kind, number: (
        house.answers.delivered(site, pack(weights)) if (kind, site) == ("train", "south") else None
    )
    house.run()
    for row in house.show()["rounds"]:
        assert row["sites"] == ["east", "north"]
        assert "run.bad-update" in row["dropped"]["south"]


def test_the_average_is_evaluated_and_kept_and_training_goes_on_from_the_model(
    tmp_path: Path,
) -> None:
    study = a_study(federation={"averaging": 0.9, "weighting": "uniform"}, evaluation={"every": 1})
    house = House(tmp_path, study)
    house.run()
    name = min(house.answers.trained)
    start = initial_weights(study)[name]
    # After rounds 1 and 2 the model is start + 2 and start + 4; d is 2/11 and 3/12.
    first = 9 / 11 * 2
    second = 3 / 12 * first + 9 / 12 * 4
    seen = {step: model[name] - start for step, model in house.answers.models.items()}
    np.testing.assert_allclose(seen["train", 1], 2, rtol=1e-5)
    np.testing.assert_allclose(seen["evaluate", 1], first, rtol=1e-5)
    np.testing.assert_allclose(seen["evaluate", 2], second, rtol=1e-5)
    np.testing.assert_allclose(house.model[name] - start, second, rtol=1e-5)


def test_a_study_with_a_public_start_begins_with_exactly_these_weights(tmp_path: Path) -> None:
    plain = a_study()
    weights = {k: np.full_like(v, 0.25) for k, v in initial_weights(plain).items()}
    blob = pack(weights)
    sha256 = hashlib.sha256(blob).hexdigest()
    study = a_study(model={"start": {"sha256": sha256, "data": "ten public volumes"}})
    house = House(tmp_path, study)
    assert house.fails() == "study.start"
    assert house.answers.asked == []
    (house.home.starts / f"{sha256}.safetensors").write_bytes(blob)
    house.run()
    for tensor in house.answers.models["train", 0].values():
        np.testing.assert_array_equal(tensor, np.float32(0.25))


def test_a_crash_before_the_checkpoint_repeats_the_round_and_counts_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = House(tmp_path, private(evaluation={}))

    def full(*_: object) -> None:
        raise ConsiliumError("state.disk", "The disk is full.")

    with monkeypatch.context() as patch:
        patch.setattr(concluding, "save_checkpoint", full)
        assert house.fails() == "state.disk"
    assert [row["number"] for row in house.show()["rounds"]] == [0]
    house.answers.asked.clear()
    house.run()
    # What was taken is on the disk: nobody is asked for it again.
    assert house.answers.asked == [("train", 1), ("evaluate", 2)]
    assert [row["number"] for row in house.show()["rounds"]] == [0, 1]
    assert [row.round for row in house.registry.received("north")] == [0, 0, 1, 2]


# --- what is noted -----------------------------------------------------------------------------


def test_what_is_received_is_noted_by_its_hash_however_often_it_is_asked(tmp_path: Path) -> None:
    house = House(tmp_path, private(evaluation={}, federation={"quorum": 3}))
    refused: list[str] = []

    def once(site: str, kind: str, number: int) -> Any:
        if kind == "train" and number == 0 and not refused:
            refused.append(site)
            raise ConsiliumError("run.failed", "Only once.")

    house.answers.instead = once
    house.stuck()
    shutil.rmtree(house.home.study_folder(house.study.digest) / "taken")
    house.run()
    assert house.answers.asked.count(("train", 0)) == 1
    rows = house.registry.received("north")
    assert [(row.purpose, row.round) for row in rows] == [
        ("evaluation", 0),
        ("training", 0),
        ("training", 1),
        ("evaluation", 2),
    ]
    sent = pack(house.answers.update(house.answers.models["train", 0], "north"))
    assert rows[1].sha256 == hashlib.sha256(sent).hexdigest()
    assert rows[1].bytes == len(sent)
    assert house.registry.alarms() == []


def test_a_second_different_update_for_a_private_round_raises_an_alarm(tmp_path: Path) -> None:
    house = House(tmp_path, private(evaluation={}, federation={"quorum": 3}))
    calls: list[str] = []

    def changing(site: str, kind: str, number: int) -> Any:
        if (kind, number) != ("train", 0):
            return None
        calls.append(site)
        if site == "south" and calls.count("south") == 1:
            raise ConsiliumError("run.failed", "So the round is asked again.")
        if site == "north":
            model = house.answers.models["train", 0]
            update = house.answers.update(model, "north")
            return house.answers.delivered(
                site, pack({k: v + np.float32(calls.count("north")) for k, v in update.items()})
            )
        return None

    house.answers.instead = changing
    assert (
        house.stuck() == "waiting for 1 more site; south: run.failed: So the round is asked again."
    )
    # The machine crashed: what was taken is lost, and every site is asked again.
    shutil.rmtree(house.home.study_folder(house.study.digest) / "taken")
    house.run()
    (alarm,) = house.registry.alarms()
    assert (alarm.site, alarm.code) == ("north", "privacy.second-release")
    shown = house.show()
    assert [one["site"] for one in shown["alarms"]] == ["north"]
    assert "ALARM north" in words(shown)


# --- released figures --------------------------------------------------------------------------


def test_the_noised_mean_is_the_mean_of_all_patients_when_there_is_no_noise() -> None:
    scores = {"north": [0.9, 0.7, 0.8], "south": [0.1]}
    figures = {site: {"sum": sum(s - 0.5 for s in values)} for site, values in scores.items()}
    found = noisy_score(figures, {"north": 3, "south": 1, "east": 99}, 0.0)
    assert found["score"] == pytest.approx(2.5 / 4)
    assert (found["patients"], found["standard_error"]) == (4, 0.0)


def test_the_standard_error_is_that_of_the_noise() -> None:
    rng = np.random.default_rng(1)
    noise, declared = 3.0, {"a": 10, "b": 5, "c": 25}
    draws = [
        noisy_score({s: {"sum": rng.normal(0, noise)} for s in declared}, declared, noise)
        for _ in range(4000)
    ]
    spread = float(np.std([one["score"] for one in draws]))
    assert spread == pytest.approx(draws[0]["standard_error"], rel=0.05)


@pytest.mark.parametrize(
    "figures", [{}, {"sum": float("inf")}, {"mean": 0.5}, {"sum": 1.0, "n": 2.0}]
)
def test_figures_of_a_private_evaluation_are_one_finite_sum(figures: dict[str, float]) -> None:
    with pytest.raises(ConsiliumError) as caught:
        checked_figures(figures, "private")
    assert caught.value.code == "run.bad-figures"
    assert checked_figures(figures, "none") == {}
