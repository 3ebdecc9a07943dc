"""A plan says what a study costs and whether noise drowns it, before anything is spent."""

from __future__ import annotations

import functools
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import typer
from audit_samples import consilium
from study_samples import TEXT

from consilium_common.audit import cli as audit_cli
from consilium_common.audit.planning import affordable_rounds, plan_for
from consilium_common.errors import ConsiliumError
from consilium_common.privacy.accounting import epsilon_of
from consilium_common.privacy.events import PrivacyEvent, PrivacyParameters
from consilium_common.privacy.noise import noise_to_signal

Run = Callable[..., tuple[int, str, str]]
BASE = ("audit", "plan", "--epsilon", 3, "--steps", 40, "--rounds", 4)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return functools.partial(consilium, monkeypatch, capsys)


def planned(run: Run, *arguments: object) -> Any:
    status, said, _ = run("--json", *arguments)
    assert status == 0, said
    return json.loads(said)["data"]


def failed(run: Run, *arguments: object) -> tuple[int, str]:
    status, said, _ = run("--json", *arguments)
    return status, json.loads(said)["error"]["code"]


def test_the_plan_keeps_its_target_and_prices_a_second_study(run: Run) -> None:
    found = planned(run, *BASE, "--patients", 100, "--rate", 0.2, "--delta", 1e-3, "--budget", 4)
    (row,) = found["plans"]
    event = PrivacyEvent(0.2, row["noise_multiplier"], 40)
    less = PrivacyEvent(0.2, row["noise_multiplier"] - 0.001, 40)
    assert row["epsilon"] == epsilon_of([event], 1e-3) <= 3 < epsilon_of([less], 1e-3)
    assert row["epsilon_after_second_study"] == epsilon_of([event, event], 1e-3)
    # One more round than are left would overrun the budget; those that are left do not.
    rounds = 4 + row["rounds_left"]
    per_round = [PrivacyEvent(0.2, row["noise_multiplier"], 10)]
    assert epsilon_of(per_round * rounds, 1e-3) <= 4 < epsilon_of(per_round * (rounds + 1), 1e-3)
    assert (found["unit"], found["accountant"], row["verdict"]) == ("patient", "PLD", None)


def test_each_size_has_its_own_delta_and_rate(run: Run) -> None:
    sizes = ("--patients", 40, "--patients", 100)
    found = planned(run, *BASE, *sizes, "--per-step", 50, "--values", 5000, "--budget", 4)
    small, large = found["plans"]
    assert (small["delta"], large["delta"]) == (1 / 400, 1 / 1000)
    assert (small["sampling_rate"], large["sampling_rate"]) == (1.0, 0.5)
    assert small["noise_to_signal"]["over_study"] > large["noise_to_signal"]["over_study"]


def test_noise_that_drowns_the_signal_is_warned_of_before_anybody_spends(
    run: Run, tmp_path: Path
) -> None:
    arguments = (*BASE, "--patients", 30, "--rate", 1.0, "--delta", 1e-3, "--values", 137_000)
    found = planned(run, *arguments)
    (row,) = found["plans"]
    mechanism = PrivacyParameters(1.0, 1.0, row["noise_multiplier"], 10, 4, 1e-3)
    expected = noise_to_signal(mechanism, 30, 137_000)
    assert row["noise_to_signal"]["over_study"] == pytest.approx(expected.over_study)
    assert row["verdict"] == expected.verdict == "drowned"
    assert any("spent for nothing" in warning for warning in found["warnings"])
    # The mean over four sites has half the noise.
    four = planned(run, *arguments, "--sites", 4)["plans"][0]
    assert four["noise_to_signal"]["per_step"] == pytest.approx(expected.per_step / 2)
    status, said, _ = run(*arguments, "--plot", tmp_path / "plan.png")
    assert status == 0
    assert "DROWNED" in said
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_a_delta_that_would_let_whole_records_out_is_warned_of(run: Run) -> None:
    found = planned(run, *BASE, "--patients", 2000, "--rate", 1, "--delta", 1e-3)
    assert any("whole record" in warning for warning in found["warnings"])


def test_a_study_is_planned_as_it_is_written(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(TEXT)
    plot = tmp_path / "plan.svg"
    found = planned(
        run, "audit", "plan", "--study", path, "--patients", 40, "--budget", 8, "--plot", plot
    )
    (row,) = found["plans"]
    assert row["epsilon"] == epsilon_of([PrivacyEvent(0.25, 1.5, 20)], 1e-3)
    assert found["trained_values"] > 0
    assert row["noise_to_signal"]["per_step"] == pytest.approx(
        1.5 * math.sqrt(found["trained_values"]) / 10
    )
    assert b"<svg" in plot.read_bytes()
    assert failed(run, "audit", "plan", "--study", path, "--patients", 4, "--rate", 0.1) == (
        2,
        "usage.plan",
    )
    path.write_text(TEXT[: TEXT.index("privacy:")] + "privacy:\n  mode: none\n")
    assert failed(run, "audit", "plan", "--study", path, "--patients", 4) == (2, "usage.plan")


def test_what_cannot_be_planned_is_one_clear_error(run: Run, tmp_path: Path) -> None:
    one = ("--patients", 10)
    for arguments in (
        one,
        (*one, "--rate", 0.1, "--per-step", 5),
        (*one, "--rate", 1.5),
        (*one, "--rate", 0.1, "--rounds", 7),
        (*one, "--rate", 0.1, "--sites", 0),
        (*one, "--rate", 0.1, "--budget", -1),
        ("--patients", 0, "--rate", 0.1),
    ):
        assert failed(run, *BASE, *arguments) == (2, "usage.plan"), arguments
    assert failed(run, "audit", "plan", *one) == (2, "usage.plan")
    assert failed(run, *BASE, *one, "--rate", 0.1, "--delta", 2) == (6, "privacy.delta-invalid")
    plot = ("--plot", tmp_path / "plan.gif")
    assert failed(run, *BASE, *one, "--rate", 0.1, *plot) == (2, "usage.plot")


def test_rounds_stop_at_the_most_a_study_may_have() -> None:
    assert affordable_rounds(PrivacyParameters(1.0, 1.0, 1000.0, 1, 1, 1e-3), 10.0) == 10_000
    assert affordable_rounds(PrivacyParameters(1.0, 1.0, 0.5, 1, 1, 1e-3), 0.1) == 0


def test_an_unreachable_target_says_so() -> None:
    with pytest.raises(ConsiliumError) as caught:
        plan_for([10], epsilon=1e-4, delta=1e-9, steps=10**8, rounds=1, rate=1.0, per_step=None,
                 clip_norm=1.0, values=None, budget=10.0, sites=1)  # fmt: skip
    assert caught.value.code == "privacy.unreachable"


def test_the_help_lists_the_attack_without_importing_anything_heavy() -> None:
    program = (
        "import sys\n"
        "from consilium_common.cli import main\n"
        "sys.argv = ['consilium', 'audit', '--help']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "heavy = ('torch', 'opacus', 'dp_accounting', 'numpy', 'matplotlib', 'consilium_client')\n"
        "print('HEAVY', [name for name in heavy if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "HEAVY []" in done.stdout
    for name in ("verify", "report", "plan", "compare", "export", "attack"):
        assert name in done.stdout


def test_a_tool_of_a_side_is_run_as_a_command_of_ours(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Point:
        name = "attack"

        def load(self) -> Callable[[int], None]:
            def attack(times: int = 1) -> None:
                if times > 2:
                    raise ConsiliumError("privacy.attack", "Refuted.")
                click.echo(f"attacked {times}")

            return attack

    monkeypatch.setattr(audit_cli, "_tool", lambda name: Point() if name == "attack" else None)
    assert run("audit", "attack", "--times", 2)[:2] == (0, "attacked 2\n")
    assert failed(run, "audit", "attack", "--times", 3) == (6, "privacy.attack")
    monkeypatch.setattr(audit_cli, "_tool", lambda name: None)
    assert run("audit", "attack")[0] == 2
    assert "attack" not in typer.main.get_command(audit_cli.app).list_commands(
        click.Context(click.Command("audit"))
    )
