"""Tensors in a file, read and written in pieces, are those of a file in one piece."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consilium_common.errors import ConsiliumError
from consilium_common.models.tensor_files import TensorFile, writing
from consilium_common.models.weights import TensorSpec, pack

SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@settings(max_examples=25, deadline=None)
@given(st.dictionaries(st.text("abc.é", min_size=1), SHAPES, max_size=5), st.integers(1, 9))
def test_pieces_are_the_bytes_of_the_whole(shapes: dict[str, tuple[int, ...]], length: int) -> None:
    rng = np.random.default_rng(0)
    tensors = {
        name: np.asarray(rng.normal(size=shape), dtype=np.float32) for name, shape in shapes.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        path, again = Path(folder) / "one", Path(folder) / "two"
        path.write_bytes(pack(tensors))
        file = TensorFile(path)
        assert file.specs == tuple(sorted(TensorSpec(n, t.shape) for n, t in tensors.items()))
        # In any order of the tensors.
        with writing(again, file.specs, durable=False) as writer:
            for spec in reversed(file.specs):
                for _, values in file.pieces(spec, length):
                    assert values.size <= length
                    writer.put(spec.name, values)
        assert again.read_bytes() == path.read_bytes()
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(file.tensor(name), tensor)


def test_the_elements_of_a_compressed_file_are_read_as_they_are(tmp_path: Path) -> None:
    values = {
        "a.scale": np.array([0.5], np.float32),
        "b.codes": np.array([1, -2, 3], np.int8),
        "c.places": np.array([7, 8], np.uint32),
    }
    specs = [TensorSpec(n, v.shape, str(v.dtype)) for n, v in values.items()]
    halves = np.array([0x3F80, 0x4000], np.uint16)
    with writing(tmp_path / "file", [*specs, TensorSpec("halves", (2,), "bfloat16")]) as writer:
        for name, array in values.items():
            writer.put(name, array)
        writer.put("halves", halves)
    file = TensorFile(tmp_path / "file")
    for name, array in {**values, "halves": halves}.items():
        found = file.read(name)
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, array)


def test_an_array_that_is_there_is_filled_where_it_fits(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(pack({"a": np.arange(5, dtype=np.float32)}))
    file = TensorFile(path)
    out = np.full(4, -1, np.float32)
    found = file.read("a", 2, 3, out=out)
    assert np.shares_memory(found, out)
    assert found.tolist() == [2, 3, 4]
    assert out.tolist() == [2, 3, 4, -1]
    for other in (np.empty(4), np.empty(2, np.float32)):
        with pytest.raises(ValueError, match="3 elements of float32 do not fit"):
            file.read("a", 2, 3, out=other)


def test_what_is_not_a_file_of_ours_is_refused(tmp_path: Path) -> None:
    good = pack({"a": np.ones(3, np.float32), "b": np.zeros((2, 2), np.float32)})
    path = tmp_path / "file"
    length = int.from_bytes(good[:8], "little")
    for what, content in {
        "nothing": b"",
        "too short for a header": good[:20],
        "cut": good[:-1],
        "longer": good + b"\0",
        "a giant header": (2**60).to_bytes(8, "little") + good[8:],
        "nested": (200_000).to_bytes(8, "little") + b"[" * 200_000,
        "metadata": _with_header(b'{"__metadata__":{"x":"y"}}'),
        "a list": _with_header(b"[]"),
        "negative": good.replace(b'"shape":[3]', b'"shape":[-3]'),
        "huge": good.replace(b'"shape":[3]', b'"shape":[9]'),
        "another dtype": good.replace(b'"F32","shape":[3]', b'"F64","shape":[3]'),
        "spaces": good[:8]
        + good[8 : 8 + length].replace(b'"a":{', b'"a": {')[:length]
        + good[8 + length :],
    }.items():
        path.write_bytes(content)
        with pytest.raises(ConsiliumError) as caught:
            TensorFile(path)
        assert caught.value.code == "run.bad-update", what
    path.write_bytes(good)
    for specs in ([TensorSpec("a", (3,))], [TensorSpec("a", (3,)), TensorSpec("b", (4,))]):
        with pytest.raises(ConsiliumError, match="form that the study declares"):
            TensorFile(path, specs)
    file = TensorFile(path)
    path.write_bytes(good[:-4])
    with pytest.raises(ConsiliumError, match="ended while it was read"):
        file.read("b")
    path.unlink()
    with pytest.raises(ConsiliumError, match="cannot be read"):
        file.read("b")


def _with_header(text: bytes) -> bytes:
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def test_a_file_is_there_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs = [TensorSpec("a", (3,)), TensorSpec("b", (2,))]
    path = tmp_path / "file"
    path.write_bytes(b"before")

    def attempt(**values: Any) -> None:
        with writing(path, specs) as writer:
            for name, array in values.items():
                writer.put(name, array)

    with pytest.raises(ValueError, match="b was not written whole"):
        attempt(a=np.ones(3, np.float32))
    with pytest.raises(ValueError, match="do not fit"):
        attempt(a=np.ones(4, np.float32))
    with pytest.raises(ValueError, match="do not fit"):
        attempt(a=np.ones(3))

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        with pytest.raises(ConsiliumError) as caught:
            attempt(a=np.ones(3, np.float32))
    assert caught.value.code == "state.disk"
    assert path.read_bytes() == b"before"
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


def test_a_short_write_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.pwrite

    def little(descriptor: int, content: memoryview, position: int) -> int:
        return write(descriptor, content[:5], position)

    monkeypatch.setattr(os, "pwrite", little)
    tensor = np.arange(11, dtype=np.float32)
    with writing(tmp_path / "file", [TensorSpec("a", (11,))]) as writer:
        writer.put("a", tensor)
    assert (tmp_path / "file").read_bytes() == pack({"a": tensor})
