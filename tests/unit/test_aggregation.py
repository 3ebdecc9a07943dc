"""Aggregation takes exactly the good updates, in any order, in flat memory, and says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aggregation_samples import Model, Rounds, study_of
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from consilium_common.errors import ConsiliumError
from consilium_common.models.exchange import CONTROL, received_specs
from consilium_common.models.weights import TensorSpec, pack, unpack
from consilium_server.aggregation import (
    SiteUpdate,
    check_update,
    cohort_weights,
    offered,
    running_average,
)
from consilium_server.aggregation.ordering import median, ordered
from consilium_server.aggregation.registry import RULES
from consilium_server.aggregation.updates import Updates


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- the mean ------------------------------------------------------------------------------------


def test_one_update_comes_back_bit_for_bit(tmp_path: Path) -> None:
    rounds = Rounds(tmp_path, study_of(), weights=[123.0])
    (sent,) = rounds.drifted(1)
    rounds.round([sent])
    for name, tensor in sent.items():
        np.testing.assert_array_equal(rounds.tensors[name], tensor)


@pytest.mark.parametrize(
    "settled",
    [
        *({"strategy": name} for name in sorted(RULES)),
        {"screening": {"clip_norm": 1.4, "cosine": 0.0}},
        {"buffered": {"size": 7}},
    ],
    ids=lambda settled: "-".join(map(str, settled.values())),
)
def test_the_order_of_arrival_changes_no_bit(tmp_path: Path, settled: dict[str, Any]) -> None:
    made = Rounds(tmp_path, study_of(**settled))
    updates = made.updates(made.drifted(7), steps=[3, 1, 4, 1, 5, 9, 2])

    @settings(max_examples=5, deadline=None)
    @given(st.permutations(updates))
    def check(arrived: list[SiteUpdate]) -> None:
        made.aggregate(arrived)
        found.add((tmp_path / "model-1.safetensors").read_bytes())

    found: set[bytes] = set()
    check()
    assert len(found) == 1


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10**6), st.floats(0.5, 1e4)), min_size=1, max_size=8))
def test_it_is_the_weighted_mean(sites: list[tuple[int, float]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        rounds = Rounds(Path(folder), study_of(), weights=[weight for _, weight in sites])
        sent = [rounds.drifted(1, seed=seed + 1, scale=10.0)[0] for seed, _ in sites]
        combined = rounds.round(sent)
        assert len(combined.kept) == len(sites)
        for name, tensor in rounds.tensors.items():
            stacked = np.stack([one[name].astype(np.float64) for one in sent])
            expected = np.average(stacked, axis=0, weights=rounds.weights)
            np.testing.assert_allclose(tensor, expected, rtol=1e-6, atol=1e-6)


def test_weights_are_the_declared_cohorts_or_equal() -> None:
    cohorts = {"north": 30, "south": 5}
    assert cohort_weights(cohorts, "cohort") == {"north": 30.0, "south": 5.0}
    assert cohort_weights(cohorts, "uniform") == {"north": 1.0, "south": 1.0}


# --- what is left out ----------------------------------------------------------------------------


def spoilt(rounds: Rounds, good: Model) -> dict[str, bytes]:
    """Return bad updates, by what is wrong with them."""
    name = next(iter(good))
    other = next(n for n in good if good[n].ndim > 1)
    nan, infinite = dict(good), dict(good)
    nan[other] = good[other].copy()
    nan[other].flat[-1] = np.nan
    infinite[name] = np.full_like(good[name], -np.inf)
    return {
        "missing": pack({n: t for n, t in good.items() if n != name}),
        "foreign": pack({**good, "extra": good[name]}),
        "transposed": pack({**good, other: good[other].reshape(good[other].shape[::-1])}),
        "broadcast": pack({**good, other: good[other].reshape(-1)[:1]}),
        "empty": pack({}),
        "no tensors": b"\x80\x04N.",
        "no bytes": b"",
        "cut": pack(good)[:-4],
        "longer": pack(good) + b"hidden",
        "nan": pack(nan),
        "infinite": pack(infinite),
        "float64": save({**good, other: good[other].astype(np.float64)}),
    }


def test_bad_updates_are_left_out_named_and_change_nothing(tmp_path: Path) -> None:
    rounds = Rounds(tmp_path, study_of())
    sent = rounds.drifted(3)
    good = rounds.updates(sent)
    rounds.aggregate(good)
    expected = (tmp_path / "model-1.safetensors").read_bytes()
    bad = []
    for what, content in spoilt(rounds, sent[0]).items():
        path = tmp_path / f"bad {what}"
        path.write_bytes(content)
        with pytest.raises(ConsiliumError) as caught:
            check_update(rounds.study, path, rounds.model)
        assert caught.value.code == "run.bad-update", what
        bad.append(SiteUpdate(what, path, 1.0, 1))
    bad += [replace(good[0], site=f"weighs {w}", weight=w) for w in (0.0, -1.0, np.nan, np.inf)]
    bad += [replace(good[0], site="no steps", steps=0)]
    bad += [replace(good[0], site="gone", path=tmp_path / "nothing")]
    combined = rounds.aggregate([*bad, *good])
    assert combined.kept == tuple(update.site for update in good)
    assert set(combined.left_out) == {update.site for update in bad}
    assert all(why.startswith("run.bad-update: ") for why in combined.left_out.values())
    assert (tmp_path / "model-1.safetensors").read_bytes() == expected
    with pytest.raises(ConsiliumError) as caught:
        rounds.aggregate(bad)
    assert caught.value.code == "run.quorum"
    with pytest.raises(ValueError, match="two updates"):
        rounds.aggregate([good[0], good[0]])


def test_a_damaged_model_is_no_fault_of_the_sites(tmp_path: Path) -> None:
    rounds = Rounds(tmp_path, study_of())
    updates = rounds.updates(rounds.drifted(2))
    other = rounds.write("other", {"model.other": np.zeros(3, np.float32)})
    for model in (tmp_path / "gone", other, updates[0].path.rename(tmp_path / "moved")):
        if model.name == "moved":
            model.write_bytes(model.read_bytes()[:-1])
        with pytest.raises(ConsiliumError) as caught:
            check_update(rounds.study, updates[1].path, model)
        assert caught.value.code == "state.checkpoint"
        with pytest.raises(ConsiliumError) as caught:
            rounds.aggregate([replace(updates[1], base=model)])
        assert caught.value.code == "state.checkpoint"
        good, rounds.model = rounds.model, model
        with pytest.raises(ConsiliumError) as caught:
            rounds.aggregate([replace(updates[1], norm=1.0)])
        assert caught.value.code == "state.checkpoint"
        rounds.model = good


def test_the_norm_of_the_change_is_measured_bounded_and_clipped(tmp_path: Path) -> None:
    rounds = Rounds(tmp_path, study_of(screening={"norm_bound": 50.0, "clip_norm": 1.0}))
    model = rounds.tensors
    sent = [
        {n: (model[n] + scale * one[n] - scale * model[n]).astype(np.float32) for n in one}
        for scale, one in zip((0.1, 10.0, 1000.0), rounds.drifted(3), strict=True)
    ]
    norms = [np.sqrt(sum(np.sum((t - model[n]) ** 2.0) for n, t in one.items())) for one in sent]
    assert norms[0] < 1 < norms[1] < 50 < norms[2]
    updates = rounds.updates(sent)
    assert check_update(rounds.study, updates[0].path, rounds.model) == pytest.approx(norms[0])
    combined = rounds.round(sent)
    assert combined.kept == ("site-00", "site-01")
    assert "norm" in combined.left_out["site-02"]
    assert combined.norms["site-01"] == pytest.approx(norms[1], rel=1e-4)
    for name, tensor in rounds.tensors.items():
        clipped = model[name] + (sent[1][name] - model[name]) / norms[1]
        expected = (1 * sent[0][name] + 2 * clipped.astype(np.float64)) / 3
        np.testing.assert_allclose(tensor, expected, rtol=1e-4, atol=1e-5)
    # What was checked before is not read twice, and is bounded all the same.
    checked = [replace(one, norm=1e3) for one in updates[:1]]
    with pytest.raises(ConsiliumError, match="None of the 1"):
        rounds.aggregate(checked)


def test_cosine_screening_leaves_out_who_goes_the_other_way(tmp_path: Path) -> None:
    rounds = Rounds(tmp_path, study_of(screening={"cosine": 0.0}))
    model = rounds.tensors
    (towards,) = rounds.drifted(1, seed=9)
    noise = rounds.drifted(5, seed=2, scale=0.02)
    sent = [{n: towards[n] + one[n] - model[n] for n in one} for one in noise]
    sent[2] = {n: 2 * model[n] - t for n, t in sent[2].items()}
    combined = rounds.round(sent)
    assert combined.kept == ("site-00", "site-01", "site-03", "site-04")
    assert "cosine" in combined.left_out["site-02"]
    assert combined.cosines["site-02"] < -0.9
    assert all(combined.cosines[site] > 0.9 for site in combined.kept)
    # Where nobody moves there is no direction, and nobody goes against it.
    still = rounds.round([rounds.tensors] * 3)
    assert (len(still.kept), still.cosines) == (3, {})


def test_a_stale_update_is_left_out_of_a_buffered_study(tmp_path: Path) -> None:
    rounds = Rounds(tmp_path, study_of(buffered={"size": 2, "most_staleness": 3}))
    first, second = rounds.updates(rounds.drifted(2))
    combined = rounds.aggregate([replace(first, staleness=3), replace(second, staleness=4)])
    assert combined.kept == ("site-00",)
    assert combined.left_out["site-01"].startswith("run.stale")


def test_a_model_that_would_not_be_finite_replaces_nothing(tmp_path: Path) -> None:
    study = study_of({"name": "fedavgm", "server_learning_rate": 10.0})
    rounds = Rounds(tmp_path, study)
    sent = [{n: np.full_like(t, 3e38) for n, t in one.items()} for one in rounds.drifted(2)]
    with pytest.raises(ConsiliumError) as caught:
        rounds.round(sent)
    assert caught.value.code == "run.diverged"
    assert not [name for name in files(tmp_path) if "-1." in name]


def test_a_full_disk_replaces_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = Rounds(tmp_path, study_of("fedadam"))
    updates = rounds.updates(rounds.drifted(2))
    before = files(tmp_path)
    write = os.pwrite

    def full(descriptor: int, content: Any, position: int) -> int:
        if position > 600:
            raise OSError(28, "No space left on device")
        return write(descriptor, content, position)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(ConsiliumError) as caught:
        rounds.aggregate(updates)
    assert caught.value.code == "state.disk"
    assert files(tmp_path) == before


# --- what sites get, and the average -------------------------------------------------------------


def test_sites_get_the_model_and_with_scaffold_the_control_variate(tmp_path: Path) -> None:
    plain = Rounds(tmp_path, study_of())
    assert offered(plain.study, plain.model, None, tmp_path / "offered") == plain.model
    rounds = Rounds(tmp_path, study_of("scaffold"))
    out = tmp_path / "offered.safetensors"
    for _ in range(2):
        assert offered(rounds.study, rounds.model, rounds.state, out) == out
        found = unpack(out.read_bytes())
        assert [(n, t.shape) for n, t in found.items()] == [
            (spec.name, spec.shape) for spec in received_specs(rounds.study)
        ]
        kept = unpack(rounds.state.read_bytes()) if rounds.state else {}
        for name, tensor in found.items():
            if not name.startswith(CONTROL):
                np.testing.assert_array_equal(tensor, rounds.tensors[name])
            elif kept:
                np.testing.assert_array_equal(tensor, kept[name])
                assert tensor.any()
            else:
                assert not tensor.any()
        rounds.round(rounds.drifted(2))


def averaged(folder: Path, past: Model, model: Model, decay: float, rounds_done: int) -> Model:
    (folder / "average").write_bytes(pack(past))
    (folder / "model").write_bytes(pack(model))
    running_average(
        folder / "average",
        folder / "model",
        decay=decay,
        rounds_done=rounds_done,
        out=folder / "average",
    )
    return unpack((folder / "average").read_bytes())


def test_the_running_average_forgets_the_start_at_first_and_then_decays_as_declared(
    tmp_path: Path,
) -> None:
    frozen = np.random.default_rng(3).normal(size=1000).astype(np.float32)
    start = {"frozen": frozen, "w": np.zeros(3, np.float32)}
    model = {"frozen": frozen, "w": np.ones(3, np.float32)}
    # After one round the warm-up weighs the past by 2/11, whatever the decay.
    first = averaged(tmp_path, start, model, 0.999, 1)
    np.testing.assert_allclose(first["w"], 9 / 11, rtol=1e-6)
    late = averaged(tmp_path, start, model, 0.9, 10_000)
    np.testing.assert_allclose(late["w"], 0.1, rtol=1e-6)
    # Frozen tensors are the same in both, and stay so to the last bit.
    for average in (first, late, averaged(tmp_path, start, model, 0.5, 3)):
        np.testing.assert_array_equal(average["frozen"], frozen)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=10), st.floats(0, 0.999))
def test_the_running_average_stays_between_the_models_it_averages(
    values: list[float], decay: float
) -> None:
    average: Model = {"w": np.array([values[0]], np.float32)}
    with tempfile.TemporaryDirectory() as folder:
        for index, value in enumerate(values):
            model: Model = {"w": np.array([value], np.float32)}
            average = averaged(Path(folder), average, model, decay, index + 1)
    assert min(values) - 1e-5 <= average["w"][0] <= max(values) + 1e-5


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 3000), st.integers(0, 1000))
def test_coordinates_are_ordered_over_the_sites(sites: int, length: int, seed: int) -> None:
    # With many equal values, and of every size.
    values = np.random.default_rng(seed).integers(-5, 5, (sites, length)).astype(np.float64)
    before = values.copy()
    np.testing.assert_array_equal(ordered(values), np.sort(values, axis=0))
    np.testing.assert_array_equal(median(values), np.median(values, axis=0))
    np.testing.assert_array_equal(values, before)


# --- memory --------------------------------------------------------------------------------------

_CHILD = """
import json, resource, sys
import numpy as np
from pathlib import Path
from aggregation_samples import study_of
from consilium_common.models.tensor_files import writing
from consilium_common.models.weights import TensorSpec
from consilium_server import networks
from consilium_server.aggregation import SiteUpdate, aggregate

folder, length = Path(sys.argv[1]), 1_000_000
specs = (TensorSpec("w", (length,)),)
for name in ("model", *map(str, range(64))):
    with writing(folder / name, specs, durable=False) as writer:
        for start in range(0, length, 100_000):
            writer.put("w", np.full(100_000, len(name) + start, np.float32))

def peak(count):
    for strategy in ("fedadam", "median", "krum"):
        study = study_of({"name": strategy} | ({"hostile": 0} if strategy == "krum" else {}))
        networks._known[study.digest] = networks.Exchanged(specs, specs)
        sent = [SiteUpdate(str(n), folder / str(n), 1.0, 1) for n in range(count)]
        aggregate(study, folder / "model", sent, None, out=folder / "out",
                  out_state=folder / "state", round_index=0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps([before, peak(4), peak(64)]))
"""


def test_memory_is_flat_from_4_to_64_sites(tmp_path: Path) -> None:
    # The study names a tiny network; its place is taken by one tensor of 4 MB.
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, str(tmp_path)],
        cwd=Path(__file__).parent,
        stdout=subprocess.PIPE,
        check=True,
        timeout=120,
    )
    before, few, many = json.loads(done.stdout)
    # 64 updates are 256 MB, and half a gigabyte in float64.
    assert many - before < 50e6
    assert many - few < 20e6, (before, few, many)


def test_every_element_is_read_once_whatever_the_number_of_sites(tmp_path: Path) -> None:
    # Blocks are shorter with more sites; together they are the tensor, in order, without a gap.
    from consilium_common.models.tensor_files import TensorFile
    from consilium_server.aggregation.updates import Opened

    spec = TensorSpec("w", (140_001,))
    values = np.arange(140_001, dtype=np.float32)
    path = tmp_path / "file"
    path.write_bytes(pack({"w": values}))
    for count in (1, 9, 100):
        one = Opened("", TensorFile(path), None, 1.0, 1, 0, 1.0)
        updates = Updates(
            TensorFile(path), [replace(one, site=f"{n:03d}") for n in range(count)], (spec,)
        )
        blocks = list(updates.all_blocks())
        np.testing.assert_array_equal(np.concatenate([b.model for b in blocks]), values)
        np.testing.assert_array_equal(np.concatenate([b.updates[-1] for b in blocks]), values)
