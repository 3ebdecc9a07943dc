"""A private study's rounds: encoding comes after the noise, and what escapes it is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from round_samples import RoundsAtSite, deciding_site, keyed_cohort, tiny_study
from strategy_samples import strategy_study
from test_strategy_words import PRIVACY

from consilium_client.encoding import LOST
from consilium_client.store import StudyStore
from consilium_client.training.mechanism import MechanismRun
from consilium_common.models.compression import decode
from consilium_common.models.registry import build_network, initial_weights
from consilium_common.models.weights import unpack
from consilium_common.study import Study

RATE = 0.5


def test_what_leaves_and_what_encoding_lost_are_together_what_the_mechanism_gave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    canonical = tiny_study(release="none").to_canonical()
    canonical["training"]["optimiser"] = {
        "name": "sgd",
        "learning_rate": RATE,
        "momentum": 0.0,
        "weight_decay": 0.0,
        "schedule": "constant",
    }
    canonical["federation"]["compression"] = {"encoding": "int8"}
    study = Study.model_validate(canonical)
    released: list[Any] = []
    step = MechanismRun.step

    def recorded(self: MechanismRun, *arguments: Any) -> Any:
        noisy = step(self, *arguments)
        released.append(noisy.numpy().copy())
        return noisy

    monkeypatch.setattr(MechanismRun, "step", recorded)
    rounds = RoundsAtSite(deciding_site(tmp_path / "site", study), study, keyed_cohort())
    model, out = tmp_path / "model", tmp_path / "out"
    model.write_bytes(rounds.weights)
    order = [name for name, _ in build_network(study).named_parameters()]

    def flat(tensors: dict[str, Any]) -> Any:
        return np.concatenate([tensors[name].ravel() for name in order]).astype(np.float64)

    start, carried = flat(initial_weights(study)), 0.0
    for number in range(2):
        decode(study, rounds.train(number).file, model, out)
        kept = unpack(StudyStore(rounds.site.home).kept(study.digest) or b"")
        arrived = unpack(out.read_bytes())
        lost = {name: kept.get(LOST + name, np.zeros_like(arrived[name])) for name in arrived}
        noised = start - RATE * np.sum(released, axis=0)
        np.testing.assert_allclose(flat(arrived) + flat(lost), noised + carried, atol=1e-5)
        assert np.abs(flat(lost)).max() > 1e-3
        carried = flat(lost)
        released.clear()


@pytest.mark.parametrize(
    ("strategy", "why"),
    [
        (
            "fedbn",
            "its normalisation layers stay at the site and are shaped by its patients without"
            " noise, and all that leaves is trained through them",
        ),
        (
            "fedrep",
            "its head is trained on the patients without noise, and the representation that"
            " leaves is trained through it",
        ),
    ],
)
def test_the_refusal_of_a_strategy_says_what_would_escape_the_noise(
    strategy: str, why: str
) -> None:
    whole = f"federation.strategy {strategy} is not possible in a private study: {why}"
    with pytest.raises(ValueError, match=rf"error, {re.escape(whole)} \["):
        strategy_study(strategy, privacy=PRIVACY)
