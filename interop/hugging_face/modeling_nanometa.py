"""GPT-2 with meta-tokens (markers) and a second attention in every block, for transformers.

Each block computes x += attn(ln_1(x)), x += second_attn(ln_second(x)), x += mlp(ln_2(x)). The second attention connects
only some positions, usually the markers. Markers are never predicted.

Input ids become rows: the tokens of each text without its pads, and with its markers. Rows of a batch have different
lengths, and the shorter ones are filled up. The cache has a slot for every row. Its layers are those of the first
attention, then those of the second, and a last one that holds the kind of every slot.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_nanometa import MarkerPlan, NanoMetaConfig

EMPTY, TEXT, MARKER = 0, 1, 2  # kinds of rows and slots
# the name of the cache among inputs and outputs depends on the version of transformers
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


# ------------------------------------------------------------------------------------------------ markers


class ForceMarkers(LogitsProcessor):
    """Forces the marker wherever the plan has one. `generate` uses it if marker_placement is "explicit"."""

    def __init__(self, plan: MarkerPlan, marker_id: int, pads: torch.Tensor):
        """pads (B,): number of pads in each prompt."""
        self.plan, self.marker_id, self.pads = plan, marker_id, pads

    def __call__(self, input_ids, scores):
        pads = self.pads.repeat_interleave(len(input_ids) // len(self.pads))  # several beams or samples of a prompt
        flags = self.plan.until(input_ids.shape[1])
        forced = [flags[input_ids.shape[1] - n] for n in pads.tolist()]
        rows = torch.tensor(forced, device=scores.device)[:, None]
        only_marker = torch.full_like(scores, -math.inf)
        only_marker[:, self.marker_id] = 0
        return torch.where(rows, only_marker, scores)


# ------------------------------------------------------------------------------------------------ rotary positions


def rotary_speeds(cfg, device) -> torch.Tensor:
    """Returns the rotation of each pair of dimensions in radians per position, (D / 2,) fp32."""
    D, s = cfg.n_embd // cfg.n_head, cfg.rotary_factor
    d = torch.arange(0, D, 2, device=device, dtype=torch.float32)
    plain = cfg.rotary_base ** (-d / D)
    if cfg.rotary_scaling == "pi":
        return plain / s
    if cfg.rotary_scaling == "ntk":
        return plain * s ** (-d / (D - 2))
    if cfg.rotary_scaling == "yarn":
        return plain / s + yarn_kept_share(cfg, plain) * (plain - plain / s)
    return plain


def yarn_kept_share(cfg, plain: torch.Tensor) -> torch.Tensor:
    """Returns YaRN's gamma (D / 2,) (arXiv 2309.00071): 0 where a pair is fully interpolated, 1 where it is not."""
    L, fast, slow, half = cfg.rotary_original_window, cfg.yarn_beta_fast, cfg.yarn_beta_slow, len(plain)
    if cfg.yarn_ramp == "paper":
        return ((L * plain / (2 * math.pi) - slow) / (fast - slow)).clamp(0, 1)
    low, high = (half * math.log(L / (2 * math.pi * turns)) / math.log(cfg.rotary_base) for turns in (fast, slow))
    low, high = max(math.floor(low), 0), min(math.ceil(high), 2 * half - 1)
    numbers = torch.arange(half, device=plain.device, dtype=torch.float32)
    return 1 - ((numbers - low) / max(high - low, 0.001)).clamp(0, 1)


def rotary_tables(cfg, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns cos and sin, (B, 1, T, D / 2) fp32, for positions (B, T), both multiplied by YaRN's attention factor."""
    factor = 1.0
    if cfg.rotary_scaling == "yarn":
        factor = cfg.yarn_attention_factor
        factor = 0.1 * math.log(cfg.rotary_factor) + 1 if factor is None else factor
    angles = positions[:, None, :, None].float() * rotary_speeds(cfg, positions.device)
    return angles.cos() * factor, angles.sin() * factor


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Returns x (B, H, T, D) with each pair of dimensions d, d + D/2 rotated, computed in fp32."""
    x1, x2 = x.float().chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


# ------------------------------------------------------------------------------------------------ layers


class NanoMetaAttention(nn.Module):
    """Multi-head attention over the slots that a mask makes visible."""

    def __init__(self, cfg, layer: int):
        """layer: the layer of the cache that holds its keys and values."""
        super().__init__()
        self.cfg, self.layer = cfg, layer
        self.c_attn = nn.Linear(cfg.n_embd, 3 * cfg.n_embd, bias=cfg.bias)
        self.c_proj = nn.Linear(cfg.n_embd, cfg.n_embd, bias=cfg.bias)
        self.resid_dropout = nn.Dropout(cfg.dropout)

    def forward(self, x, rows, tables, visible, cache, uniform=None):
        """Returns the output (B, T, C) at the `rows` (B, T) that take part, and 0 elsewhere, for normed x (B, T, C).

        tables: cos and sin, or None. visible (B, T, S) bool; None: all earlier rows, no cache.
        uniform (B, T): rows whose queries are 0, so that they read the mean of what is visible."""
        B, T, C = x.shape
        taken = self.c_attn(x[rows])
        qkv = taken.new_zeros(B, T, 3 * C)
        qkv[rows] = taken
        q, k, v = (part.transpose(1, 2) for part in qkv.view(B, T, 3, self.cfg.n_head, -1).unbind(2))
        if tables is not None:
            q, k = rotate(q, *tables), rotate(k, *tables)
        if uniform is not None:
            q = q.masked_fill(uniform[:, None, :, None], 0)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        y = self.attend(q, k, v, visible).transpose(1, 2).reshape(B, T, C)
        out = torch.zeros_like(x)
        out[rows] = self.resid_dropout(self.c_proj(y[rows])).to(x.dtype)
        return out

    def attend(self, q, k, v, visible):
        """Returns the attention output (B, H, T, D)."""
        dropout = self.cfg.dropout if self.training else 0.0
        if self.cfg._attn_implementation != "eager":
            if visible is None:
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None], dropout_p=dropout)
        if visible is None:
            visible = torch.ones(1, q.size(2), k.size(2), dtype=torch.bool, device=q.device).tril()
        scores = (q @ k.mT) * q.size(-1) ** -0.5
        weights = scores.masked_fill(~visible[:, None], -math.inf).softmax(-1, dtype=torch.float32).to(q.dtype)
        return F.dropout(weights, dropout) @ v


class NanoMetaMLP(nn.Module):
    """The feed-forward layer of a block."""

    def __init__(self, cfg):
        super().__init__()
        self.c_fc = nn.Linear(cfg.n_embd, cfg.n_inner, bias=cfg.bias)
        self.c_proj = nn.Linear(cfg.n_inner, cfg.n_embd, bias=cfg.bias)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))


class NanoMetaBlock(nn.Module):
    """Causal attention, the second attention if the model has one, and an MLP."""

    def __init__(self, cfg, layer: int):
        super().__init__()
        norm = functools.partial(nn.LayerNorm, cfg.n_embd, bias=cfg.bias)
        self.ln_1, self.attn = norm(), NanoMetaAttention(cfg, layer)
        if cfg.second_connects != "nothing":
            self.ln_second, self.second_attn = norm(), NanoMetaAttention(cfg, cfg.n_layer + layer)
        self.ln_2, self.mlp = norm(), NanoMetaMLP(cfg)

    def forward(self, x, first, second, cache):
        """Maps x (B, T, C) to (B, T, C). first, second: arguments of the two attentions; second None: it adds 0."""
        x = x + self.attn(self.ln_1(x), **first, cache=cache)
        if second is not None:
            x = x + self.second_attn(self.ln_second(x), **second, cache=cache)
        return x + self.mlp(self.ln_2(x))


class NanoMetaModel(nn.Module):
    """Embeddings, blocks and the last LayerNorm, for rows that already contain their markers."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.wte = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        if cfg.position == "learned":
            self.wpe = nn.Embedding(cfg.window, cfg.n_embd)
        self.drop = nn.Dropout(cfg.dropout)
        self.h = nn.ModuleList(NanoMetaBlock(cfg, layer) for layer in range(cfg.n_layer))
        self.ln_f = nn.LayerNorm(cfg.n_embd, bias=cfg.bias)

    def forward(self, ids, kinds, past, cache, keep):
        """Returns a list of the final states (B, T, C) of ids (B, T), after ln_f.

        kinds (B, T): those of ids. past (B, P): the kinds of the slots that the cache holds.
        keep: puts the states before every block in front of the final ones."""
        cfg, rows = self.cfg, kinds != EMPTY
        slots = torch.cat([past, kinds], dim=1)  # (B, S)
        place = (slots != EMPTY).cumsum(1) - 1  # the position of every slot
        positions = place[:, past.size(1) :].clamp(min=0)
        unplaced = positions.masked_fill(kinds == MARKER, 0)
        x = self.wte(ids)
        first, second = {"rows": rows, "tables": None}, {"tables": None}
        if cfg.position == "learned":
            pos_emb = self.wpe(positions.masked_fill(~rows, 0))
            hidden = (kinds == MARKER) if cfg.meta_position == "none" else torch.zeros_like(rows)
            x = x + pos_emb.masked_fill(hidden[..., None], 0)
        else:
            first["tables"] = rotary_tables(cfg, unplaced if cfg.meta_position in ("none", "none_first") else positions)
            where = unplaced if cfg.meta_position in ("none", "none_second") else positions
            second["tables"] = rotary_tables(cfg, where)
        earlier = torch.ones(kinds.size(1), slots.size(1), dtype=torch.bool, device=x.device).tril(past.size(1))
        seen = earlier & (slots != EMPTY)[:, None]
        whole = past.size(1) == 0 and bool(rows.all())
        first["visible"] = None if whole else or_itself(seen)
        second = self.second(second, slots, place, past.size(1), rows, seen)
        x, states = self.drop(x), []
        for block in self.h:
            states += [x] if keep else []
            x = block(x, first, second, cache)
        return [*states, self.ln_f(x)]

    def second(self, inputs, slots, place, P, rows, seen):
        """Completes the arguments of the second attention; P: number of slots before the rows. None: it adds 0."""
        cfg = self.cfg
        if cfg.second_connects == "nothing":
            return None
        member = slots != EMPTY
        if cfg.second_connects == "markers":
            member = slots == MARKER
        elif cfg.second_connects == "random":
            member &= torch.isin(place, torch.tensor(cfg.random_positions, device=slots.device))
        visible, own = seen & member[:, None], member[:, P:]
        if cfg.second_window is not None:
            order = member.cumsum(1)
            visible &= order[:, P:, None] - order[:, None] < cfg.second_window
        if cfg.second_others == "mean":
            uniform = ~own
            visible = torch.where(uniform[..., None], seen, visible)
            return {**inputs, "rows": rows, "visible": or_itself(visible), "uniform": uniform}
        # with "read", rows that have no marker to read get exactly 0
        taking = rows & visible.any(-1) if cfg.second_others == "read" else own
        return {**inputs, "rows": taking, "visible": or_itself(visible)}


def or_itself(visible: torch.Tensor) -> torch.Tensor:
    """Returns the mask (B, T, S) in which rows that see nothing see their own slot, whose softmax is then defined."""
    T, S = visible.shape[1:]
    itself = torch.ones(T, S, dtype=torch.bool, device=visible.device).tril(S - T).triu(S - T)
    return visible | (itself & ~visible.any(-1, keepdim=True))


# ------------------------------------------------------------------------------------------------ the model


class NanoMetaForCausalLM(PreTrainedModel, GenerationMixin):
    """The language model with its tied head."""

    config_class = NanoMetaConfig
    base_model_prefix = "transformer"
    _no_split_modules = ["NanoMetaBlock"]  # noqa: RUF012
    _supports_sdpa = True
    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # noqa: RUF012

    def __init__(self, config: NanoMetaConfig):
        super().__init__(config)
        if config.marker_placement not in ("implicit", "explicit", "none"):
            raise ValueError(f"marker_placement={config.marker_placement!r} must be implicit, explicit or none.")
        if config.marker_placement != "none" and not config.marker_count:
            raise ValueError(
                f"marker_placement={config.marker_placement} needs a rule that places markers, and this model has "
                f"none: use marker_placement=none."
            )
        self.plan = MarkerPlan(
            config.marker_injection, config.marker_content, config.marker_count, int(config.marker_key)
        )
        self.transformer = NanoMetaModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.transformer.wte

    def set_input_embeddings(self, value):
        self.transformer.wte = value

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        cache=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        output_hidden_states=None,
        return_dict=None,
        past_key_values=None,
        **kwargs,
    ):
        """Returns logits (B, T, vocab_size) fp32 for input_ids (B, T): column t predicts the text token after it.

        attention_mask (B, past + T): 0 for pads, which may be anywhere. Positions are counted without pads.
        labels (B, T): usually input_ids; markers, pads and the first text token are not scored.
        hidden_states: those of the input ids, without those of inserted markers."""
        for name in ("inputs_embeds", "position_ids", "output_attentions"):
            if kwargs.get(name) is not None and kwargs[name] is not False:
                raise ValueError(f"{name} is not supported: this model reads input_ids, and counts positions itself.")
        if input_ids is None:
            raise ValueError("input_ids is missing: this model reads nothing else.")
        self.warn_if_padding_and_no_attention_mask(input_ids, attention_mask)
        cache = past_key_values if cache is None else cache
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if cache is None and use_cache and not self.training:
            cache = DynamicCache(config=self.config)
        past = self.past_kinds(cache, input_ids)
        mask = self.new_mask(input_ids, attention_mask, past)
        rows, kinds, own, source = self.rows_of(input_ids, mask, past)
        keep = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        states = self.transformer(rows, kinds, past, cache, keep)
        hidden, P = states[-1], past.size(1)
        if cache is not None:
            # slots after a marker may need the state of the last text token, which can be an old one
            kept = hidden if self.carries else hidden[..., :1]
            kept = cache.update(kinds[:, None, :, None].to(hidden.dtype), kept[:, None], len(cache.layers) - 1)[1][:, 0]
            hidden = kept if self.carries else hidden
        if self.carries:
            slots = torch.cat([past, kinds], dim=1)
            order = torch.arange(slots.size(1), device=slots.device)
            last_text = torch.where(slots == TEXT, order, -1).cummax(1)[0].gather(1, P + own)
            source = torch.where(last_text < 0, P + own, last_text)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(pick_rows(hidden, source[:, kept])).float()
        logits[..., self.config.content_vocab_size :] = -math.inf  # markers and unused ids are never predicted
        loss = None
        if labels is not None:
            batch = {"num_items_in_batch": kwargs["num_items_in_batch"]} if "num_items_in_batch" in kwargs else {}
            loss = self.loss_function(
                logits, self.scored(labels, input_ids, mask, past), self.config.vocab_size, **batch
            )
        picked = tuple(pick_rows(state, own) for state in states) if keep else None
        out = CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=picked, **{CACHE: cache})
        return out if return_dict is not False else out.to_tuple()

    @property
    def carries(self) -> bool:
        """Whether a marker in input_ids predicts from the state of the last text token before it."""
        return self.config.target_rule == "skip" and self.config.marker_placement != "implicit"

    def past_kinds(self, cache, input_ids) -> torch.Tensor:
        """Returns the kinds (B, P) of the slots of a cache, to which it adds the layers that the model needs."""
        B = input_ids.size(0)
        if cache is None:
            return input_ids.new_zeros(B, 0)
        wanted = self.config.n_layer * (1 if self.config.second_connects == "nothing" else 2) + 1
        if any(type(layer) is not DynamicLayer for layer in cache.layers) or len(cache.layers) > wanted:
            raise ValueError("this model needs a DynamicCache of its own: leave cache_implementation out.")
        if cache.get_seq_length() == 0:
            cache.layers.extend(DynamicLayer() for _ in range(wanted - len(cache.layers)))
            return input_ids.new_zeros(B, 0)
        return cache.layers[-1].keys[:, 0, :, 0].to(input_ids)

    def new_mask(self, input_ids, attention_mask, past) -> torch.Tensor:
        """Returns which of input_ids (B, T) are no pads. Raises ValueError if the cache holds other tokens."""
        T = input_ids.size(1)
        if attention_mask is None:
            return torch.ones_like(input_ids, dtype=torch.bool)
        if attention_mask.ndim != 2 or attention_mask.size(1) < T:
            raise ValueError(f"attention_mask has the shape {tuple(attention_mask.shape)}, not (batch, past + {T}).")
        read = (past == TEXT) if self.config.marker_placement == "implicit" else (past != EMPTY)
        before = attention_mask[:, :-T].bool().sum(1)
        if not torch.equal(read.sum(1), before):
            raise ValueError(
                f"the cache holds {read.sum(1).tolist()} tokens, but attention_mask has {before.tolist()} before the "
                f"new ones: pass the whole mask, and do not crop the cache of a model that inserts markers."
            )
        return attention_mask[:, -T:].bool()

    def rows_of(self, input_ids, mask, past):
        """Returns the new rows: ids and kinds (B, W), and of every column (B, T) the row and the row that predicts."""
        number, count = (mask.cumsum(1) - 1).clamp(min=0), mask.sum(1)  # the number of a column, pads not counted
        text = input_ids.gather(1, (~mask).long().argsort(dim=1, stable=True))  # pads last
        start, real = (past != EMPTY).sum(1), torch.arange(text.size(1), device=text.device) < count[:, None]
        marker = real & (text == (-1 if self.config.marker_id is None else self.config.marker_id))
        if self.config.marker_placement == "implicit":
            if bool(marker.any()):
                raise ValueError(
                    f"input_ids contain the marker {self.config.marker_id}, but marker_placement=implicit inserts "
                    f"markers itself: load the model with marker_placement='explicit'."
                )
            text, marker, real, own, source = self.with_markers(text, number, count, past)
        else:
            width = max(1, int(count.max()))
            text, marker, real, own, source = text[:, :width], marker[:, :width], real[:, :width], number, number
        longest = int((start + real.sum(1)).max())
        if self.config.position == "learned" and longest > self.config.window:
            raise ValueError(f"the text has {longest} positions, more than the model's window of {self.config.window}.")
        return text.masked_fill(~real, 0), torch.where(marker, MARKER, TEXT).masked_fill(~real, EMPTY), own, source

    def with_markers(self, text, number, count, past):
        """Returns the rows (B, W) of text tokens (B, T) and of the markers up to the next text token.

        Returns the ids, which rows are markers, which are real, and of every column the row and the row that predicts.
        number (B, T): of the columns; count (B,): text tokens that are no pads."""
        start, done = (past != EMPTY).sum(1, keepdim=True), (past == TEXT).sum(1, keepdim=True)
        flags = torch.tensor(self.plan.until(int(done.max() + count.max())), device=text.device)
        places = (~flags).nonzero()[:, 0]  # the position of every text token
        last = done + count[:, None] - 1  # may be -1, in a text of pads
        end = places[last + 1]
        if self.config.position == "learned":  # markers beyond the window are left out, but no text token is
            end = torch.maximum(end.clamp(max=self.config.window), places[last.clamp(min=0)] + 1)
        end = torch.where(count[:, None] > 0, end, start)
        own, following = places[done + number], torch.minimum(places[done + number + 1], end)
        source = following - 1 if self.config.target_rule == "ignore" else own
        at = start + torch.arange(max(1, int((end - start).max())), device=text.device)  # (B, W)
        real, at = at < end, at.clamp(max=len(flags) - 1)
        text = text.gather(1, ((~flags).cumsum(0)[at] - 1 - done).clamp(0, text.size(1) - 1))
        marker = flags[at]
        text = torch.where(marker, self.config.marker_id, text)
        return text, marker, real, (own - start).clamp(min=0), (source - start).clamp(min=0)

    def scored(self, labels, input_ids, mask, past) -> torch.Tensor:
        """Returns labels (B, T) in which whatever is not predicted is -100: markers, pads and the first text token."""
        text = mask & (input_ids < self.config.content_vocab_size)
        first = text & (text.cumsum(1) == 1) & (past == TEXT).sum(1, keepdim=True).eq(0)
        unscored = ~mask | first | (labels >= self.config.content_vocab_size)
        return labels.masked_fill(unscored, -100)

    def place_markers(self, ids: list[int]) -> list[int]:
        """Returns a text's ids with markers at the places of the plan, as a prompt for marker_placement=explicit."""
        if not all(isinstance(token, int) for token in ids):
            raise TypeError("place_markers takes the ids of one text as a list of int: call tolist() on a row of ids.")
        flags, out = self.plan.until(len(ids)), []
        for token in ids:
            while flags[len(out)]:
                out.append(self.config.marker_id)
            out.append(token)
        return out

    @torch.no_grad()
    def generate(self, inputs=None, generation_config=None, logits_processor=None, **kwargs):
        """Continues prompts as every model does. If marker_placement is "explicit", it also puts markers in between."""
        if self.config.marker_placement == "explicit":
            ids, mask = kwargs.get("input_ids") if inputs is None else inputs, kwargs.get("attention_mask")
            pads = torch.zeros(1, dtype=torch.long)
            if mask is not None:
                pads = (mask == 0).sum(1)
            elif ids is not None and self.config.pad_token_id is not None:
                pads = (ids == self.config.pad_token_id).sum(1)
            force = ForceMarkers(self.plan, self.config.marker_id, pads)
            logits_processor = LogitsProcessorList([force, *(logits_processor or [])])
        return super().generate(inputs, generation_config, logits_processor, **kwargs)


def pick_rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Returns the rows (B, N, C) of x (B, S, C) at index (B, N)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.size(2)))
