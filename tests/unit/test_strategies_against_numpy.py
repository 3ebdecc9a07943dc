"""Every strategy does what its paper says: against a second, plain implementation on vectors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aggregation_samples import Model, Rounds, study_of
from numpy.typing import NDArray
from pydantic import ValidationError

from consilium_common.errors import ConsiliumError
from consilium_common.models.exchange import CONTROL
from consilium_common.models.weights import unpack
from consilium_common.study import strategies
from consilium_server.aggregation.registry import RULES

Vector = NDArray[np.float64]
#: What came in a round: the model, the sites' models as rows, their weights, their steps.
Reference = Callable[[Vector, Vector, Vector, Vector], Vector]

WEIGHTS = (3.0, 1.0, 7.0, 2.0, 5.0)
STEPS = (4, 1, 9, 2, 6)


def vector(tensors: Model, prefix: str = "") -> Vector:
    """Return the tensors whose name begins with the prefix, or that have none, end to end."""
    names = sorted(n for n in tensors if n.startswith(prefix or "model."))
    return np.concatenate([tensors[name].astype(np.float64).ravel() for name in names])


# --- the second implementations ------------------------------------------------------------------


def weighted(x: Vector, rows: Vector, w: Vector, steps: Vector) -> Vector:
    return np.average(rows, axis=0, weights=w)


def momentum(rate: float, beta: float) -> Reference:
    changes: list[Vector] = []

    def step(x: Vector, rows: Vector, w: Vector, steps: Vector) -> Vector:
        # Unrolled: the velocity is the sum of all changes so far, each β once a round.
        changes.append(np.average(rows, axis=0, weights=w) - x)
        last = len(changes) - 1
        return x + rate * sum(beta ** (last - t) * change for t, change in enumerate(changes))

    return step


def adam(rate: float, b1: float, b2: float, tau: float) -> Reference:
    changes: list[Vector] = []

    def step(x: Vector, rows: Vector, w: Vector, steps: Vector) -> Vector:
        changes.append(np.average(rows, axis=0, weights=w) - x)
        n = len(changes)
        m = sum((1 - b1) * b1 ** (n - 1 - t) * d for t, d in enumerate(changes))
        v = sum((1 - b2) * b2 ** (n - 1 - t) * d * d for t, d in enumerate(changes))
        return x + rate * np.sqrt(1 - b2**n) / (1 - b1**n) * m / (np.sqrt(v) + tau)

    return step


def yogi(rate: float, b1: float, b2: float, tau: float) -> Reference:
    kept = {"m": np.zeros(1), "v": np.zeros(1)}

    def step(x: Vector, rows: Vector, w: Vector, steps: Vector) -> Vector:
        d = np.average(rows, axis=0, weights=w) - x
        kept["m"] = b1 * kept["m"] + (1 - b1) * d
        grows = kept["v"] < d * d
        by = (1 - b2) * d * d
        kept["v"] = np.where(grows, kept["v"] + by, kept["v"] - by)
        return x + rate * kept["m"] / (np.sqrt(kept["v"]) + tau)

    return step


def adagrad(rate: float, tau: float) -> Reference:
    changes: list[Vector] = []

    def step(x: Vector, rows: Vector, w: Vector, steps: Vector) -> Vector:
        changes.append(np.average(rows, axis=0, weights=w) - x)
        return x + rate * changes[-1] / (np.linalg.norm(changes, axis=0) + tau)

    return step


def nova(x: Vector, rows: Vector, w: Vector, steps: Vector) -> Vector:
    p = w / w.sum()
    gradients = [(x - row) / tau for row, tau in zip(rows, steps, strict=True)]
    direction = np.sum([share * g for share, g in zip(p, gradients, strict=True)], axis=0)
    return x - (p @ steps) * direction


def median(x: Vector, rows: Vector, w: Vector, steps: Vector) -> Vector:
    columns = [sorted(column) for column in rows.T.tolist()]
    n = len(rows)
    return np.array([(c[(n - 1) // 2] + c[n // 2]) / 2 for c in columns])


def trimmed(trim: float) -> Reference:
    def step(x: Vector, rows: Vector, w: Vector, steps: Vector) -> Vector:
        from scipy.stats import trim_mean

        return np.asarray(trim_mean(rows, trim, axis=0))

    return step


def krum(hostile: int, kept: int) -> Reference:
    def step(x: Vector, rows: Vector, w: Vector, steps: Vector) -> Vector:
        n = len(rows)
        scores = []
        for i in range(n):
            others = sorted(float(np.sum((rows[i] - rows[j]) ** 2)) for j in range(n) if j != i)
            scores.append((sum(others[: n - hostile - 2]), i))
        chosen = [i for _, i in sorted(scores)[:kept]]
        return np.average(rows[chosen], axis=0, weights=w[chosen])

    return step


def geometric(iterations: int, smoothing: float) -> Reference:
    def step(x: Vector, rows: Vector, w: Vector, steps: Vector) -> Vector:
        z = np.average(rows, axis=0, weights=w)
        for _ in range(iterations):
            beta = w / np.maximum(smoothing, np.linalg.norm(rows - z, axis=1))
            z = np.average(rows, axis=0, weights=beta)
        return z

    return step


def cases() -> list[tuple[dict[str, Any], Reference]]:
    return [
        ({"name": "fedavg"}, weighted),
        ({"name": "fedprox"}, weighted),
        ({"name": "ditto"}, weighted),
        ({"name": "fedbn"}, weighted),
        ({"name": "fedrep"}, weighted),
        (
            {"name": "fedavgm", "server_learning_rate": 0.7, "server_momentum": 0.8},
            momentum(0.7, 0.8),
        ),
        (
            {"name": "fedadam", "server_learning_rate": 0.3, "beta1": 0.8, "tau": 0.01},
            adam(0.3, 0.8, 0.99, 0.01),
        ),
        ({"name": "fedyogi", "server_learning_rate": 0.3}, yogi(0.3, 0.9, 0.99, 1e-3)),
        ({"name": "fedadagrad", "server_learning_rate": 0.2}, adagrad(0.2, 1e-3)),
        ({"name": "fednova"}, nova),
        ({"name": "median"}, median),
        ({"name": "trimmed-mean", "trim": 0.25}, trimmed(0.25)),
        ({"name": "krum", "hostile": 1}, krum(1, 1)),
        ({"name": "multi-krum", "hostile": 1}, krum(1, 4)),
        ({"name": "multi-krum", "hostile": 1, "kept": 2}, krum(1, 2)),
        ({"name": "geometric-median", "iterations": 7}, geometric(7, 1e-6)),
    ]


@pytest.mark.parametrize(
    ("strategy", "reference"), cases(), ids=lambda v: v["name"] if isinstance(v, dict) else ""
)
def test_three_rounds_give_what_the_paper_says(
    tmp_path: Path, strategy: dict[str, Any], reference: Reference
) -> None:
    rounds = Rounds(tmp_path, study_of(strategy), weights=WEIGHTS)
    shared = {spec.name for spec in rounds.shared}
    for index in range(3):
        before = rounds.tensors
        sent = rounds.drifted(5, seed=index + 1, scale=0.1 * (index + 1))
        rounds.round(sent, steps=STEPS)
        expected = reference(
            vector({n: t for n, t in before.items() if n in shared}),
            np.array([vector(tensors) for tensors in sent]),
            np.array(WEIGHTS),
            np.array(STEPS, dtype=np.float64),
        )
        after = rounds.tensors
        found = vector({n: t for n, t in after.items() if n in shared})
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)
        for name in before.keys() - shared:
            np.testing.assert_array_equal(after[name], before[name])


def test_scaffold_moves_the_model_and_the_control_variate(tmp_path: Path) -> None:
    strategy = {"name": "scaffold", "server_learning_rate": 0.5}
    rounds = Rounds(tmp_path, study_of(strategy, weighting="uniform"), weights=[1.0] * 3)
    control = np.zeros_like(vector(rounds.tensors))
    for index in range(3):
        before = vector(rounds.tensors)
        sent = rounds.drifted(3, seed=index + 1)
        rounds.round(sent, sites=12)
        # Algorithm 1, lines 16 and 17; three of twelve sites were asked.
        expected = before + 0.5 / 3 * sum(vector(one) - before for one in sent)
        control = control + sum(vector(one, CONTROL) for one in sent) / 12
        np.testing.assert_allclose(vector(rounds.tensors), expected, rtol=1e-5, atol=1e-6)
        assert rounds.state is not None
        kept = vector(unpack(rounds.state.read_bytes()), CONTROL)
        np.testing.assert_allclose(kept, control, rtol=1e-5, atol=1e-6)


def test_scaffold_keeps_the_weighted_mean_of_the_sites_control_variates(tmp_path: Path) -> None:
    # With all sites in every round, c is Σ pᵢ cᵢ: the corrections c − cᵢ of all sites cancel.
    rounds = Rounds(tmp_path, study_of("scaffold"), weights=WEIGHTS[:3])
    own = np.zeros((3, vector(rounds.tensors).size))
    for index in range(4):
        sent = rounds.drifted(3, seed=index + 1)
        own += np.array([vector(one, CONTROL) for one in sent])
        rounds.round(sent, sites=3)
    assert rounds.state is not None
    kept = vector(unpack(rounds.state.read_bytes()), CONTROL)
    np.testing.assert_allclose(kept, np.average(own, axis=0, weights=WEIGHTS[:3]), atol=1e-6)


def test_cyclic_takes_the_one_model_bit_for_bit(tmp_path: Path) -> None:
    rounds = Rounds(tmp_path, study_of("cyclic"), weights=[17.0])
    (sent,) = rounds.drifted(1)
    rounds.round([sent])
    for name, tensor in sent.items():
        np.testing.assert_array_equal(rounds.tensors[name], tensor)


def test_buffered_counts_old_changes_less_and_against_the_model_they_began_from(
    tmp_path: Path,
) -> None:
    study = study_of(buffered={"size": 3, "server_learning_rate": 0.5})
    rounds = Rounds(tmp_path, study)
    start = rounds.model
    rounds.round(rounds.drifted(3))
    now, then = vector(rounds.tensors), vector(unpack(start.read_bytes()))
    fresh, stale = rounds.drifted(2, seed=5)
    first, second = rounds.updates([fresh, stale])
    rounds.aggregate([first, replace(second, base=start, staleness=3)])
    found = vector(unpack((tmp_path / "model-2.safetensors").read_bytes()))
    # Weights 1 and 2; a staleness of 3 counts half.
    expected = now + 0.5 * ((vector(fresh) - now) + 2 * 0.5 * (vector(stale) - then)) / 3
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


ROBUST = ["median", "trimmed-mean", "krum", "multi-krum", "geometric-median"]


@pytest.mark.parametrize("strategy", ROBUST)
def test_one_hostile_site_of_seven_moves_a_robust_mean_little_and_a_plain_one_far(
    tmp_path: Path, strategy: str
) -> None:
    moved = {}
    for name in (strategy, "fedavg"):
        folder = tmp_path / name
        folder.mkdir()
        rounds = Rounds(folder, study_of(name), weights=[1.0] * 7)
        sent = rounds.drifted(7, scale=0.01)
        before = vector(rounds.tensors)
        sent[3] = {n: np.full_like(t, -1e6) for n, t in sent[3].items()}
        rounds.round(sent)
        moved[name] = np.linalg.norm(vector(rounds.tensors) - before)
    honest = 0.01 * np.sqrt(before.size)
    assert moved[strategy] < 3 * honest
    assert moved["fedavg"] > 1e6 * honest


def test_the_geometric_median_has_the_least_sum_of_distances(tmp_path: Path) -> None:
    settings = {"name": "geometric-median", "iterations": 100}
    rounds = Rounds(tmp_path, study_of(settings), weights=[1.0] * 5)
    sent = rounds.drifted(5, scale=1.0)
    rows = np.array([vector(one) for one in sent])
    rounds.round(sent)

    def total(z: Vector) -> float:
        return float(np.linalg.norm(rows - z, axis=1).sum())

    found = vector(rounds.tensors)
    rng = np.random.default_rng(0)
    near = [found + scale * rng.normal(size=found.size) for scale in (0.01, 0.1) for _ in range(20)]
    assert all(total(found) <= total(z) for z in [*near, *rows, rows.mean(axis=0)])


@pytest.mark.parametrize(("strategy", "kept"), [("krum", 1), ("multi-krum", 4)])
def test_krum_names_whose_updates_it_passed_over(tmp_path: Path, strategy: str, kept: int) -> None:
    rounds = Rounds(tmp_path, study_of({"name": strategy, "hostile": 1}))
    sent = rounds.drifted(5)
    sent[1] = rounds.drifted(1, seed=2, scale=50.0)[0]
    combined = rounds.round(sent)
    assert len(combined.kept) == 5
    chosen = [site for site in combined.kept if site not in combined.passed_over]
    assert len(chosen) == kept
    assert "site-01" in combined.passed_over
    # The model is made of the others alone.
    rows = np.stack([vector(one) for one in sent])[[combined.kept.index(site) for site in chosen]]
    weights = [combined.kept.index(site) + 1.0 for site in chosen]
    np.testing.assert_allclose(
        vector(rounds.tensors), np.average(rows, axis=0, weights=weights), rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("strategy", ["krum", "multi-krum"])
def test_krum_with_too_few_sites_says_how_many_it_needs(tmp_path: Path, strategy: str) -> None:
    rounds = Rounds(tmp_path, study_of({"name": strategy, "hostile": 2}))
    with pytest.raises(ConsiliumError) as caught:
        rounds.round(rounds.drifted(6))
    assert caught.value.code == "run.quorum"
    assert "7" in caught.value.message
    # A study that could never have enough is refused before it is proposed.
    with pytest.raises(ValidationError, match="quorum: 7"):
        study_of({"name": strategy, "hostile": 2}, quorum=6)


def test_every_strategy_that_a_study_may_name_is_there() -> None:
    def name_of(strategy: type[Any]) -> str:
        return str(strategy.model_fields["name"].annotation.__args__[0])

    assert {name_of(one) for one in strategies.ALL} == set(RULES)
    tested = {case["name"] for case, _ in cases()}
    assert set(RULES) - tested == {"scaffold", "cyclic"}
    assert all(one.paper for one in strategies.ALL)
