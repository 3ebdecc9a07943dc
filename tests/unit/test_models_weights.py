"""Weights are packed to equal bytes, and nothing but the expected tensors passes the check."""

from __future__ import annotations

import json
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consilium_common.errors import ConsiliumError
from consilium_common.models.weights import TensorSpec, check_tensors, pack, packed_size, unpack

SPECS = (TensorSpec("a.weight", (2, 3)), TensorSpec("b", ()))


def good() -> dict[str, Any]:
    return {"a.weight": np.ones((2, 3), np.float32), "b": np.array(2.0, np.float32)}


def refused(tensors: Any, norm_bound: float | None = None) -> str:
    with pytest.raises(ConsiliumError) as caught:
        check_tensors(tensors, SPECS, norm_bound=norm_bound)
    assert caught.value.code == "run.bad-update"
    return caught.value.message


shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)
names = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=12)


@given(
    layout=st.dictionaries(names.filter(lambda n: n != "__metadata__"), shapes, max_size=6),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_packing_is_exact_and_independent_of_order(layout: Any, seed: int) -> None:
    generator = np.random.default_rng(seed)
    tensors = {n: generator.standard_normal(s).astype(np.float32) for n, s in layout.items()}
    blob = pack(tensors)
    assert pack(dict(reversed(tensors.items()))) == blob
    back = unpack(blob)
    assert list(back) == sorted(tensors)
    for name, tensor in tensors.items():
        assert back[name].shape == tensor.shape
        assert back[name].tobytes() == tensor.tobytes()


def test_memory_layout_and_byte_order_do_not_change_the_bytes() -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    blob = pack({"a": values})
    assert pack({"a": np.asfortranarray(values)}) == blob
    assert pack({"a": values.T.copy().T}) == blob


def test_packed_size_is_the_size_of_what_is_packed() -> None:
    tensors = {f"layer{i}.weight": np.zeros((i, 3), np.float32) for i in range(11)}
    tensors["scalar"] = np.array(1, np.float32)
    specs = [TensorSpec(name, tensor.shape) for name, tensor in tensors.items()]
    assert packed_size(specs) == len(pack(tensors))


def test_only_float32_is_packed() -> None:
    with pytest.raises(ValueError, match="tensor a is float64"):
        pack({"a": np.zeros(2)})


class Explodes:
    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("unpickled",)


def header(value: Any, body: bytes = b"") -> bytes:
    text = json.dumps(value).encode()
    return len(text).to_bytes(8, "little") + text + body


@pytest.mark.parametrize(
    "blob",
    [
        b"",
        b"\x08",
        pickle.dumps(Explodes()),
        b"\xff" * 8 + b"{}",
        (1 << 40).to_bytes(8, "little") + b"{}",
        header([1]),
        header({"a": 1}),
        header({"a": {}}),
        header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(4)),
        header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(12)),
        header({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, bytes(8)),
        header({"a": {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]}}, bytes(8)),
        header({"a": {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}}, bytes(8)),
        header({"__metadata__": {"name": "Jane Doe"}}),
    ],
)
def test_garbage_is_one_error_and_is_never_unpickled(blob: bytes) -> None:
    with pytest.raises(ConsiliumError) as caught:
        unpack(blob)
    assert caught.value.code == "run.bad-update"


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_damaged_bytes_are_tensors_or_one_error(data: st.DataObject) -> None:
    blob = bytearray(pack(good()))
    for _ in range(data.draw(st.integers(1, 4))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(blob)))
    for damaged in (bytes(blob), bytes(blob[:cut])):
        try:
            unpack(damaged)
        except ConsiliumError as error:
            assert error.code == "run.bad-update"


def test_the_expected_tensors_pass() -> None:
    check_tensors(good(), SPECS, norm_bound=None)
    check_tensors(unpack(pack(good())), SPECS, norm_bound=3.1623)  # √10 = 3.16228


def test_every_deviation_names_the_tensor() -> None:
    assert "a.weight is missing" in refused({"b": good()["b"]})
    assert "extra does not belong" in refused({**good(), "extra": np.zeros(1, np.float32)})
    assert "Tensor '\\x1b[2J' does" in refused({**good(), "\x1b[2J": np.zeros(1, np.float32)})
    assert "a.weight has shape [3, 2] in place of [2, 3]" in refused(
        {**good(), "a.weight": np.ones((3, 2), np.float32)}
    )
    assert "a.weight is float64" in refused({**good(), "a.weight": np.ones((2, 3))})
    for value in (np.nan, np.inf, -np.inf):
        tensor = np.ones((2, 3), np.float32)
        tensor[1, 2] = value
        assert "a.weight has a value that is not finite" in refused({**good(), "a.weight": tensor})
    assert "3.162, above 3.16" in refused(good(), 3.16)


def test_nothing_is_ever_broadcast() -> None:
    for shape in ((), (1,), (3,), (1, 3), (2, 1), (1, 2, 3)):
        assert "shape" in refused({**good(), "a.weight": np.ones(shape, np.float32)})
    assert "b has shape [1]" in refused({**good(), "b": np.ones(1, np.float32)})


def test_the_norm_does_not_overflow_and_nan_is_no_bound() -> None:
    huge = {**good(), "a.weight": np.full((2, 3), 3e38, np.float32)}
    assert "7.348e+38" in refused(huge, 1e38)
    assert "above nan" in refused(good(), float("nan"))
