"""Reads the tensors of a safetensors file, through an open file and without mapping it into memory.

The package safetensors opens a file by its name and maps it by default. A mapped file that is cut short kills the
process (SIGBUS), and a file that a training run has just deleted has no name. An open file has neither problem."""

import math
import os
from typing import BinaryIO

import torch

from nanometa.common.errors import UserError
from nanometa.common.files import is_count, parse_json

# The dtypes of weights, optimizer states and masks. Others, such as float8, belong to quantized weights.
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
HEADER_BYTES = 10**8  # the format's own limit


def read_tensors(file: BinaryIO) -> dict[str, torch.Tensor]:
    """Returns the tensors of a safetensors file by name, on the CPU.

    The file consists of the length of a JSON header (8 bytes, little-endian), the header, and the numbers of all
    tensors. Raises UserError, naming the file, if it is damaged or has tensors of another dtype than DTYPES."""
    try:
        start, entries = _read_header(file)
        tensors, begin = {}, 0  # begin: of the next tensor, counted from the end of the header
        file.seek(start)
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            if entry["dtype"] not in DTYPES:
                raise UserError(
                    f"{name} in {file.name} has the dtype {entry['dtype']}, which cannot be read: use weights of "
                    f"float32, float16 or bfloat16, which are not quantized."
                )
            dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
            size = math.prod(shape) * dtype.itemsize if all(map(is_count, shape)) else -1
            if size < 0 or entry["data_offsets"] != [begin, begin + size]:
                raise ValueError(f"the place of {name} does not fit its shape")
            if start + begin + size > os.fstat(file.fileno()).st_size:  # checked before memory is allocated
                raise ValueError(f"it ends within {name}")
            content = torch.empty(size, dtype=torch.uint8)
            if file.readinto(content.numpy()) < size:
                raise ValueError(f"it was cut short while {name} was read")
            tensors[name] = content.view(dtype).reshape(shape)
            begin += size
        if file.read(1):
            raise ValueError("it goes on after its last tensor")
        return tensors
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{file.name} is damaged ({type(error).__name__}: {reason}): use another one.") from error


def _read_header(file: BinaryIO) -> tuple[int, dict]:
    """Returns the position of the first tensor, and the dtype, shape and data_offsets of every tensor by name."""
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if length > min(HEADER_BYTES, os.fstat(file.fileno()).st_size - 8):
        raise ValueError("it ends within its header")

    def unique(pairs: list[tuple]) -> dict:
        if len(entries := dict(pairs)) < len(pairs):
            raise ValueError("its header has an entry twice")
        return entries

    entries = parse_json(file.read(length), object_pairs_hook=unique)
    entries.pop("__metadata__", None)
    return 8 + length, entries
