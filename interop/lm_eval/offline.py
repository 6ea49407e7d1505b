"""Reads the texts of the lm-eval tasks from the JSON lines beside this file. lm-eval calls these functions."""

import json
from pathlib import Path

from datasets import Dataset


def _texts(name: str) -> dict[str, Dataset]:
    """Returns the only split of a task."""
    lines = (Path(__file__).parent / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}


def bits_per_byte(**metadata):
    return _texts("nanometa_bits_per_byte")


def passkey(**metadata):
    return _texts("nanometa_passkey")


def list_recall(**metadata):
    return _texts("nanometa_list_recall")


def segment_counting(**metadata):
    return _texts("nanometa_segment_counting")


def parity(**metadata):
    return _texts("nanometa_parity")


def copying(**metadata):
    return _texts("nanometa_copying")
