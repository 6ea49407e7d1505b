"""The KV cache: keys and values of tokens already read, for the attention of new tokens."""

import itertools
import math

import torch
import torch.nn.functional as F

from nanometa.config import GPTConfig
from nanometa.layers.rope import attend_dynamic, attend_one
from nanometa.meta_attention import causal_sdpa


class Store:
    """The KV cache of one attention in every block, for B sequences: keys and values, for each layer (B, S, H, D).

    Keys are stored rotated, except under rope_dynamic, where every new token rotates all of them again."""

    def __init__(
        self, cfg: GPTConfig, B: int, S: int, dtype: torch.dtype, device: torch.device, window: int | None = None
    ):
        """window: number of most recent keys that a query attends to; None for all previous keys."""
        size = (B, S, cfg.n_head, cfg.n_embd // cfg.n_head)
        # zeros instead of empty memory: a masked key has weight 0, but 0 * NaN is NaN
        self.k, self.v = ([torch.zeros(size, dtype=dtype, device=device) for _ in range(cfg.n_layer)] for _ in range(2))
        self.dtype, self.device = dtype, device
        self.used, self.window = [0] * B, window
        self.cfg, self.positions = cfg, torch.zeros(B, S, dtype=torch.long, device=device)

    def place(
        self, rows: list[int], positions: list[int], lengths: list[int], stored: list[bool] | None = None
    ) -> None:
        """Assigns a cache slot to every token of a packed row, and plans the attention calls that `attend` will make.

        rows: the sequence that each token belongs to.
        positions: the position by which RoPE rotates each token.
        lengths: the length of the token's text up to and including it.
        stored: whether the token's key and value enter the cache; None: those of all tokens. The others only read. A
            token without any key to read is given slot 0, and `read` tells the layer to discard its output.

        Sets `calls` to one tuple (start, end, sequences, keys, mask) for each attention call. A call computes the
        tokens start .. end - 1, which are either several tokens of one sequence or one token of each of several
        sequences. `sequences` is the slice of these sequences, `keys` the number of cached keys that they read. A
        prompt reads only its own keys, and its tuple is (start, end, None, 0, None)."""
        B, S = self.k[0].shape[:2]
        self.calls: list[tuple[int, int, slice | None, int, torch.Tensor | None]] = []
        slots, reads, n = [], [], 0
        for row, group in itertools.groupby(rows):
            count, used = len(list(group)), self.used[row]
            new = [True] * count if stored is None else stored[n : n + count]
            *_, self.used[row] = seen = list(itertools.accumulate(new, initial=used))
            slots += range(row * S + used, row * S + self.used[row])
            reads += [keys > 0 for keys in seen[1:]]
            seen = [max(keys, 1) for keys in seen[1:]]  # number of cached keys that each token sees
            if used == 0 and stored is None:
                self.calls.append((n, n + count, None, 0, None))
            elif self.cfg.rope_dynamic:  # every token has its own scale, so it needs its own call
                for i, keys in enumerate(seen):
                    mask = self._mask([keys])
                    mask = None if mask is None else mask[None, None]  # (1, 1, 1, keys)
                    self.calls.append((n + i, n + i + 1, slice(row, row + 1), keys, mask))
            else:
                mask = self._mask(seen)
                mask = None if mask is None else mask[None, None]  # (1, 1, count, keys)
                self.calls.append((n, n + count, slice(row, row + 1), seen[-1], mask))
            n += count
        self.slots = torch.tensor(slots, device=self.device, dtype=torch.long)
        self.reads = torch.tensor([reads], device=self.device, dtype=torch.bool)  # (1, N)
        if self.cfg.rope_dynamic:
            self.at = torch.tensor([positions, lengths], device=self.device, dtype=torch.long)  # (2, N)
            new = self.at[0] if stored is None else self.at[0, [n for n, kept in enumerate(stored) if kept]]
            self.positions.flatten().index_copy_(0, self.slots, new)
        tokens_of = [(call[1] - call[0], call[2]) for call in self.calls[:B]]
        if B > 1 and tokens_of == [(1, slice(row, row + 1)) for row in range(B)]:
            # the first B calls are one token of every sequence: merge them into one batched call
            lengths = [call[3] for call in self.calls[:B]]
            mask = self._mask(lengths)
            mask = None if mask is None else mask[:, None, None]  # (B, 1, 1, keys)
            self.calls[:B] = [(0, B, slice(0, B), max(lengths), mask)]

    def _mask(self, lengths: list[int]) -> torch.Tensor | None:
        """Returns the additive mask (queries, keys) for queries that follow different numbers of keys.

        Query i sees the first lengths[i] keys, or only the last `window` of them. The mask has max(lengths) columns.
        Returns None if every query sees every key."""
        longest = max(lengths)
        if min(lengths) == longest and (self.window is None or longest <= self.window):
            return None
        keys, lengths = torch.arange(longest), torch.tensor(lengths)[:, None]
        hidden = keys >= lengths
        if self.window is not None:
            hidden |= keys < lengths - self.window
        return torch.zeros(hidden.shape, dtype=self.dtype).masked_fill(hidden, -math.inf).to(self.device)

    def attend(self, layer: int, q, k, v):
        """Computes the attention of one layer for the tokens given to `place`; it replaces causal_sdpa.

        Takes q, k, v (1, H, N, D) of these tokens, stores k and v in the cache, and returns (1, H, N, D). Of tokens
        that are not stored it takes only q."""
        if not self.calls:
            return q  # no token: q is empty
        self.write(layer, k, v)
        out = []
        for start, end, rows, keys, mask in self.calls:
            part = q[:, :, start:end]
            if rows is None:
                prompt = (part, k[:, :, start:end], v[:, :, start:end])
                if self.cfg.rope_dynamic:
                    y = attend_dynamic(*prompt, *self.at[:, None, start:end], self.cfg, self.window)
                else:
                    y = causal_sdpa(*prompt, dropout_p=0.0, window=self.window)
            else:
                several = rows.stop - rows.start > 1
                part = part.transpose(0, 2) if several else part
                cached = [x[layer][rows, :keys].transpose(1, 2) for x in (self.k, self.v)]  # (B, H, keys, D)
                if self.cfg.rope_dynamic:
                    positions, lengths = self.at[:, start:end]
                    y = attend_one(
                        part, *cached, positions[:, None], self.positions[rows, :keys], lengths, self.cfg, mask
                    )
                else:
                    y = F.scaled_dot_product_attention(part, *cached, attn_mask=mask)
                y = y.transpose(0, 2) if several else y
            out.append(y)
        return out[0] if len(out) == 1 else torch.cat(out, dim=2)

    def write(self, layer: int, k, v) -> None:
        """Stores k and v (1, H, N, D) of the tokens given to `place`, as far as they are stored."""
        for cache, new in ((self.k[layer], k), (self.v[layer], v)):
            cache.flatten(0, 1).index_copy_(0, self.slots, new[0].transpose(0, 1))

    def read(self, layer: int, q, k, v) -> tuple[torch.Tensor, torch.Tensor]:
        """Replaces read_sdpa: returns what `attend` does, and whether each token has a key to read (1, N)."""
        return self.attend(layer, q, k, v), self.reads

    @property
    def nbytes(self) -> int:
        """The bytes of all keys and values, free slots included."""
        return sum(part.nbytes for part in (*self.k, *self.v))

    @property
    def room(self) -> int:
        """The number of slots of each sequence, free ones included."""
        return self.k[0].size(1)

    def clear(self, row: int) -> None:
        """Empties the cache of a sequence, which starts again at position 0."""
        self.used[row] = 0

    def evict(self) -> None:
        """Frees nothing: every position may be read for ever."""

    def keep(self, rows: list[int]) -> None:
        """Drops the cache of every sequence except those listed."""
        self.k, self.v = ([part[rows] for part in of] for of in (self.k, self.v))
        self.positions = self.positions[rows]
        self.used = [self.used[row] for row in rows]


class RunningSums:
    """The sums of the values of all tokens read, (n_layer, B, C) in fp32, from which MetaMeanAttention continues."""

    def __init__(self, cfg: GPTConfig, B: int, device: torch.device):
        self.sums, self.used = torch.zeros(cfg.n_layer, B, cfg.n_embd, device=device), [0] * B

    def place(self, rows: list[int]) -> None:
        """Plans the calls of `mean` for a packed row. rows: the sequence that each token belongs to.

        Sets `calls` to one tuple (start, end, sequence, number of its tokens read before) for each group of tokens."""
        self.calls, n = [], 0
        for row, group in itertools.groupby(rows):
            count = len(list(group))
            self.calls.append((n, n + count, row, self.used[row]))
            self.used[row] += count
            n += count

    def mean(self, layer: int, values: torch.Tensor) -> torch.Tensor:
        """Replaces running_mean for the tokens given to `place`: takes their values (1, N, C), returns (1, N, C)."""
        out = []
        for start, end, row, used in self.calls:
            sums = values[0, start:end].cumsum(0, dtype=torch.float32)
            if used:
                sums += self.sums[layer, row]
            self.sums[layer, row] = sums[-1]
            out.append(sums / torch.arange(used + 1, used + 1 + end - start, device=sums.device)[:, None])
        return torch.cat(out)[None]

    def clear(self, row: int) -> None:
        """Forgets the sums of a sequence, which starts again at position 0."""
        self.used[row] = 0

    def evict(self) -> None:
        """Frees nothing: a mean has no positions."""

    def keep(self, rows: list[int]) -> None:
        """Drops the sums of every sequence except those listed."""
        self.sums, self.used = self.sums[:, rows], [self.used[row] for row in rows]
