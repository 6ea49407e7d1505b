"""Tests the reading of safetensors files, intact and damaged."""

import json
import os
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch

from nanometa.common.errors import UserError
from nanometa.training.tensor_files import read_tensors


def tensors_file(folder, header, numbers: bytes):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / "t.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + numbers)
    return open(folder / "t.safetensors", "rb")


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "numbers", "reason"),
    [
        ({"a": ONE}, bytes(7), "it ends within a"),
        ({"a": ONE}, bytes(9), "it goes on after its last tensor"),
        ({"a": ONE, "b": ONE}, bytes(8), "the place of b does not fit its shape"),
        ({"a": {**ONE, "data_offsets": [4, 12]}}, bytes(12), "the place of a does not fit"),
        ({"a": {**ONE, "shape": [2**40, 2**40]}}, bytes(8), "the place of a does not fit"),
        ({"a": {**ONE, "shape": [-2]}}, bytes(8), "the place of a does not fit"),
        ({"a": {**ONE, "shape": "ab"}}, bytes(8), "the place of a does not fit"),
        ({"a": {**ONE, "shape": 2}}, bytes(8), "TypeError"),
        ({"a": {"dtype": "F32"}}, bytes(8), "KeyError"),
        ({"a": {**ONE, "data_offsets": None}, "b": ONE}, bytes(8), "TypeError"),
        ({"a": 3}, bytes(8), "TypeError"),
        ([], b"", "is damaged"),
        (b"{", b"", "is damaged"),
        (b"[" * 100_000, b"", "nested too deeply"),
        (json.dumps({"a": ONE})[:-1].encode() + b"," + json.dumps({"a": ONE})[1:].encode(), bytes(8), "an entry twice"),
        ({"a": {**ONE, "dtype": "F8_E4M3"}}, bytes(8), "a in .* has the dtype F8_E4M3, .* not quantized"),
        ({"a": {**ONE, "dtype": None}}, bytes(8), "has the dtype None"),
    ],
)  # fmt: skip
def test_damaged_tensor_files_are_refused_with_their_name(tmp_path, header, numbers, reason):
    with tensors_file(tmp_path, header, numbers) as file, pytest.raises(UserError, match=reason) as caught:
        read_tensors(file)
    assert "t.safetensors" in str(caught.value)


def test_a_tensor_file_that_is_cut_short_while_it_is_read_is_refused(tmp_path, monkeypatch):
    """If the file were memory-mapped, the process would be killed."""
    with tensors_file(tmp_path, {"a": ONE}, bytes(8)) as file:
        size = os.stat(file.name).st_size
        os.truncate(file.name, size - 4)
        monkeypatch.setattr(os, "fstat", lambda handle: SimpleNamespace(st_size=size))
        with pytest.raises(UserError, match="t.safetensors is damaged .*it was cut short while a was read"):
            read_tensors(file)


def test_tensors_are_those_that_the_package_reads(tmp_path):
    torch.manual_seed(0)
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
              torch.int8, torch.uint8, torch.bool)  # fmt: skip
    saved = {f"t{i}": (torch.rand(3, 4) * 100).to(dtype) for i, dtype in enumerate(dtypes)}
    saved |= {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 7), "line": torch.arange(5.0)}
    safetensors.torch.save_file(saved, tmp_path / "t.safetensors", {"format": "pt"})
    with open(tmp_path / "t.safetensors", "rb") as file:
        for _ in range(2):
            found = read_tensors(file)
            assert found.keys() == saved.keys()
            for name, tensor in saved.items():
                assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    (tmp_path / "t.safetensors").write_bytes(b"")
    with open(tmp_path / "t.safetensors", "rb") as file, pytest.raises(UserError, match="ends within its header"):
        read_tensors(file)
