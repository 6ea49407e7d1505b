"""Gives the targets of a text a short context: the model reads windows of the text as texts of their own.

Two papers compare such losses with those under the whole context: "Token Weighting for Long-Range Language Modeling"
(arXiv 2503.09202) and "What is Wrong with Perplexity for Long-context Language Modeling?" (LongPPL, arXiv 2410.23771).
"""

from typing import NamedTuple

import torch

from nanometa.data.layout import FOREVER


class ShortContexts(NamedTuple):
    """Windows of one length, and the state that stands for each position of the text."""

    starts: torch.Tensor  # (W,) int64, the first position of each window, increasing
    length: int  # positions in a window
    first: int  # the first position of the text that the windows serve
    state: torch.Tensor  # (T - first,) int64, its place among the W * length states of all windows


def short_contexts(T: int, length: int, stride: int, whole: bool = False) -> ShortContexts:
    """Returns the windows that give every position a context of length - stride + 1 .. length positions.

    T: positions of the text; a context includes the position itself. Each window serves its last `stride` positions,
    and the last window ends with the text. The first `length` positions have no other context than the text's own: they
    are left out, or, if whole is true, the first window serves all its positions.
    Raises ValueError unless 1 <= stride <= length <= T."""
    if not 1 <= stride <= length <= T:
        raise ValueError(f"stride {stride} and length {length} do not satisfy 1 <= stride <= length <= {T}")
    served = torch.arange(length, T)
    number = (served - length) // stride  # of the window that serves each position
    starts = ((torch.arange(-((length - T) // stride)) + 1) * stride).clamp(max=T - length)
    state = number * length + served - starts[number]
    if whole:
        starts = torch.cat((torch.zeros(1, dtype=torch.int64), starts))
        state = torch.cat((torch.arange(length), state + length))
    return ShortContexts(starts, length, 0 if whole else length, state)


def cut_windows(inputs: tuple[torch.Tensor | None, ...], contexts: ShortContexts) -> tuple[torch.Tensor | None, ...]:
    """Returns the arguments of the model for all windows of all texts, (B * W, length) each.

    inputs: tokens, positions, meta_index, reads_from and read_until of a Batch of B texts. The windows of a text are
    adjacent. In every window, positions restart at 0, and what came before it cannot be read."""
    tokens, positions, meta_index, reads_from, read_until = inputs
    T, K, starts = tokens.size(1), contexts.length, contexts.starts.to(tokens.device)
    places = starts[:, None] + torch.arange(K, device=tokens.device)  # (W, K)
    tokens, positions = tokens[:, places], positions[:, places]  # (B, W, K)
    positions = positions - positions[..., :1]
    if meta_index is not None:
        local = meta_index[:, None] - starts[:, None]  # (B, W, M)
        inside = (local >= 0) & (local < K) & (meta_index[:, None] < T)
        meta_index = torch.where(inside, local, K).sort(-1).values[..., :K].flatten(0, 1)
    if reads_from is not None:
        reads_from = (reads_from[:, places] - starts[:, None]).clamp(min=0).flatten(0, 1)
    if read_until is not None:
        until = read_until[:, places]
        read_until = torch.where(until == FOREVER, until, until - starts[:, None]).flatten(0, 1)
    return tokens.flatten(0, 1), positions.flatten(0, 1), meta_index, reads_from, read_until


def short_states(model, inputs: tuple, contexts: ShortContexts, at_once: int | None = None) -> torch.Tensor:
    """Returns the final states (B, T - first, C) of a model at the served positions, each with its short context.

    inputs: as for cut_windows. at_once: windows of a text that are read in one forward pass; None = all."""
    B, parts = len(inputs[0]), contexts.starts.split(at_once or len(contexts.starts))
    read = [model(*cut_windows(inputs, contexts._replace(starts=part))).unflatten(0, (B, -1)) for part in parts]
    states = torch.cat(read, dim=1) if len(read) > 1 else read[0]  # joining a single part would copy it
    return states_of(states.flatten(0, 1), contexts)


def states_of(hidden: torch.Tensor, contexts: ShortContexts) -> torch.Tensor:
    """Returns the states (B, T - first, C) of the served positions, from those (B * W, length, C) of all windows."""
    rows = hidden.unflatten(0, (-1, len(contexts.starts))).flatten(1, 2)
    return rows[:, contexts.state.to(hidden.device)]
