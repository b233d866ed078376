"""Safetensors headers: what is taken, what is refused and why, and that nothing else can happen."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.errors import CheckpointInvalid
from tests.unit.workers.fetch.tiny_checkpoint import write_raw, write_tensors
from workers.fetch import safetensors_header
from workers.fetch.safetensors_header import NonFinite, read_header, scan_nonfinite


def entry(begin: int, end: int, shape: list[Any] | None = None, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


def refuse(path: Path) -> CheckpointInvalid:
    """Return the refusal of a file, which must name the file."""
    with pytest.raises(CheckpointInvalid) as caught:
        read_header(path)
    assert caught.value.details["file"] == path.name
    assert path.name in caught.value.message
    return caught.value


def test_tensors_come_in_the_order_of_their_bytes(tmp_path: Path) -> None:
    header = {"b": entry(8, 16), "a": entry(0, 8, [2, 1]), "__metadata__": {"format": "pt"}}
    read = read_header(write_raw(tmp_path / "m.safetensors", header, bytes(16)))
    begin = 8 + len(json.dumps(header))
    assert [(each.name, each.shape, each.begin_byte, each.size_bytes, each.elements) for each in read.tensors] == [
        ("a", (2, 1), begin, 8, 2),
        ("b", (2,), begin + 8, 8, 2),
    ]


def test_padding_and_empty_tensors_are_part_of_the_format(tmp_path: Path) -> None:
    header = json.dumps({"a": entry(0, 0, [0, 4]), "b": entry(0, 4)}).encode() + b"    "
    assert len(read_header(write_raw(tmp_path / "m.safetensors", header, bytes(4))).tensors) == 2


REFUSED: dict[str, tuple[Any, int, str]] = {
    "no JSON": (b"{not json", 0, "not JSON"),
    "not UTF-8": (b'{"\xff": 1}', 0, "not JSON"),
    "a list": (b"[1, 2]", 0, "does not begin with"),
    "nested for ever": (b'{"a":' + b"[" * 100_000, 0, "not JSON"),
    "no tensors": ({"__metadata__": {}}, 0, "no tensors"),
    "metadata of numbers": ({"__metadata__": {"a": 1}, "a": entry(0, 4)}, 4, "__metadata__"),
    "twice": (b'{"a": 1, "a": 2}', 0, "twice"),
    "empty name": ({"": entry(0, 4)}, 4, "name"),
    "unprintable name": ({"a\x1b[2J": entry(0, 4)}, 4, "name"),
    "endless name": ({"a" * 513: entry(0, 4)}, 4, "name"),
    "not an object": ({"a": [1]}, 4, "exactly the fields"),
    "field missing": ({"a": {"dtype": "F32", "shape": [1]}}, 4, "exactly the fields"),
    "field too many": ({"a": {**entry(0, 4), "file": "/etc/passwd"}}, 4, "exactly the fields"),
    "float64": ({"a": entry(0, 8, [1], "F64")}, 8, "save the weights as float32"),
    "float8": ({"a": entry(0, 1, [1], "F8_E4M3")}, 1, "quantized already"),
    "integers": ({"a": entry(0, 8, [1], "I64")}, 8, "weights are floating point"),
    "unknown dtype": ({"a": entry(0, 8, [1], "Q4_K")}, 8, "no such dtype"),
    "dtype of another type": ({"a": {**entry(0, 4), "dtype": ["F32"]}}, 4, "not a text"),
    "negative dimension": ({"a": entry(0, 4, [-1])}, 4, "non-negative"),
    "true as dimension": ({"a": entry(0, 4, [True])}, 4, "non-negative"),
    "fraction as dimension": ({"a": entry(0, 4, [1.0])}, 4, "non-negative"),
    "many dimensions": ({"a": entry(0, 4, [1] * 9)}, 4, "non-negative"),
    "terabytes": ({"a": entry(0, 4 * 2**41, [2**41])}, 4, "it is truncated"),
    "product overflows": ({"a": entry(0, 4, [2**40, 2**40])}, 4, "claims more than"),
    "product wraps to zero": ({"a": entry(0, 0, [2**32, 2**32])}, 0, "claims more than"),
    "three offsets": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, 4, "begin and an end"),
    "backwards": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, 4, "begin and an end"),
    "negative offset": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}, 4, "begin and an end"),
    "size differs from shape": ({"a": entry(0, 8, [1])}, 8, "needs 4 bytes"),
    "overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "overlaps tensor 'a'"),
    "the same bytes twice": ({"a": entry(0, 8), "b": entry(0, 8)}, 8, "overlaps tensor 'a'"),
    "gap": ({"a": entry(0, 4), "b": entry(8, 12)}, 12, "leaves a gap of 4 bytes"),
    "late begin": ({"a": entry(4, 8)}, 8, "leaves a gap of 4 bytes"),
    "data missing": ({"a": entry(0, 8)}, 7, "it is truncated"),
    "data left over": ({"a": entry(0, 8)}, 9, "1 bytes after its last tensor"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_each_defect_is_refused_with_its_reason(tmp_path: Path, case: str) -> None:
    header, data_bytes, reason = REFUSED[case]
    assert reason in refuse(write_raw(tmp_path / "model.safetensors", header, bytes(data_bytes))).message


def test_a_refusal_names_the_tensor(tmp_path: Path) -> None:
    error = refuse(write_raw(tmp_path / "m.safetensors", {"good": entry(0, 4), "bad": entry(4, 8, [3])}, bytes(8)))
    assert error.details["tensor"] == "bad"
    assert "'bad'" in error.message


@pytest.mark.parametrize("size_bytes", [0, 7, 8, 100])
def test_a_file_shorter_than_its_header_is_truncated(tmp_path: Path, size_bytes: int) -> None:
    path = tmp_path / "m.safetensors"
    write_tensors(path, {"a": np.ones((4, 4), np.float32)})
    path.write_bytes(path.read_bytes()[:size_bytes])
    assert "truncated" in refuse(path).message


@pytest.mark.parametrize("claimed", [16 * 2**20 + 1, 2**40, 2**64 - 1])
def test_a_header_that_claims_terabytes_is_not_read(tmp_path: Path, claimed: int) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(struct.pack("<Q", claimed) + b"{}")
    assert "claims a header" in refuse(path).message


def test_the_number_of_tensors_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_header, "MAX_TENSORS", 3)
    write_tensors(tmp_path / "three.safetensors", {str(index): np.ones(1, np.float32) for index in range(3)})
    assert len(read_header(tmp_path / "three.safetensors").tensors) == 3
    write_tensors(tmp_path / "four.safetensors", {str(index): np.ones(1, np.float32) for index in range(4)})
    assert "at most 3" in refuse(tmp_path / "four.safetensors").message


def test_hostile_nesting_is_refused_before_it_is_built(tmp_path: Path) -> None:
    text = b'{"a": [' + b"[]," * 1_000_000 + b"[]]}"
    assert "more than 200000 tensors" in refuse(write_raw(tmp_path / "m.safetensors", text)).message


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_counted_by_tensor(tmp_path: Path, dtype: str, value: float) -> None:
    size = 600_000  # more than one block, so that block borders are crossed
    spoilt = np.ones(size, np.float32)
    spoilt[[0, 1, size // 2, size - 1]] = value
    largest = np.full(7, {"BF16": 3.3e38, "F16": 65504.0, "F32": 3.4e38}[dtype], np.float32)
    tensors = {"odd": np.ones(3, np.float32), "spoilt": spoilt, "largest": largest}
    header = read_header(write_tensors(tmp_path / "m.safetensors", tensors, dtype))
    done: list[int] = []
    assert scan_nonfinite(header, done.append) == [NonFinite("spoilt", 4)]
    assert sum(done) == sum(tensor.size_bytes for tensor in header.tensors)


def test_a_file_that_shrinks_during_the_scan_is_refused(tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "m.safetensors", {"a": np.ones(100, np.float32)})
    header = read_header(path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointInvalid, match="became shorter"):
        scan_nonfinite(header, lambda size_bytes: None)


STEADY = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-4, 2**70) | st.floats() | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=6,
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F16", "F64", "I8"]) | JSON_VALUES,
        "shape": st.lists(st.integers(-1, 4), max_size=3) | JSON_VALUES,
        "data_offsets": st.lists(st.integers(-1, 40), min_size=2, max_size=2) | JSON_VALUES,
    }
)
HEADERS = st.dictionaries(st.sampled_from(["a", "b", "c", "__metadata__"]), ENTRIES | JSON_VALUES, max_size=3)


@settings(STEADY, max_examples=150)
@given(header=HEADERS.map(lambda each: json.dumps(each).encode()) | st.binary(max_size=60), data=st.binary(max_size=40))
def test_any_file_is_either_covered_by_its_tensors_or_refused(tmp_path: Path, header: bytes, data: bytes) -> None:
    path = write_raw(tmp_path / "m.safetensors", header, data)
    try:
        read = read_header(path)
    except CheckpointInvalid:
        return
    assert sum(tensor.size_bytes for tensor in read.tensors) == len(data)


@settings(STEADY, max_examples=100)
@given(position=st.integers(0, 400), byte=st.integers(0, 255))
def test_one_changed_byte_never_surprises(tmp_path: Path, position: int, byte: int) -> None:
    path = write_tensors(tmp_path / "m.safetensors", {"a": np.ones((4, 4)), "b": np.ones(5)})
    spoilt = bytearray(path.read_bytes())
    spoilt[position % len(spoilt)] = byte
    path.write_bytes(bytes(spoilt))
    try:
        header = read_header(path)
    except CheckpointInvalid:
        return
    scan_nonfinite(header, lambda size_bytes: None)
