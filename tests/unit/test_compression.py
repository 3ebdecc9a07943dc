"""Updates that are made smaller: what leaves, what is lost, what is refused."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from round_samples import POLICY, RoundsAtSite, deciding_site, keyed_cohort, tiny_study
from safetensors.torch import load_file
from study_samples import study_of

from consilium_client.encoding import LOST, encoded_update
from consilium_client.store import StudyStore
from consilium_common.errors import ConsiliumError
from consilium_common.models.codecs import BFloat16, Int8, TopK
from consilium_common.models.compression import (
    check_encoded,
    decode,
    encode,
    encoded_specs,
    most_bytes,
)
from consilium_common.models.exchange import CONTROL, sent_specs
from consilium_common.models.weights import Array, TensorSpec, pack, packed_header, unpack
from consilium_common.study import Study
from consilium_common.study.cost import cost
from consilium_common.study.federation import Compression
from consilium_common.study.plan import describe
from consilium_common.study.words import size_in_words

SHAPES = {"conv.weight": (6, 5, 3), "conv.bias": (6,), "empty": (0, 2), "scalar": (), "w": (40, 9)}
ENCODINGS = ("none", "bfloat16", "int8", "top-k")


def study_with(**compression: object) -> Study:
    """Return a study of that compression."""
    study = study_of()
    value = Compression.model_validate(compression)
    return study.model_copy(
        update={"federation": study.federation.model_copy(update={"compression": value})}
    )


def tensors(seed: int, scale: float = 1.0, control: bool = True) -> dict[str, Array]:
    """Return tensors of many forms, sorted by name."""
    draw = np.random.default_rng(seed)
    names = {**SHAPES, **({CONTROL + "w": SHAPES["w"]} if control else {})}
    return {
        name: np.asarray(scale * draw.normal(size=names[name]), dtype=np.float32)
        for name in sorted(names)
    }


def specs_of(update: Mapping[str, Array]) -> tuple[TensorSpec, ...]:
    """Return the specs of tensors."""
    return tuple(TensorSpec(name, update[name].shape) for name in sorted(update))


def moved(model: Mapping[str, Array], seed: int) -> dict[str, Array]:
    """Return a model after a round of training."""
    change = tensors(seed, 1e-3)
    return {name: model[name] + change[name] for name in model}


def written(folder: Path, blob: bytes, model: Mapping[str, Array]) -> tuple[Path, Path, Path]:
    """Write an encoded update and the global model; return both and where to decode to."""
    paths = folder / "encoded", folder / "model", folder / "out"
    paths[0].write_bytes(blob)
    paths[1].write_bytes(pack(model))
    return paths


def there_and_back(
    study: Study, folder: Path, update: dict[str, Array], model: dict[str, Array]
) -> tuple[dict[str, Array], bytes, dict[str, Array] | None]:
    """Encode, check at the gate, decode; return what arrives, what travelled, what was lost."""
    blob, lost = encode(study, update, model, None, np.random.default_rng(3).random)
    encoded, start, out = written(folder, blob, model)
    check_encoded(study, specs_of(update), encoded)
    decode(study, encoded, start, out, specs=specs_of(update))
    return unpack(out.read_bytes()), blob, lost


COMPRESSIONS = st.builds(
    lambda encoding, delta, **rest: {
        "encoding": encoding,
        "delta": delta or encoding == "top-k",
        **rest,
    },
    encoding=st.sampled_from(ENCODINGS),
    delta=st.booleans(),
    error_feedback=st.booleans(),
    level=st.integers(0, 9),
    share=st.sampled_from([0.001, 0.1, 1.0]),
)


@given(COMPRESSIONS, st.integers(0, 1000))
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_whatever_a_study_says_its_update_arrives_and_what_was_lost_is_known(
    tmp_path: Path, said: dict[str, Any], seed: int
) -> None:
    study, encoding, level = study_with(**said), said["encoding"], said["level"]
    model = tensors(seed)
    update = moved(model, seed + 1)
    arrived, blob, lost = there_and_back(study, tmp_path, update, model)
    assert list(arrived) == sorted(update)
    assert len(blob) <= most_bytes(study, specs_of(update))
    if not level:
        specs = encoded_specs(study, specs_of(update))
        assert len(blob) == most_bytes(study, specs_of(update))
        assert blob.startswith(packed_header(specs))
    assert (lost is not None) == (said["error_feedback"] and encoding != "none")
    for name, given_values in update.items():
        if given_values.ndim < 2 or encoding == "none":
            assert arrived[name].tobytes() == given_values.tobytes()
        elif lost is not None:
            np.testing.assert_allclose(arrived[name] + lost[name], given_values, atol=1e-6)


@pytest.mark.parametrize("level", [0, 1, 9])
def test_without_rounding_every_bit_arrives(tmp_path: Path, level: int) -> None:
    model = tensors(1)
    update = moved(model, 2)
    arrived, blob, _ = there_and_back(study_with(level=level), tmp_path, update, model)
    assert pack(arrived) == pack(update)
    if level == 0:
        assert blob == pack(update)


def test_what_leaves_is_safetensors_that_others_read(tmp_path: Path) -> None:
    study = study_with(encoding="bfloat16", delta=False)
    update = tensors(1)
    encode_to = tmp_path / "encoded.safetensors"
    encode_to.write_bytes(encode(study, update, update, None, np.random.default_rng(0).random)[0])
    read = load_file(encode_to)
    assert read["w"].dtype == torch.bfloat16
    assert torch.equal(read["w"], torch.from_numpy(update["w"]).to(torch.bfloat16))


@given(st.integers(0, 2**31), st.floats(-30, 30))
@settings(max_examples=20, deadline=None)
def test_bfloat16_rounds_as_torch_does(seed: int, power: float) -> None:
    values = np.random.default_rng(seed).normal(size=64) * 10.0**power
    (bits,) = BFloat16().encode(values, np.random.default_rng(0).random)
    expected = torch.from_numpy(values).to(torch.float32).to(torch.bfloat16)
    assert np.array_equal(bits.view(np.int16), expected.view(torch.int16).numpy())


def decoded(codec: BFloat16 | Int8 | TopK, arrays: tuple[Array, ...], size: int) -> Array:
    """Return what arrays of a codec stand for."""
    return codec.decoder(TensorSpec("w", (size,)), lambda i, a, b: arrays[i][a:b])(0, size)


@given(
    st.lists(st.floats(-1, 1, allow_subnormal=False), min_size=1, max_size=12),
    st.floats(-35, 35),
    st.integers(0, 2**31),
)
@settings(max_examples=25, deadline=None)
def test_eight_bits_keep_the_mean(values: list[float], power: float, seed: int) -> None:
    exact = np.array(values) * 10.0**power
    copies, random = 2000, np.random.default_rng(seed)
    repeated = np.tile(exact, copies)
    codec = Int8()
    arrays = codec.encode(repeated, random.random)
    scale = float(arrays[1][0])
    found = decoded(codec, arrays, len(repeated)).reshape(copies, -1)
    assert np.abs(found - exact).max() <= scale * (1 + 1e-9)
    # A value between two multiples deviates by half a step at most: six standard errors.
    assert (np.abs(found.mean(axis=0) - exact) <= 6 * 0.5 * scale / np.sqrt(copies)).all()


def test_eight_bits_hold_the_largest_value_whatever_is_drawn() -> None:
    almost_one = np.nextafter(1.0, 0.0)
    for largest in (1.0, 3.3e38, 1e-45, 0.1, 7.0):
        values = np.array([largest, -largest, 0.0])
        multiples, _ = Int8().encode(values, lambda count: np.full(count, almost_one))
        assert multiples.tolist()[0] == min(127, multiples.max())
        assert multiples.min() >= -127


def test_top_k_keeps_the_largest_and_of_equal_ones_the_first() -> None:
    values = np.array([1.0, -5.0, 2.0, 2.0, 0.0, -2.0, 4.0, 2.0])
    entries, places = TopK(0.5).encode(values, np.random.default_rng(0).random)
    assert places.tolist() == [1, 2, 3, 6]
    assert entries.tolist() == [-5.0, 2.0, 2.0, 4.0]
    assert decoded(TopK(0.5), (entries, places), 8).tolist() == [0, -5, 2, 2, 0, 0, 4, 0]


@pytest.mark.parametrize("encoding", ["bfloat16", "int8", "top-k"])
def test_with_error_feedback_nothing_is_lost_for_ever(tmp_path: Path, encoding: str) -> None:
    study = study_with(encoding=encoding, share=0.1)
    model = tensors(0, control=False)
    step = moved(model, 1)
    residual, total = None, {name: np.zeros(model[name].shape) for name in model}
    rounds, random = 30, np.random.default_rng(5)
    for _ in range(rounds):
        blob, residual = encode(study, step, model, residual, random.random)
        encoded, start, out = written(tmp_path, blob, model)
        decode(study, encoded, start, out, specs=specs_of(step))
        for name, values in unpack(out.read_bytes()).items():
            total[name] += values.astype(np.float64) - model[name]
    assert residual is not None
    for name, given_values in step.items():
        wanted = rounds * (given_values.astype(np.float64) - model[name])
        held = residual.get(name, np.zeros(()))
        np.testing.assert_allclose(total[name] + held, wanted, atol=1e-5)


def test_the_same_numbers_give_the_same_file(tmp_path: Path) -> None:
    model = tensors(4)
    for encoding in ENCODINGS:
        study = study_with(encoding=encoding, level=3)
        update = moved(model, 5)
        backwards = dict(reversed(update.items()))
        blobs = {
            encode(study, one, model, None, np.random.default_rng(9).random)[0]
            for one in (update, backwards)
        }
        assert len(blobs) == 1


def test_what_is_not_finite_never_becomes_a_file() -> None:
    model, bad = tensors(1), tensors(1)
    bad["w"][0, 0] = np.inf
    for encoding in ENCODINGS[1:]:
        with pytest.raises(ConsiliumError, match=r"bad-update.*finite"):
            encode(study_with(encoding=encoding), bad, model, None, np.random.default_rng(0).random)
    far = {"w": np.full((2, 2), 3.3e38, np.float32)}
    residual = {"w": np.full((2, 2), 3.3e38, np.float32)}
    for encoding in ("bfloat16", "int8"):
        study = study_with(encoding=encoding, delta=False, error_feedback=False)
        with pytest.raises(ConsiliumError, match=r"bad-update.*finite"):
            encode(study, far, far, residual, np.random.default_rng(0).random)


def refused(study: Study, folder: Path, blob: bytes, *, by_decoding: bool = True) -> None:
    """Require that the gate refuses a file, and the aggregator too."""
    model = tensors(1)
    encoded, start, out = written(folder, blob, model)
    with pytest.raises(ConsiliumError, match=r"run\.bad-update"):
        check_encoded(study, specs_of(model), encoded)
    if by_decoding:
        with pytest.raises(ConsiliumError, match=r"run\.bad-update"):
            decode(study, encoded, start, out, specs=specs_of(model))
    assert sorted(path.name for path in folder.iterdir()) == ["encoded", "model"]


def blob_of(study: Study, change: Callable[[dict[str, Array]], None] | None = None) -> bytes:
    """Return an encoded update, with its arrays changed by hand where that is asked."""
    model = tensors(1)
    blob, _ = encode(study, moved(model, 2), model, None, np.random.default_rng(0).random)
    if change is None:
        return blob
    header = packed_header(encoded_specs(study, specs_of(model)))
    arrays, offset = {}, len(header)
    for spec in sorted(encoded_specs(study, specs_of(model)), key=lambda spec: (-spec.width, spec)):
        dtype = "uint16" if spec.dtype == "bfloat16" else spec.dtype
        arrays[spec.name] = np.frombuffer(blob, dtype, spec.size, offset).copy()
        offset += spec.nbytes
    change(arrays)
    return header + b"".join(array.tobytes() for array in arrays.values())


def set_to(name: str, place: int, value: float) -> Callable[[dict[str, Array]], None]:
    """Return what sets one element."""

    def change(arrays: dict[str, Array]) -> None:
        arrays[name][place] = value

    return change


@pytest.mark.parametrize(
    ("encoding", "change"),
    [
        ("bfloat16", set_to("w", 0, 0x7FC0)),  # NaN
        ("int8", set_to("w", 0, -128)),
        ("int8", set_to("consilium.scale.w", 0, -1.0)),
        ("int8", set_to("consilium.scale.w", 0, -0.0)),
        ("int8", set_to("consilium.scale.w", 0, 0.0)),
        ("int8", set_to("consilium.scale.w", 0, np.nan)),
        ("int8", set_to("consilium.scale.w", 0, 3e38)),
        ("int8", set_to("conv.bias", 0, np.nan)),
        ("top-k", set_to("w", 0, np.inf)),
        ("top-k", set_to("consilium.index.w", 0, 2**32 - 1)),
        ("top-k", set_to("consilium.index.w", 1, 0)),
        ("top-k", set_to("consilium.index.w", 3, 360)),
    ],
)
def test_values_that_no_encoder_writes_are_refused(
    tmp_path: Path, encoding: str, change: Callable[[dict[str, Array]], None]
) -> None:
    study = study_with(encoding=encoding)
    assert blob_of(study, lambda arrays: None) == blob_of(study)
    refused(study, tmp_path, blob_of(study, change))


def test_files_of_another_form_are_refused(tmp_path: Path) -> None:
    for encoding in ENCODINGS:
        for level in (0, 3):
            study = study_with(encoding=encoding, level=level)
            blob = blob_of(study)
            others = [b"", blob[:-1], blob[: len(blob) // 2], pack(tensors(1, control=False))]
            others += [blob_of(study_with(encoding="int8" if encoding != "int8" else "bfloat16"))]
            others += [] if level else [blob + b"\0"]
            for other in others:
                refused(study, tmp_path, other)


def test_a_packed_file_holds_what_it_says_and_nothing_beside_it(tmp_path: Path) -> None:
    study = study_with(encoding="int8", level=3)
    blob = blob_of(study)
    plain = zstandard.ZstdDecompressor().decompress(blob)
    bomb = zstandard.ZstdCompressor().compress(plain + bytes(64 * 1024 * 1024))
    assert len(bomb) < 20_000
    tracemalloc.start()
    refused(study, tmp_path, bomb)
    assert tracemalloc.get_traced_memory()[1] < 8 * 1024 * 1024
    tracemalloc.stop()
    refused(study, tmp_path, blob + blob)
    # The same content by another way, and frames without content: the site's gate lets none out.
    refused(study, tmp_path, zstandard.ZstdCompressor(level=19).compress(plain), by_decoding=False)
    hidden = b"\x50\x2a\x4d\x18" + (8).to_bytes(4, "little") + b"a secret"
    refused(study, tmp_path, blob + hidden, by_decoding=False)
    refused(study, tmp_path, hidden + blob, by_decoding=False)
    # A window larger than any level's would need memory that nobody has promised.
    wide = zstandard.ZstdCompressionParameters.from_level(3, window_log=27, source_size=0)
    packer = zstandard.ZstdCompressor(compression_params=wide).compressobj()
    refused(study, tmp_path, packer.compress(plain) + packer.flush())


@given(st.sampled_from(ENCODINGS), st.sampled_from([0, 3]), st.integers(0, 2**31))
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_damaged_file_is_refused_or_stands_for_finite_tensors(
    tmp_path: Path, encoding: str, level: int, seed: int
) -> None:
    study, random = study_with(encoding=encoding, level=level), np.random.default_rng(seed)
    blob = bytearray(blob_of(study))
    for place in random.integers(0, len(blob), 3):
        blob[place] = random.integers(256)
    model = tensors(1)
    encoded, start, out = written(tmp_path, bytes(blob), model)
    try:
        decode(study, encoded, start, out, specs=specs_of(model))
    except ConsiliumError as error:
        assert error.code == "run.bad-update"
    else:
        assert all(np.isfinite(values).all() for values in unpack(out.read_bytes()).values())


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("level", [0, 1])
def test_memory_to_check_and_decode_does_not_grow_with_the_tensor(
    tmp_path: Path, encoding: str, level: int
) -> None:
    study = study_with(encoding=encoding, level=level)
    model = {"w": np.random.default_rng(0).normal(size=(2000, 1500)).astype(np.float32)}
    update = {"w": model["w"] * np.float32(1.001)}
    blob, _ = encode(study, update, model, None, np.random.default_rng(0).random)
    encoded, start, out = written(tmp_path, blob, model)
    nbytes, specs = model["w"].nbytes, specs_of(update)
    del model, update, blob
    tracemalloc.start()
    check_encoded(study, specs, encoded)
    decode(study, encoded, start, out, specs=specs)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert nbytes == 12_000_000
    assert peak < 10 * 1024 * 1024


def rounded_study(*, private: bool) -> Study:
    """Return a study at whose sites an update is rounded at random."""
    study = tiny_study(private=private, release="none")
    value = Compression(encoding="int8")
    return study.model_copy(
        update={"federation": study.federation.model_copy(update={"compression": value})}
    )


def test_a_site_rounds_by_its_own_numbers_which_nobody_can_repeat_under_privacy() -> None:
    model = tensors(1)
    update = moved(model, 2)

    def blob(private: bool, site: str = "north", round_index: int = 0) -> bytes:
        study = rounded_study(private=private)
        return encoded_update(study, update, model, {}, site=site, round_index=round_index)[0]

    assert blob(False) == blob(False)
    assert len({blob(False), blob(False, "south"), blob(False, round_index=1)}) == 3
    assert blob(True) != blob(True)


def open_rounds(folder: Path, study: Study) -> RoundsAtSite:
    """Return the rounds of a site that permits a study without privacy."""
    site = deciding_site(folder, study)
    site.home.policy.write_text(POLICY + "permit_non_private: true\n")
    return RoundsAtSite(site, study, keyed_cohort())


def test_what_an_update_lost_is_kept_with_it_and_enters_the_next(tmp_path: Path) -> None:
    study = rounded_study(private=False)
    rounds, alone = (open_rounds(tmp_path / name, study) for name in ("site", "other"))
    site = rounds.site
    first = rounds.train(0)
    check_encoded(study, sent_specs(study), first.file)
    assert len(first.blob) == most_bytes(study, sent_specs(study))
    before = StudyStore(site.home).kept(study.digest)
    assert before is not None and all(name.startswith(LOST) for name in unpack(before))
    # Asked again, the same bytes; a round later, another residual, of that round.
    assert rounds.train(0).blob == first.blob
    second = rounds.train(1).blob
    assert StudyStore(site.home).kept(study.digest) != before
    # With the residual gone the second update is another one: it did enter.
    assert alone.train(1).blob != second


def test_the_plan_says_what_leaves_and_how_large_it_is() -> None:
    for said, words in (
        ({"encoding": "int8"}, "rounded at random to 8 bits"),
        ({"encoding": "top-k", "level": 3}, "packed at level 3, at most"),
        ({}, "of float32"),
    ):
        study = study_with(**said)
        price = cost(study)
        assert price.bytes_per_round == most_bytes(study, sent_specs(study))
        text = "\n".join(describe(study, price))
        assert words in text
        assert size_in_words(price.bytes_per_round) in text
