"""Reads pieces of text as a run was trained to read, and scores their tokens given whole or short contexts."""

import numpy as np
import torch

from nanometa.common.keyed_random import stable_key
from nanometa.data.layout import IGNORE, Batch, batch_of, connected_positions, draw_of, places_of, targets_of
from nanometa.data.markers import MarkerScheme, placing_of
from nanometa.evals.common import POSITIONS, check_finite
from nanometa.evals.perplexity import marked
from nanometa.inference.scoring import score_batch
from nanometa.layers.scores import score_hidden
from nanometa.layers.short_contexts import short_contexts, short_states
from nanometa.training.checkpoint import Run, content_per_window


class PieceReader:
    """Reads pieces of content of at most `size` tokens, with markers and limits as in the training of a run.

    Each piece has its own draw of the places of markers, which depends on its number."""

    def __init__(self, run: Run, size: int):
        self.run, self.data = run, run.state["data"]
        window = content_per_window(run.state, run.config)
        chunks = window // self.data["chunk_content"]
        placing, markers = placing_of(run.config, "val"), chunks * self.data["chunk_markers"]
        self.scheme, self.draw = MarkerScheme(placing, run.tokenizer, window, markers), draw_of(run.config, "val")
        self.windows = -(-size // window)  # of training, that a piece fills
        self.most = None  # largest number of segments that are closed in a piece
        if run.config.markers.places_markers and self.scheme.marks:
            self.most = (run.config.model.block_size - window) // len(self.scheme.marks) * self.windows

    def batch(self, number: int, ids: np.ndarray) -> Batch:
        """Returns the Batch of a piece, content ids (P,), on the model's device. Its targets are the last P - 1 tokens.

        number: the number of the piece, on which random draws depend."""
        if M := self.data["chunk_markers"]:
            how = self.data["injection"], self.data["chunk_content"], M, stable_key("pieces", number)
            ids = marked(ids, *how, self.run.tokenizer.meta)
        first = number * self.windows * self.scheme.content  # so that no two pieces share a window's draws
        layout = self.scheme.lay_out(ids, first, most=self.most)
        targets = targets_of(layout, self.run.config.target_rule, counted=layout.content > first)
        index = connected_positions([layout], self.scheme.closing, np.array([number]), self.draw)
        batch = batch_of([layout], [targets], index, hides=self.run.config.markers.hides)
        return batch.to(self.run.model.wte.weight.device)

    def whole_nats(self, batch: Batch) -> np.ndarray:
        """Returns the nats (P - 1,) of the targets of a piece, each given all of the piece before it."""
        scores = score_batch(self.run.model, batch)
        return self._checked(scores.nats[scores.targets != IGNORE])

    @torch.no_grad()
    def short_nats(self, batch: Batch, length: int, stride: int) -> np.ndarray:
        """Returns the nats (P - 1,) of the targets, each predicted at the end of a short context; NaN without one.

        Contexts have length - stride + 1 .. length positions, markers included (layers/short_contexts.py). Targets that
        are predicted at the first `length` positions have none."""
        T, targets = batch.tokens.size(1), batch.targets.cpu().numpy()
        scored = np.flatnonzero(targets != IGNORE)
        nats = np.full(len(scored), np.nan)
        if T <= length:
            return nats
        contexts, model = short_contexts(T, length, stride), self.run.model
        states = short_states(model, batch.inputs, contexts, at_once=max(1, POSITIONS // length))
        index = torch.from_numpy(places_of(targets[:, length:] != IGNORE)).to(batch.tokens.device)
        scores = score_hidden(model, states, batch.targets[:, length:], index)
        nats[scored >= length] = self._checked(scores.nats[scores.targets != IGNORE])
        return nats

    def _checked(self, nats: torch.Tensor) -> np.ndarray:
        """Returns nats as float64. Raises UserError if one is not finite."""
        found = nats.cpu().double().numpy()
        check_finite(self.run, found)
        return found
