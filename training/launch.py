"""Reads the environment variables in which torchrun tells every process its place among the processes of a run."""

import os
import re

from nanometa.common.errors import UserError

RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
MOST = 2**20  # processes of a run
CURE = f"start train.py with torchrun, or unset {' '.join(RANKS)} to train with a single process."


def under_torchrun() -> bool:
    """Returns whether torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def ranks() -> tuple[int, int, int]:
    """Returns (rank, local_rank, world) as torchrun sets them; without torchrun there is one process: (0, 0, 1).

    Raises UserError if a variable is missing beside the others or has an impossible value."""
    if not under_torchrun() and not any(map(os.environ.get, RANKS)):
        return 0, 0, 1
    world = _number("WORLD_SIZE", 1, MOST)
    rank, local_rank = (_number(name, 0, world - 1, f" with WORLD_SIZE={world}") for name in ("RANK", "LOCAL_RANK"))
    if joins_group(world):
        _text("MASTER_ADDR")
        _number("MASTER_PORT", 1, 2**16 - 1)
    if os.environ.get("TORCHELASTIC_RESTART_COUNT"):
        _number("TORCHELASTIC_RESTART_COUNT", 0, MOST)
    return rank, local_rank, world


def joins_group(world: int) -> bool:
    """Returns whether this process joins a process group, which it does under torchrun even if it is alone."""
    return world > 1 or under_torchrun()


def _text(name: str) -> str:
    """Returns a variable. Raises UserError if it is missing or empty."""
    if text := os.environ.get(name):
        return text
    given = [f"{other}={os.environ[other]}" for other in (*RANKS, "TORCHELASTIC_RUN_ID") if os.environ.get(other)]
    raise UserError(f"the environment variable {name} is missing beside {' and '.join(given)}: {CURE}")


def _number(name: str, least: int, most: int, why: str = "") -> int:
    """Returns a variable as a number. Raises UserError unless it is a whole number in least .. most."""
    text = _text(name)
    if not re.fullmatch(r"[0-9]{1,9}", text) or not least <= int(text) <= most:
        raise UserError(
            f"the environment variable {name}={text!r} is out of range: it must be a whole number in {least} .. {most}"
            f"{why}; {CURE}"
        )
    return int(text)
