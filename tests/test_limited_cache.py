"""Compares decoding that forgets with a masked forward pass over the whole text, for every marker scheme."""

import itertools
import types

import numpy as np
import pytest
import torch

from nanometa.common.errors import UserError
from nanometa.config import GPTConfig, MarkerConfig, TrainConfig
from nanometa.data.layout import FOREVER, batch_of, targets_of
from nanometa.data.markers import Row
from nanometa.data.tokenizer import CL, CR, Tokenizer
from nanometa.inference import decoder as decoder_module
from nanometa.inference.decoder import Decoder, DecodingWeights
from nanometa.inference.generation import MarkerPlan, generate_batch, lay_out
from nanometa.inference.limited_cache import SPARE, LimitedStore
from nanometa.inference.scoring import hidden_states
from nanometa.layers.visibility import DenseAttention, visible
from nanometa.model import GPT
from tests.fast_cases import every
from tests.schemes import VARIANTS
from tests.test_markers import SENTENCES
from tests.test_model import sharpen, wake

CHUNK = (20, 4)  # content tokens and markers in a chunk of a dataset with markers
LIMITED = {name: cfg for name, cfg in VARIANTS.items() if cfg.places_markers or cfg.restricts}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([SENTENCES * 50], 280)


def run_of(tokenizer: Tokenizer, cfg: MarkerConfig, block_size: int = 72, **model) -> types.SimpleNamespace:
    """Returns a run with random weights, all of which matter, that reads text by a scheme."""
    C, M = CHUNK if not cfg.places_markers else (CHUNK[0], 0)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "second_attention": "none", "position": "rope"}
    sizes = {"vocab_size": tokenizer.n_vocab, "content_vocab_size": tokenizer.n_content, "block_size": block_size}
    gpt_cfg = GPTConfig(**{**shape, **sizes, **model})
    gpt = sharpen(wake(GPT(gpt_cfg, 3))).eval()
    with torch.no_grad():
        torch.nn.init.normal_(gpt.wte.weight, std=0.3, generator=torch.Generator().manual_seed(1))
    config = TrainConfig(model=gpt_cfg, target_rule="skip", markers=cfg)
    data = {"chunk_content": C, "chunk_markers": M, "injection": "uniform" if M else "none"}
    return types.SimpleNamespace(model=gpt, tokenizer=tokenizer, config=config, state={"data": data}, folder="out/r")


def prompt_of(run, n: int, seed: int = 0) -> tuple[list[int], MarkerPlan]:
    plan = MarkerPlan.of_run(run, seed=seed)
    content = run.tokenizer.encode((SENTENCES * 9)[seed:])[:n].astype(int)
    return lay_out(run, content, plan), plan


def masked_logits(run, ids: list[int], plan: MarkerPlan, first: int) -> torch.Tensor:
    """Returns the logits of the next content token from one masked forward pass over a window.

    ids: its content, or its ids with stored markers. first: number of its first content token."""
    scheme, n_content = plan.stream(run).scheme, run.tokenizer.n_content
    layout = scheme.lay_out(np.array(ids), first)
    index = np.flatnonzero(layout.tokens == scheme.closing)[None]
    batch = batch_of([layout], [targets_of(layout, "skip")], index, hides=plan.scheme.hides)
    source = int(np.flatnonzero(layout.content >= 0)[-1])
    return run.model.logits(hidden_states(run.model, batch)[0, source])[:n_content]


def slowly(run, prompt: list[int], plan: MarkerPlan, n: int) -> list[tuple[int, torch.Tensor | None]]:
    """Continues a prompt greedily, and computes everything anew for each token.

    Returns pairs of an id and the logits that it was chosen from, None for a marker."""
    T, n_content, drawn = run.config.model.block_size, run.tokenizer.n_content, plan.scheme.places_markers
    ids = [token for token in prompt if token < n_content] if drawn else list(prompt)
    out, dropped, first = [], 0, 0
    for _ in range(n):
        while not drawn and dropped + len(ids) in plan:
            ids.append(run.tokenizer.meta)
            out.append((run.tokenizer.meta, None))
        window = lay(run, plan, first, ids)
        if len(window) > T:
            drop = len(window) - T // 2
            first += sum(token < n_content for token in window[:drop])
            ids, dropped = [token for token in window[drop:] if not drawn or token < n_content], dropped + drop
            window = lay(run, plan, first, ids)
        logits = masked_logits(run, ids, plan, first)
        ids.append(int(logits.argmax()))
        new = lay(run, plan, first, ids)[len(window) :]
        out += [(token, logits if token < n_content else None) for token in new]
    return out


def lay(run, plan: MarkerPlan, first: int, ids: list[int]) -> list[int]:
    """Returns the ids of a window with the markers that its scheme places."""
    return plan.stream(run, first).scheme.lay_out(np.array(ids), first).tokens.tolist()


def compare(run, prompts, plans, n, monkeypatch, tolerance=1e-4) -> Decoder:
    """Continues prompts in one batch, and compares every id and all logits with `slowly`. Returns the decoder."""
    steps, decoders, read = [], [], Decoder.read

    def recording(self, *args):
        decoders[:] = [self]
        steps.append(read(self, *args))
        return steps[-1]

    found = {number: [] for number in range(len(prompts))}
    with monkeypatch.context() as patched:
        patched.setattr(Decoder, "read", recording)
        for number, token in generate_batch(run, prompts, plans, n, temperature=0):
            found[number].append(token)
    for number, (prompt, plan) in enumerate(zip(prompts, plans, strict=True)):
        expected = slowly(run, prompt, plan, n)
        ours = torch.stack([logits[number] for logits in steps])
        theirs = torch.stack([logits for _, logits in expected if logits is not None])
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)
        assert found[number] == [token for token, _ in expected]
    return decoders[0]


SECONDS = ("none", "meta", "causal")


# a prime stride, so that the fast cases have all schemes of marks and all three arms
@pytest.mark.parametrize(("name", "second"), every(13, itertools.product(LIMITED, SECONDS)))
def test_decoding_that_forgets_equals_a_masked_forward_pass(tokenizer, name, second, monkeypatch):
    """Compares whole prompts, prompts in pieces, and unequal prompts in one batch."""
    cfg = LIMITED[name]
    previous = {"meta_position": "previous"} if cfg.closes and cfg.places_markers else {}
    try:
        run = run_of(tokenizer, cfg, second_attention=second, **previous)
    except UserError:
        pytest.skip("the settings refuse this combination")
    prompt, plan = prompt_of(run, 9)
    compare(run, [prompt], [plan], 20, monkeypatch)
    pairs = [prompt_of(run, n, n) for n in (25, 1, 14)]
    prompts, plans = (list(part) for part in zip(*pairs, strict=True))
    monkeypatch.setattr(decoder_module, "PIECE", 7)
    decoder = compare(run, prompts, plans, 12, monkeypatch)
    if cfg.evict in ("local", "scattered", "window"):
        assert max(decoder.causal.used) < max(decoder.places)


@pytest.mark.parametrize("position", ["learned", "rope"])
@pytest.mark.parametrize(("place", "marks"), [("span", "clcr"), ("sentence", "sr"), ("newline", "meta")])
def test_when_the_window_is_full_the_rest_is_laid_out_anew(tokenizer, place, marks, position, monkeypatch):
    cfg = MarkerConfig(
        marker_place=place, marks=marks, closing_reads="segment", evict="segment", sentence_tokens=3, max_span=5
    )
    run = run_of(tokenizer, cfg, block_size=40, position=position, meta_position="previous")
    pairs = [prompt_of(run, n, n) for n in (10, 25)]
    prompts, plans = (list(part) for part in zip(*pairs, strict=True))
    compare(run, prompts, plans, 50, monkeypatch)


@pytest.mark.parametrize("second", ["none", "causal"])
def test_the_mean_of_a_span_is_read_from_the_cache(tokenizer, second, monkeypatch):
    cfg = MarkerConfig(marker_place="span", marks="clcr", closing_reads="segment", evict="segment", max_span=5)
    run = run_of(tokenizer, cfg, meta_position="previous", summary="mean", second_attention=second)
    pairs = [prompt_of(run, n, n) for n in (25, 3)]
    monkeypatch.setattr(decoder_module, "PIECE", 7)
    compare(run, *(list(part) for part in zip(*pairs, strict=True)), 30, monkeypatch)


def test_the_cache_holds_what_is_kept(tokenizer, monkeypatch):
    """A long prompt that is read in pieces never takes more slots than what is kept, a piece, and some spare ones."""
    cfg = MarkerConfig(evict="window", eviction_window=16, sinks=2)
    run = run_of(tokenizer, cfg, block_size=2000)
    prompt, plan = prompt_of(run, 300)
    monkeypatch.setattr(decoder_module, "PIECE", 32)
    sizes, evict = [], LimitedStore.evict

    def recording(self):
        sizes.append((self.room, self.used[0]))
        evict(self)

    monkeypatch.setattr(LimitedStore, "evict", recording)
    decoder = compare(run, [prompt], [plan], 40, monkeypatch)
    (places,) = [decoder.causal.kept(0)]
    assert places == [0, 1, *range(decoder.places[0] - 15, decoder.places[0])]
    assert max(slots for slots, _ in sizes) <= (18 * 4 // 3 + 32) + SPARE
    assert decoder.causal.nbytes == 2 * 2 * decoder.causal.room * 16 * 4


# ----------------------------------------------------------------------------- late compression


def logits_of(run, layout, mask) -> torch.Tensor:
    """Returns the logits (T, n_content) of a layout under a mask (T, T)."""
    attention, positions = DenseAttention(mask[None, None], 0.0), torch.from_numpy(layout.positions)[None]
    attends = [(attention, None)] * run.config.model.n_layer
    with torch.no_grad():
        hidden = run.model(torch.from_numpy(layout.tokens)[None], positions, None, attends=attends)
        return run.model.logits(hidden[0])[:, : run.tokenizer.n_content]


@pytest.mark.parametrize("behind", [0, 6])
@pytest.mark.parametrize("position", ["learned", "rope"])
def test_a_span_can_be_compressed_after_it_was_read(tokenizer, position, behind):
    """Directly behind the span this equals a planned compression; later, what came between has read its text."""
    cfg = MarkerConfig(marker_place="span", marks="clcr", closing_reads="segment", evict="segment")
    run = run_of(tokenizer, cfg, position=position, meta_position="previous")
    content = tokenizer.encode(SENTENCES)[:30].astype(int)
    first, last, plan = 4, 11, MarkerPlan.of_run(run)
    scheme, marks = plan.stream(run).scheme, tuple(tokenizer.markers[name] for name in (CL, CR))
    decoder = Decoder(DecodingWeights(run.model, torch.float32, 1), 1, 0, 0, lambda *_: False, limited=True)

    def read(tokens: np.ndarray, start: int) -> torch.Tensor:
        rows = [Row(int(token), start + i, start + i, 0, FOREVER) for i, token in enumerate(tokens)]
        return decoder.read([rows], [len(rows) - 1])[0]

    cut = last + 1 + behind
    read(content[:cut], 0)
    decoder.compress(0, first, last, marks)
    assert decoder.causal.kept(0) == [place for place in range(cut + 2) if not first <= place <= last and place != cut]
    ours = torch.stack([read(content[i : i + 1], i) for i in range(cut, 30)])

    layout = scheme.lay_out(content, segments=np.array([[cut - 1, cut - 1]]))  # the markers stand behind `cut`
    mask = torch.ones(32, 32, dtype=torch.bool).tril()
    mask[cut, :cut] = mask[cut + 2 :, cut] = False
    mask[cut + 1] = False
    mask[cut + 1, [*range(first, last + 1), cut, cut + 1]] = True
    mask[cut + 2 :, first : last + 1] = False
    layout.positions[cut : cut + 2] = last
    torch.testing.assert_close(ours, logits_of(run, layout, mask)[cut + 2 :], rtol=0, atol=1e-4)
    if not behind:
        planned = scheme.lay_out(content, segments=np.array([[first, last]]))
        columns = [torch.from_numpy(column)[None] for column in (planned.reads_from, planned.read_until)]
        assert torch.equal(visible(*columns, 32)[0, 0], mask)
        assert [column.tolist() for column in planned[:3]] == [column.tolist() for column in layout[:3]]
    with pytest.raises(ValueError, match=r"does not hold the span of places 3 \.\. 5"):
        decoder.compress(0, 3, 5, marks)


def test_a_sequence_that_starts_again_is_read_and_compressed_as_a_new_one(tokenizer):
    cfg = MarkerConfig(marker_place="span", marks="clcr", closing_reads="segment", evict="segment")
    run = run_of(tokenizer, cfg, meta_position="previous")
    content = tokenizer.encode(SENTENCES)[:20].astype(int)
    marks = tuple(tokenizer.markers[name] for name in (CL, CR))

    def after(read_before: int) -> tuple[torch.Tensor, list[int]]:
        decoder = Decoder(DecodingWeights(run.model, torch.float32, 1), 1, 0, 0, lambda *_: False, limited=True)

        def read(start: int, end: int) -> torch.Tensor:
            rows = [Row(int(content[place]), place, place, 0, FOREVER) for place in range(start, end)]
            return decoder.read([rows], [len(rows) - 1])

        if read_before:
            read(0, read_before)
            decoder.forget(0)
        read(0, 12)
        decoder.compress(0, 4, 11, marks)
        return read(12, 20), decoder.causal.kept(0)

    (logits, kept), (expected, kept_new) = after(7), after(0)
    assert kept == kept_new == [*range(4), 13, *range(14, 22)]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
