"""``consilium audit attack``: attacks the installed code and prints what it could refute."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from consilium_common.console import command, note, result

if TYPE_CHECKING:
    from rich.console import Console

    from consilium_client.auditing.attack import AttackReport
    from consilium_client.auditing.one_run import OneRun

_EXAMPLE = "hippocampus-private"


@command
def attack(
    study: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Private study whose mechanism and network are attacked (default: a shipped one).",
        ),
    ] = None,
    confidence: Annotated[
        float, typer.Option(help="Confidence of the lower bounds of ε, 0.5 to below 1.")
    ] = 0.95,
    canaries: Annotated[
        int | None, typer.Option(help="Canaries of the one-run audit (default: 1000; quick: 400).")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few seconds: finds gross faults only.")
    ] = False,
) -> None:
    """Attack the privacy code installed here with made-up patients; no data is read.

    Exit status 6 when an attack refutes what the code claims.
    """
    from dataclasses import replace

    from consilium_client.auditing.attack import QUICK, Effort
    from consilium_client.auditing.attack import attack as attack_subject
    from consilium_client.auditing.network import NetworkPatients
    from consilium_client.auditing.subject import subject_of
    from consilium_common.study.examples import example_study
    from consilium_common.study.load import load_study

    effort = QUICK if quick else Effort()
    if canaries is not None:
        effort = replace(effort, canaries=canaries)
    loaded = load_study(example_study(_EXAMPLE) if study is None else study)
    subject = subject_of(loaded)
    note(f"Attacking the installed code with the mechanism and network of {loaded.name} …")
    report = attack_subject(
        subject, effort, confidence=confidence, patients=NetworkPatients(loaded)
    )
    if report.refuted:
        from consilium_common.console import MODE, err

        if not MODE.json:
            _print(report, loaded.name, err())
        report.require_unrefuted()
    result({"study": loaded.name, **report.to_dict()}, lambda out: _print(report, loaded.name, out))


def _print(report: AttackReport, name: str, console: Console) -> None:
    from consilium_client.auditing.attack import FALSE_ALARM, expected
    from consilium_client.auditing.one_run import RUN_FALSE_ALARM

    claim = report.subject.parameters
    console.print(
        f"Attack on the installed code, with the mechanism of {name}: unit patient, adjacency add "
        f"or remove one,\nsampling rate {claim.sampling_rate:g}, clip norm {claim.clip_norm:g}, "
        f"noise multiplier {claim.noise_multiplier:g}, {report.subject.size:,} trained values;\n"
        f"gradient engine {report.engine}.\n",
        markup=False,
    )
    for check in report.checks:
        where = f" ({check.where})" if check.where else ""
        console.print(
            f"{'passed ' if check.passed else 'REFUTED'}  {check.question}\n"
            f"         {check.statistic}: {check.observed:.4g}{where}; expected {expected(check)}",
            markup=False,
        )
    console.print(_run_text(report.run), markup=False)
    for text in report.omitted:
        console.print(f"LEFT OUT {text}", markup=False)
    verdict = (
        f"These attacks REFUTE the claim: {', '.join(report.refuted)}."
        if report.refuted
        else "No attack refuted the claim."
    )
    console.print(
        f"\n{verdict}\n"
        "What this shows: code that adds less noise, forgets it somewhere, uses it twice, draws "
        "patients in another\nway, or lets one patient count for more, as far as these attacks "
        f"see it. Right code fails with a probability\nof at most {FALSE_ALARM:g} in all checks "
        f"together, and {RUN_FALSE_ALARM:g} in the run with canaries.\n"
        "What this does not show: that ε holds. An attack can refute a claim and never prove one; "
        "the proof is the\naccountant's, for the mechanism described. Nor does it look at what "
        "leaves the site by other ways, at code that\nknows it is being attacked, or at the "
        "quality of the system's entropy.",
        markup=False,
    )


def _run_text(run: OneRun) -> str:
    doubt = (
        "\n         That is above the claim, yet not beyond chance: run again with more canaries."
        if run.passed and run.lower_bound > run.claimed
        else ""
    )
    return (
        f"{'passed ' if run.passed else 'REFUTED'}  What does one run of {run.event.steps} steps "
        f"tell about {run.canaries} canaries?\n"
        f"         claimed ε {run.claimed:.2f} at δ = {run.delta:g}; at least "
        f"{run.lower_bound:.2f} at {run.confidence:.0%} confidence ({run.correct} of "
        f"{run.guesses} guesses right);\n         Gaussian estimate {run.estimate:.2f} "
        f"({run.estimate_low:.2f} to {run.estimate_high:.2f}; no proof). "
        f"So many canaries can refute claims below {run.reach:.2f} at most.{doubt}"
    )
