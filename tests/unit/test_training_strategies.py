"""Each strategy's steps at a site, against its paper's update rule written out in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from engine_samples import small_study
from hypothesis import given, settings
from hypothesis import strategies as st
from strategy_samples import (
    RATE,
    STEPS,
    Weights,
    close,
    gradient_of,
    one_image_cohort,
    start_of,
    strategy_study,
)

from consilium_client.training import entropy
from consilium_client.training.mechanism import MechanismRun
from consilium_client.training.round import TrainResult
from consilium_client.training.session import TrainingSession
from consilium_common.errors import ConsiliumError
from consilium_common.models.exchange import (
    CONTROL,
    kept_specs,
    received_specs,
    sent_specs,
    steps_of,
)
from consilium_common.models.registry import NETWORKS, initial_weights, tensor_specs, trained_specs
from consilium_common.study import Study

PRIVACY: dict[str, Any] = {
    "mode": "patient",
    "sampling_rate": 1.0,
    "clip_norm": 0.5,
    "noise_multiplier": 0.5,
    "delta": 1e-3,
}
STRATEGIES: dict[str, Any] = {
    "fedavg": "fedavg",
    "fedprox": {"name": "fedprox", "mu": 2.0},
    "scaffold": "scaffold",
    "fedbn": "fedbn",
    "fedrep": {"name": "fedrep", "head_share": 0.34},
    "ditto": {"name": "ditto", "pull": 2.0},
    "fedadam": "fedadam",
}


def session_of(study: Study, seed: int = 0) -> TrainingSession:
    return TrainingSession(study, one_image_cohort(seed), device="cpu")


def equal(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[n], other[n]) for n in one)


def walked(start: Weights, gradient: Any, extra: Any, steps: int = STEPS) -> Weights:
    """Return where plain SGD along gradient + extra leads."""
    weights = dict(start)
    for _ in range(steps):
        found = gradient(weights)
        weights |= {name: weights[name] - RATE * (found[name] + extra(name, weights[name]))
                    for name in found}  # fmt: skip
    return weights


# --- the papers' rules --------------------------------------------------------------------------


def test_fedprox_adds_the_pull_towards_the_global_model() -> None:
    study = strategy_study(STRATEGIES["fedprox"])
    start = initial_weights(study)
    found = session_of(study).train(start, 0, 1).tensors
    expected = walked(start, gradient_of(study), lambda name, w: 2.0 * (w - start[name]))
    assert close(found, expected)
    free = session_of(strategy_study()).train(start, 0, 1).tensors
    assert not close(found, free)


def test_scaffold_follows_option_two_over_rounds_and_sites() -> None:
    study = strategy_study("scaffold")
    names = [spec.name for spec in trained_specs(study)]
    sessions = [session_of(study, seed) for seed in (0, 1)]
    gradients = [gradient_of(study, seed) for seed in (0, 1)]
    kept: list[Weights] = [{}, {}]
    x: Weights = initial_weights(study)
    c = {name: np.zeros_like(x[name]) for name in names}
    own = [dict(c), dict(c)]
    for number in range(3):
        sent_down = x | {CONTROL + name: c[name] for name in names}
        ends, changes = [], []
        for i in range(2):
            result = sessions[i].train(sent_down, number, 1, kept=kept[i])
            kept[i] = result.kept
            drift = {name: c[name] - own[i][name] for name in names}
            y = walked(x, gradients[i], lambda name, _, drift=drift: drift[name])
            fresh = {n: own[i][n] - c[n] + (x[n] - y[n]) / (STEPS * RATE) for n in names}
            change = {CONTROL + n: fresh[n] - own[i][n] for n in names}
            assert close(result.tensors, {n: y[n] for n in names} | change)
            assert close(result.kept, {CONTROL + n: fresh[n] for n in names})
            own[i] = fresh
            ends.append(y)
            changes.append(change)
        x = {n: np.mean([y[n] for y in ends], axis=0, dtype=np.float32) for n in x}
        c = {n: c[n] + np.mean([d[CONTROL + n] for d in changes], axis=0) for n in names}
        c = {n: value.astype(np.float32) for n, value in c.items()}


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_fedbn_begins_with_the_sites_own_normalisation_and_sends_all_else(norm: str) -> None:
    study = strategy_study("fedbn", norm=norm)
    start = initial_weights(study)
    session = session_of(study)
    first = session.train(start, 0, 1)
    own = set(first.kept)
    # In MONAI's blocks every normalisation is called N.
    assert own == {spec.name for spec in trained_specs(study) if ".N." in spec.name}
    assert (norm == "batch") == any("running" in name for name in own)
    plain = strategy_study("fedavg", norm=norm)
    reference = session_of(plain).train(start, 0, 1).tensors
    assert equal(first.tensors | first.kept, reference)
    # The second round: what the others made of the shared part, and its own of the rest.
    shared = {name: value * np.float32(0.9) for name, value in first.tensors.items()}
    second = session.train(start | shared, 1, 1, kept=first.kept)
    reference = session_of(plain).train(start | shared | first.kept, 1, 1).tensors
    assert equal(second.tensors | second.kept, reference)
    assert own.isdisjoint(second.tensors)


def test_fedrep_trains_the_head_first_and_then_the_rest() -> None:
    study = strategy_study(STRATEGIES["fedrep"])
    start = initial_weights(study)
    result = session_of(study).train(start, 0, 1)
    gradient = gradient_of(study)
    head = set(result.kept)
    assert 0 < len(head) <= 2
    assert head.isdisjoint(result.tensors)
    weights = dict(start)
    for step in range(STEPS):  # a third of three steps are the head's
        found = gradient(weights)
        moving = head if step < 1 else found.keys() - head
        weights |= {name: weights[name] - RATE * found[name] for name in moving}
    assert close(result.tensors | result.kept, weights)


def test_fedrep_leaves_everything_trained_for_the_next_round() -> None:
    study = strategy_study({"name": "fedrep", "head": ["*.N.*"]})
    session = session_of(study)
    first = session.train(initial_weights(study), 0, 1)
    assert all(".N." in name for name in first.kept)
    assert equal(session.train(initial_weights(study), 0, 1).tensors, first.tensors)


def test_ditto_pulls_its_personal_model_and_sends_fedavgs_update() -> None:
    study = strategy_study(STRATEGIES["ditto"])
    start = initial_weights(study)
    session = session_of(study)
    first = session.train(start, 0, 1)
    gradient = gradient_of(study)
    assert close(first.tensors, walked(start, gradient, lambda *_: 0.0))
    assert close(first.kept, walked(start, gradient, lambda n, v: 2.0 * (v - start[n])))
    moved = {name: value * np.float32(0.8) for name, value in start.items()}
    second = session.train(moved, 1, 1, kept=first.kept)
    assert close(second.kept, walked(first.kept, gradient, lambda n, v: 2.0 * (v - moved[n])))
    assert equal(second.tensors, session_of(strategy_study()).train(moved, 1, 1).tensors)


def test_a_personal_model_that_diverges_stays_as_it_was_and_the_update_leaves() -> None:
    study = strategy_study({"name": "ditto", "pull": 100.0})  # 10 a step, and growing
    study = study.model_copy(
        update={"training": study.training.model_copy(update={"steps_per_round": 60})}
    )
    start = initial_weights(study)
    far = {name: value + np.float32(1e4) for name, value in start.items()}
    result = session_of(study).train(start, 0, 1, kept=far)
    assert result.kept == {}
    assert set(result.tensors) == set(start)


# --- what leaves, what stays --------------------------------------------------------------------


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_study_alone_says_what_leaves_and_what_is_kept(name: str) -> None:
    study = strategy_study(STRATEGIES[name], norm="batch")
    start = start_of(study)
    assert {s.name: s.shape for s in received_specs(study)} == {
        n: a.shape for n, a in start.items()
    }
    result = session_of(study).train(start, 0, 1)
    assert {s.name: s.shape for s in sent_specs(study)} == {
        n: a.shape for n, a in result.tensors.items()
    }
    assert {s.name: s.shape for s in kept_specs(study)} == {
        n: a.shape for n, a in result.kept.items()
    }
    whole = {spec.name for spec in tensor_specs(study)}
    assert {n for n in result.tensors if not n.startswith(CONTROL)} <= whole


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_same_study_twice_gives_the_same_bytes(name: str) -> None:
    study = strategy_study(
        STRATEGIES[name],
        dropout=0.3,
        training={"augmentation": {"flip": 0.5, "noise": 0.2}, "optimiser": {"name": "adamw"}},
    )

    def twice() -> TrainResult:
        session = session_of(study)
        start = start_of(study)
        first = session.train(start, 0, 1)
        return session.train(start, 1, 1, kept=first.kept)

    torch.manual_seed(1)
    one = twice()
    torch.manual_seed(2)
    other = twice()
    assert equal(one.tensors, other.tensors)
    assert equal(one.kept, other.kept)


@pytest.mark.parametrize("strategy", ["fedbn", "fedrep"])
@pytest.mark.parametrize("network", NETWORKS)
def test_every_network_has_a_part_of_its_own_and_a_part_to_share(
    network: str, strategy: str
) -> None:
    value = small_study(network, 2).to_canonical()
    value["federation"]["strategy"] = STRATEGIES[strategy]
    study = Study.model_validate(value)
    own, shared = set(kept_specs(study)), set(sent_specs(study))
    assert own
    assert shared
    assert own.isdisjoint(shared)
    assert own | shared == set(trained_specs(study))


def test_scaffold_without_its_control_variate_is_refused() -> None:
    study = strategy_study("scaffold")
    with pytest.raises(ConsiliumError, match=r"run\.bad-update"):
        session_of(study).train(initial_weights(study), 0, 1)
    with pytest.raises(ConsiliumError, match=r"run\.bad-update"):
        session_of(strategy_study()).train(start_of(study), 0, 1)


@pytest.mark.parametrize(
    ("strategy", "trainable", "word"),
    [
        ({"name": "fedrep", "head": ["nothing.*"]}, "all", "nothing that is trained matches"),
        ({"name": "fedrep", "head": ["*"]}, "all", "share nothing"),
        ("fedbn", ["*conv*"], "leave nothing"),
        ("fedbn", ["*.N.*"], "share nothing"),
        ("fedrep", ["*.N.*"], "is not trained"),
    ],
)
def test_a_strategy_that_does_not_fit_the_network_is_refused(
    strategy: Any, trainable: Any, word: str
) -> None:
    study = strategy_study(strategy, model={"trainable": trainable})
    for use in (sent_specs, kept_specs, received_specs, session_of):
        with pytest.raises(ConsiliumError, match=word) as caught:
            use(study)
        assert caught.value.code == "study.strategy"
        assert caught.value.hint


def test_fedrep_needs_two_steps() -> None:
    with pytest.raises(ValueError, match="at least 2 with fedrep"):
        strategy_study("fedrep", training={"steps_per_round": 1})
    tiny = strategy_study("fedrep", training={"epochs_per_round": 1})
    result = session_of(tiny).train(initial_weights(tiny), 0, 1)  # an epoch of one step
    start = initial_weights(tiny)
    assert equal(result.kept, {name: start[name] for name in result.kept})
    assert not equal(result.tensors, {name: start[name] for name in result.tensors})


# --- epochs --------------------------------------------------------------------------------------


@given(epochs=st.integers(1, 20), cohort=st.integers(1, 5000), batch=st.integers(1, 256))
@settings(max_examples=50, deadline=None)
def test_epochs_pass_over_the_whole_declared_cohort_and_no_step_further(
    epochs: int, cohort: int, batch: int
) -> None:
    study = strategy_study(training={"epochs_per_round": epochs, "batch_size": batch})
    steps = steps_of(study, cohort)
    assert steps % epochs == 0
    assert (steps // epochs - 1) * batch < cohort <= steps // epochs * batch
    assert steps_of(strategy_study(training={"steps_per_round": 7}), cohort) == 7


def test_epochs_make_steps_of_the_declared_cohort_and_progress_follows() -> None:
    study = strategy_study(training={"epochs_per_round": 2, "batch_size": 4})
    told: list[tuple[int, int]] = []
    session_of(study).train(initial_weights(study), 0, 9, lambda *step: told.append(step))
    assert told == [(step, 6) for step in range(1, 7)]  # 2 · ⌈9/4⌉
    ditto = strategy_study(STRATEGIES["ditto"], training={"epochs_per_round": 2, "batch_size": 4})
    told.clear()
    session_of(ditto).train(initial_weights(study), 0, 4, lambda *step: told.append(step))
    assert told == [(step, 4) for step in range(1, 5)]


def test_the_cosine_falls_over_the_epochs_of_the_declared_cohort() -> None:
    changes = {"epochs_per_round": 1, "optimiser": {"name": "sgd", "learning_rate": RATE}}
    study = strategy_study(training=changes)
    start = initial_weights(study)

    def moved(number: int, declared: int) -> float:
        tensors = session_of(study).train(start, number, declared).tensors
        return float(sum(np.abs(tensors[n] - start[n]).sum() for n in start))

    # The last of four rounds moves little, however many steps a round has.
    assert moved(3, 2) < 0.5 * moved(0, 2)
    assert moved(3, 6) < 0.5 * moved(0, 6)


# --- with privacy --------------------------------------------------------------------------------


@pytest.fixture
def released(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """Record every noisy gradient that a private round releases."""
    found: list[np.ndarray] = []
    step = MechanismRun.step

    def recorded(self: MechanismRun, *arguments: Any) -> Any:
        noisy = step(self, *arguments)
        found.append(noisy.numpy().copy())
        return noisy

    monkeypatch.setattr(MechanismRun, "step", recorded)
    return found


def flat(study: Study, weights: Weights) -> np.ndarray:
    from consilium_common.models.registry import build_network

    order = [name for name, _ in build_network(study).named_parameters()]
    return np.concatenate([weights[name].ravel() for name in order])


def test_in_a_private_study_the_pull_comes_after_clipping_and_noise(
    released: list[np.ndarray],
) -> None:
    # A pull far above the clip norm: if it were clipped with the patients' gradients, or were
    # noised, the steps below could not be walked from the released gradients alone.
    study = strategy_study({"name": "fedprox", "mu": 5.0}, privacy=PRIVACY)
    start = initial_weights(study)
    result = session_of(study).train(start, 0, 4)
    origin = w = flat(study, start).astype(np.float64)
    for noisy in released:
        w = w - RATE * (noisy + 5.0 * (w - origin))
    assert len(released) == STEPS
    assert np.allclose(flat(study, result.tensors), w, atol=1e-5)


def test_in_a_private_study_the_control_variate_is_made_of_noised_gradients_alone(
    released: list[np.ndarray],
) -> None:
    study = strategy_study("scaffold", privacy=PRIVACY)
    rng = np.random.default_rng(0)
    control = {
        CONTROL + s.name: rng.standard_normal(s.shape).astype("f4") for s in trained_specs(study)
    }
    start = start_of(study, control)
    own = {name: (value * 0.5).astype("f4") for name, value in control.items()}
    result = session_of(study).train(start, 0, 4, kept=own)
    bare = {name: value for name, value in start.items() if not name.startswith(CONTROL)}
    c = flat(study, {name: control[CONTROL + name] for name in bare})
    w = flat(study, bare).astype(np.float64)
    for noisy in released:
        w = w - RATE * (noisy + c - 0.5 * c)
    assert np.allclose(flat(study, {n: result.tensors[n] for n in bare}), w, atol=1e-5)
    fresh = flat(study, {n: result.kept[CONTROL + n] for n in bare})
    assert np.allclose(fresh, np.mean(released, axis=0), atol=1e-5)
    sent = flat(study, {n: result.tensors[CONTROL + n] for n in bare})
    assert np.allclose(sent, fresh - 0.5 * c, atol=1e-5)


def test_in_a_private_study_dittos_update_is_fedavgs_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def updates(strategy: Any, kept: Weights | None) -> tuple[list[Weights], Weights]:
        stream = np.random.default_rng(5)
        monkeypatch.setattr(entropy, "_keystream", stream.bytes)  # the same noise for both
        torch.manual_seed(3)  # and the same dropout
        study = strategy_study(strategy, privacy=PRIVACY, dropout=0.4)
        session = session_of(study)
        weights, sent = initial_weights(study), []
        for number in range(3):
            result = session.train(weights, number, 4, kept=kept)
            kept = result.kept
            weights = weights | result.tensors
            sent.append(result.tensors)
        return sent, result.kept

    plain, nothing = updates("fedavg", None)
    personal, own = updates(STRATEGIES["ditto"], None)
    assert nothing == {}
    assert own.keys() == plain[0].keys()
    assert all(equal(one, other) for one, other in zip(plain, personal, strict=True))
    assert not np.allclose(own[next(iter(own))], personal[-1][next(iter(own))])
    # Not even a personal model that runs away shows: a failure would be told to the aggregator.
    broken = {name: np.full_like(value, 1e30) for name, value in own.items()}
    again, _ = updates(STRATEGIES["ditto"], broken)
    assert all(equal(one, other) for one, other in zip(plain, again, strict=True))


@pytest.mark.parametrize("name", ["fedbn", "fedrep"])
def test_strategies_that_train_a_part_without_noise_are_no_private_study(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is not possible in a private study"):
        strategy_study(STRATEGIES[name], privacy=PRIVACY)
