"""Three engines, one gradient: every network, 2D and 3D, every loss, whatever the data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_samples import (
    ENGINES,
    NETWORKS_AND_LOSSES,
    engine_of,
    patients_of,
    rows_of,
    small_study,
    task_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from consilium_client.training.clipping import clipped_sum
from consilium_client.training.engines.base import Chunks, PatientTask
from consilium_client.training.engines.choice import choose_engine
from consilium_client.training.engines.hooks import PatientHooks
from consilium_client.training.engines.vmap import PatientVmap
from consilium_common.errors import ConsiliumError
from consilium_common.models.registry import NETWORKS, build_network
from consilium_common.study import Study

FAST = ("vmap", "opacus")


def in_double(study: Study, count: int) -> PatientTask:
    """Return a task in float64, where two right ways to one gradient agree to many digits."""
    patients = [(x.double(), y.double()) for x, y in patients_of(study, count)]
    return task_of(study, patients, build_network(study).double().train())


def distance(found: Any, expected: Any) -> float:
    """Return the largest relative distance of a row from the row it should be."""
    return float(((found - expected).norm(dim=1) / expected.norm(dim=1)).max())


# --- agreement ---------------------------------------------------------------------------------


#: The deepest network takes seconds a case in 3D, so one of its losses stands for the others; so
#: it does below, where a patient is added.
AGREEMENTS = [
    (name, loss, dimensions)
    for name, loss in NETWORKS_AND_LOSSES
    for dimensions in (2, 3)
    if (name, dimensions) != ("densenet121", 3) or loss == "cross_entropy"
]


@pytest.mark.parametrize(("name", "loss", "dimensions"), AGREEMENTS)
def test_every_engine_gives_the_loops_gradients(name: str, loss: str, dimensions: int) -> None:
    # In chunks of two, the last of which is half empty.
    task = in_double(small_study(name, dimensions, loss), 3)
    reference = engine_of("loop", task)
    expected = rows_of(reference, range(3))
    assert expected.shape == (3, reference.size)
    assert expected.norm(dim=1).min() > 0
    for engine_name in FAST:
        engine = engine_of(engine_name, task)
        found = rows_of(engine, range(3))
        assert found.dtype == torch.float32
        assert distance(found, expected) < 1e-6
        assert engine.losses == pytest.approx(reference.losses, rel=1e-6)


@pytest.mark.parametrize("trainable", ["first+last", "adapters", ["*bias"]])
@pytest.mark.parametrize("name", ["unet", "resnet10"])
def test_engines_agree_where_only_a_part_is_trained(name: str, trainable: Any) -> None:
    study = small_study(name, 2, trainable=trainable, adapter_rank=2)
    task = in_double(study, 3)
    every = sum(p.numel() for p in task.network.parameters())
    expected = rows_of(engine_of("loop", task), range(3))
    assert 0 < expected.shape[1] < every
    for engine_name in FAST:
        found = rows_of(engine_of(engine_name, task), range(3))
        assert distance(found, expected) < 1e-6


@pytest.mark.parametrize("engine", ENGINES)
def test_a_trained_parameter_that_is_not_used_gives_zeros(engine: str) -> None:
    class Partial(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused, self.used = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)

        def forward(self, inputs: Any) -> Any:
            return self.used(inputs)

    task = PatientTask(
        Partial(), lambda _: (torch.ones(1, 2), torch.zeros(1)), lambda f, x, y: f(x).sum(1).mean()
    )
    assert rows_of(engine_of(engine, task), [0]).tolist() == [[0, 0, 0, 1, 1, 1]]


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_leaves_nothing_behind_on_the_network(engine: str) -> None:
    study = small_study("unet", 2)
    task = task_of(study, patients_of(study, 2))
    before = {id(m): set(m.__dict__) for m in task.network.modules()}
    state = {name: p.clone() for name, p in task.network.named_parameters()}
    rows_of(engine_of(engine, task), [0, 1])
    for module in task.network.modules():
        assert set(module.__dict__) == before[id(module)]
        assert not module._forward_hooks
        assert not module._backward_hooks
    for name, parameter in task.network.named_parameters():
        assert parameter.grad is None
        assert parameter.__dict__ == {}
        assert torch.equal(parameter, state[name])
    assert list(engine_of(engine, task).gradients([])) == []


def test_an_engine_that_fails_leaves_no_hooks_either() -> None:
    study = small_study("unet", 2)
    patients = patients_of(study, 1)

    def broken(forward: Any, images: Any, targets: Any) -> Any:
        forward(images)
        raise RuntimeError("loss")

    task = PatientTask(build_network(study).train(), lambda i: patients[i], broken)
    engine = PatientHooks(task, expected=1)
    with pytest.raises(RuntimeError, match="loss"):
        engine._samples(*patients[0])
    assert all(not m._forward_hooks for m in task.network.modules())
    assert all(not hasattr(p, "grad_sample") for p in task.network.parameters())


@pytest.mark.parametrize("engine", ENGINES)
def test_dropout_is_drawn_anew_for_each_patient(engine: str) -> None:
    study = small_study("unet", 2)
    value = study.to_canonical()
    value["model"]["arguments"]["dropout"] = 0.5
    study = Study.model_validate(value)
    one = patients_of(study, 1)[0]
    rows = rows_of(engine_of(engine, task_of(study, [one, one, one])), range(3))
    assert not torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[1], rows[2])


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["unet", "resnet10"])
def test_on_cuda_every_engine_gives_the_gradients_of_the_cpu(name: str, engine: str) -> None:
    task = in_double(small_study(name, 3), 3)
    expected = rows_of(engine_of("loop", task), range(3))
    patients = [tuple(part.cuda() for part in task.draw(i)) for i in range(3)]
    placed = PatientTask(task.network.cuda(), lambda i: patients[i], task.loss)
    found = rows_of(engine_of(engine, placed), range(3))
    assert found.device.type == "cuda"
    assert distance(found.cpu(), expected) < 1e-6


# --- one patient's influence ---------------------------------------------------------------------

HOSTILE = ("nan", "inf", "zeros", "huge", "one voxel", "ordinary")


def make_hostile(images: Any, kind: str) -> Any:
    images = images.clone()
    match kind:
        case "nan":
            images[:] = torch.nan
        case "inf":
            images[0].flatten()[3] = torch.inf
        case "zeros":
            images[:] = 0
        case "huge":
            images *= 1e30
        case "one voxel":
            images[:] = 0
            images.view(-1)[0] = 1e6
    return images


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("name", "loss"),
    [one for one in NETWORKS_AND_LOSSES if one[0] != "densenet121" or one[1] == "cross_entropy"],
)
def test_adding_a_patient_moves_the_sum_by_at_most_the_clip_norm(
    name: str, loss: str, engine: str
) -> None:
    made: dict[int, Any] = {}

    deep = name == "densenet121"

    @settings(max_examples=2 if deep else 3, deadline=None, database=None)
    @given(
        kind=st.sampled_from(HOSTILE),
        dimensions=st.sampled_from([2] if deep else [2, 3]),
        patient=st.integers(0, 1),
        clip=st.sampled_from([1e-3, 0.5, 1e3]),
    )
    def holds(kind: str, dimensions: int, patient: int, clip: float) -> None:
        if dimensions not in made:
            study = small_study(name, dimensions, loss)
            made[dimensions] = (task_of(study, data := patients_of(study, 2, images=1)), data)
        task, data = made[dimensions]
        honest = data[patient]
        data[patient] = (make_hostile(honest[0], kind), honest[1])
        try:
            sums = []
            for drawn in ([0, 1], [1 - patient]):
                one = engine_of(engine, task)
                sums.append(clipped_sum(one.gradients(drawn), clip, one.size, "cpu")[0])
        finally:
            data[patient] = honest
        moved = sums[0] - sums[1]
        assert torch.isfinite(moved).all()
        assert float(moved.norm()) <= clip * (1 + 1e-9)
        if kind == "nan":
            assert not moved.any()

    holds()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_row_is_the_same_to_the_last_bit_whoever_else_is_drawn(engine: str) -> None:
    study = small_study("resnet10", 2)
    task = task_of(study, patients_of(study, 6))
    drawn = [[0, 1, 2, 3, 4, 5], [3], [0, 3], [5, 4, 3], [1, 2, 3, 4]]
    rows = [rows_of(engine_of(engine, task, 8), one)[one.index(3)] for one in drawn]
    assert all(torch.equal(row, rows[0]) for row in rows[1:])


# --- memory --------------------------------------------------------------------------------------


def test_chunks_stay_within_the_memory_bound_and_have_one_size() -> None:
    study = small_study("unet", 3)
    task = task_of(study, patients_of(study, 7))

    def sizes(memory: int, expected: float = 100) -> list[tuple[int, int]]:
        chunks = Chunks(task, expected=expected, copies=(3, 2), memory=memory)
        return [(count, len(images)) for count, images, _ in chunks.of(range(7))]

    assert sizes(1) == [(1, 1)] * 7
    assert sizes(1 << 30) == [(7, 50)]
    assert sizes(1 << 30, expected=8) == [(4, 4), (3, 4)]
    assert sizes(1 << 30, expected=0.1) == [(1, 1)] * 7
    # One patient's share: three times the parameters, twice what the forward pass keeps.
    weights = sum(p.numel() for p in task.network.parameters()) * 4
    one = next(n for n in range(1, 1 << 24, 1 << 10) if sizes(n)[0][1] > 1) / 2
    image_bytes = 4 * task.draw(0)[0].numel()
    assert one > 3 * weights + 2 * image_bytes
    assert sizes(int(one * 4.1))[0][1] == 4


def test_whatever_the_chunks_the_rows_are_the_same_gradients() -> None:
    task = in_double(small_study("segresnet", 2), 5)
    expected = rows_of(engine_of("loop", task), range(5))
    for memory in (1, 1 << 30):
        for kind in (PatientVmap, PatientHooks):
            found = rows_of(kind(task, expected=6, memory=memory), range(5))
            assert distance(found, expected) < 1e-6


# --- choice --------------------------------------------------------------------------------------


def private(name: str, dimensions: int, engine: str, images: int = 2, copies: int = 1) -> Study:
    value = small_study(name, dimensions).to_canonical()
    value["training"] |= {"patches_per_patient": images}
    value["training"]["augmentation"]["copies"] = copies
    value["privacy"] = {
        "mode": "patient",
        "sampling_rate": 0.5,
        "clip_norm": 1,
        "noise_multiplier": 1,
        "delta": 1e-3,
        "engine": engine,
    }
    return Study.model_validate(value)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", list(NETWORKS))
def test_an_engine_that_a_study_names_is_the_one_it_gets(name: str, engine: str) -> None:
    study = private(name, 2, engine)
    assert choose_engine(study, build_network(study)).name == engine


@pytest.mark.parametrize(
    ("dimensions", "images", "copies", "expected"),
    [(2, 1, 1, "loop"), (2, 4, 1, "loop"), (3, 1, 1, "vmap"), (3, 2, 1, "loop"), (3, 1, 2, "loop")],
)
def test_auto_is_the_loop_but_for_a_single_3d_image(
    dimensions: int, images: int, copies: int, expected: str
) -> None:
    study = private("resnet10", dimensions, "auto", images, copies)
    choice = choose_engine(study, build_network(study))
    assert choice.name == expected
    assert choice.why


class InPlace(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Conv2d(1, 2, 3)
        self.act = torch.nn.ReLU(inplace=True)


def test_a_network_that_an_engine_cannot_compute_is_refused_by_layer() -> None:
    with pytest.raises(ConsiliumError, match="act") as caught:
        choose_engine(private("unet", 2, "opacus"), InPlace())
    assert caught.value.code == "privacy.engine"
    with pytest.raises(ConsiliumError, match="running statistics") as caught:
        choose_engine(private("unet", 2, "vmap"), torch.nn.BatchNorm2d(2))
    assert caught.value.code == "privacy.engine"
    # What auto would take and cannot have, it replaces by the loop, and says so.
    choice = choose_engine(private("resnet10", 3, "auto", 1), torch.nn.BatchNorm3d(2))
    assert choice.name == "loop"
    assert "running statistics" in choice.why


def test_hooks_that_miss_a_use_of_a_parameter_are_found() -> None:
    class Functional(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(2, 2)

        def forward(self, inputs: Any) -> Any:
            return inputs @ self.layer.weight.T  # past the layer, and past its hooks

    task = PatientTask(
        Functional(), lambda _: (torch.ones(1, 2), torch.ones(1)), lambda f, x, y: f(x).mean()
    )
    with pytest.raises(ConsiliumError, match="do not reach") as caught:
        rows_of(engine_of("opacus", task), [0])
    assert caught.value.code == "privacy.engine"


@pytest.mark.parametrize("engine", ENGINES)
def test_a_network_of_which_nothing_is_trained_is_refused(engine: str) -> None:
    network = torch.nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ConsiliumError, match=r"privacy\.engine"):
        engine_of(engine, PatientTask(network, lambda _: None, lambda f, x, y: None))
