"""Compares cached decoding with the reference that computes everything anew for each token (reference/generate.py)."""

import copy
import dataclasses
import types

import pytest
import torch

from nanometa.common.keyed_random import stable_key
from nanometa.config import GPTConfig, MarkerConfig, SampleConfig, TaskConfig
from nanometa.inference.cache import RunningSums, Store
from nanometa.inference.decoder import Decoder
from nanometa.inference.generation import MarkerPlan, generate, generate_batch, pick, prepare_weights
from nanometa.inference.scoring import hidden_states, text_batch
from nanometa.model import GPT
from nanometa.sample import start_samples
from tests.fast_cases import diagonal, every
from tests.reference import generate as reference
from tests.test_model import ARMS_AND_PLACES, sharpen, wake
from tests.test_rope import ARMS_AND_ALL_PLACES, SCALES

META, EOT, V = 61, 60, 61  # markers have the id after the content ids
PLANS = {
    "uniform": MarkerPlan("uniform", 9, 3, stable_key("a")),
    "other": MarkerPlan("uniform", 7, 5, stable_key("b")),
    "periodic": MarkerPlan("periodic", 6, 2, 0),
    "none": MarkerPlan("none", 9, 0, 0),
}


def random_run(rule="ignore", seed=3, **changes):
    """Returns a model with random weights, all of which matter, with the parts of a Run that decoding uses."""
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 24, "vocab_size": 64, "content_vocab_size": V}
    cfg = GPTConfig(**{**shape, "bias": True, "random_fraction": 0.4, **changes})
    model = sharpen(wake(GPT(cfg, seed)))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("bias", "wpe.weight", "wte.weight")):
                torch.nn.init.normal_(p, std=0.3)
            elif name.endswith(("mlp.c_fc.weight", "c_proj.weight")):
                torch.nn.init.normal_(p, std=0.2)
    return types.SimpleNamespace(
        model=model.eval(),
        tokenizer=types.SimpleNamespace(meta=META, eot=EOT, n_content=V, markers={"<|meta|>": META}),
        config=types.SimpleNamespace(model=cfg, target_rule=rule, seed=5, task=TaskConfig(), markers=MarkerConfig()),
        state={"data": {"chunk_markers": 3}},
        folder="out/random",
    )


def exact(run):
    """Returns a copy of the run in double precision, for the reference."""
    return types.SimpleNamespace(**{**vars(run), "model": copy.deepcopy(run.model).double()})


def content(n: int, seed: int = 0) -> list[int]:
    return torch.randint(0, EOT, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def laid_out(n: int, plan: MarkerPlan, seed: int = 0) -> list[int]:
    """Returns a prompt of n content tokens with the plan's markers between them. It ends with the last content
    token."""
    ids: list[int] = []
    for token in content(n, seed):
        while len(ids) in plan:
            ids.append(META)
        ids.append(token)
    return ids


@pytest.fixture
def recorded(monkeypatch) -> list[torch.Tensor]:
    """A list to which the decoder's logits of every step are added."""
    steps, read = [], Decoder.read

    def recording(self, *args):
        steps.append(read(self, *args))
        return steps[-1]

    monkeypatch.setattr(Decoder, "read", recording)
    return steps


def compare(run, prompts, plans, n, steps, tolerance=1e-4):
    """Continues all prompts greedily in one batch. The ids must equal those of the reference, and the logits be
    close."""
    steps.clear()
    precise = exact(run)
    found: dict = {number: [] for number in range(len(prompts))}
    for number, token in generate_batch(run, prompts, plans, n, temperature=0):
        found[number].append(token)
    for number, (prompt, plan) in enumerate(zip(prompts, plans, strict=True)):
        expected = list(reference.generate(precise, prompt, plan, n, lambda logits: int(logits.argmax())))
        ours = torch.stack([logits[number] for logits in steps])
        theirs = torch.stack([logits for _, logits in expected if logits is not None]).float()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)
        assert found[number] == [token for token, _ in expected]


@pytest.mark.parametrize(
    ("second", "place", "position", "rule"), diagonal(ARMS_AND_PLACES, ("learned", "rope"), ("ignore", "skip"))
)
def test_cached_equals_recomputed(second, place, position, rule, recorded):
    """Decodes across several windows in every arm: one prompt alone, and a batch of unequal prompts with different
    plans."""
    run = random_run(rule, second_attention=second, meta_position=place, position=position)
    prompt = laid_out(5, PLANS["uniform"])
    compare(run, [prompt], [PLANS["uniform"]], 45, recorded)
    plans = [PLANS[name] for name in ("none", "uniform", "other", "periodic")]
    prompts = [laid_out(n, plan, n) for n, plan in zip((1, 14, 4, 11), plans, strict=True)]
    compare(run, prompts, plans, 30, recorded)
    compare_crowded(run, recorded)


def compare_crowded(run, recorded):
    """Prompts have more markers than the second attention's window, and each text gets one new marker at a time."""
    window = run.config.model.second.window or 0
    every_other = MarkerPlan("periodic", 1, 1, 0)
    prompts = [laid_out(n, every_other, n) for n in (11, 10)]
    assert all(prompt.count(META) > window for prompt in prompts), f"the prompts have too few markers for {window}"
    compare(run, prompts, [every_other] * 2, 20, recorded)


@pytest.mark.parametrize(
    ("scaling", "dynamic", "second", "place"),
    every(
        4, [(*scale, "meta", "same") for scale in SCALES[1:]] + [("yarn", True, *arm) for arm in ARMS_AND_ALL_PLACES]
    ),
)
def test_cached_equals_recomputed_in_an_extended_window(second, place, scaling, dynamic, recorded):
    """Also with a dynamic scale, where every token has its own scale and all keys are rotated anew."""
    shape = {"position": "rope", "rope_scaling": scaling, "rope_dynamic": dynamic, "rope_factor": 3.0}
    run = random_run(second_attention=second, meta_position=place, yarn_beta_fast=0.9, yarn_beta_slow=0.05, **shape)
    compare(run, [laid_out(5, PLANS["uniform"])], [PLANS["uniform"]], 40, recorded)
    plans = [PLANS[name] for name in ("none", "uniform", "other", "periodic")]
    prompts = [laid_out(n, plan, n) for n, plan in zip((1, 14, 4, 11), plans, strict=True)]
    compare(run, prompts, plans, 25, recorded)
    compare_crowded(run, recorded)


def test_markers_matter_to_the_models_of_these_tests():
    """Otherwise no test here could notice a marker whose causal key, meta key or position the cache lost."""
    for second, place in (("meta", "same"), ("meta", "none")):
        run = random_run(second_attention=second, meta_position=place)
        ids = laid_out(12, PLANS["uniform"])
        assert ids.count(META) >= 2 and ids[-1] != META
        base = reference.next_logits(run, ids)
        first = ids.index(META)
        assert (reference.next_logits(run, ids[:first] + ids[first + 1 :]) - base).abs().max() > 0.05
        run.config.model = dataclasses.replace(run.config.model, second_attention="none")
        run.model.cfg = run.config.model
        assert (reference.next_logits(run, [*ids, META]) - base).abs().max() > 0.05


@pytest.mark.parametrize("rule", ["ignore", "skip"])
def test_prompts_may_end_before_at_and_after_a_marker(rule, recorded):
    run, plan = random_run(rule), PLANS["uniform"]
    places = [position for position in range(24) if position in plan]
    ids = laid_out(16, plan)
    for place in places[:4]:
        # the marker is still to come, is the last token, or is followed by one more token
        for end in (place, place + 1, place + 2):
            if 0 < end <= len(ids):
                compare(run, [ids[:end]], [plan], 12, recorded)


@pytest.mark.parametrize("rule", ["ignore", "skip"])
def test_markers_in_a_prompt_are_cached_like_planned_ones(rule, recorded):
    """Markers first, last, anywhere, in a row, alone, or filling a window; with and without the markers of a plan."""
    run, tokens = random_run(rule), content(9)
    prompts = [
        [META, *tokens], [*tokens, META], [*tokens[:4], META, META, META, *tokens[4:]], [META], [META] * 3,
        [META] * 24, tokens,
    ]  # fmt: skip
    for plan in (PLANS["none"], PLANS["other"]):
        for prompt in prompts:
            compare(run, [prompt], [plan], 30, recorded)
        compare(run, prompts, [plan] * len(prompts), 30, recorded)


def test_a_prompt_may_fill_the_window(recorded):
    run = random_run()
    for n in (22, 23, 24):
        compare(run, [content(n)], [PLANS["none"]], 30, recorded)
        compare(run, [content(n), content(3)], [PLANS["none"], PLANS["other"]], 30, recorded)


def test_cached_equals_recomputed_over_hundreds_of_tokens(recorded):
    run = random_run(n_layer=3, block_size=200)
    plans = [MarkerPlan("uniform", 45, 5, stable_key(key)) for key in range(3)]
    compare(run, [laid_out(n, plan, n) for n, plan in zip((40, 2, 90), plans, strict=True)], plans, 250, recorded)


@pytest.mark.parametrize("position", ["learned", "rope"])
@pytest.mark.parametrize("loss", ["meta_cache", "meta_keys", "late", "early", "marker_keys", "stale"])
def test_the_comparison_notices_a_broken_cache(loss, position, recorded, monkeypatch):
    """The comparison fails for each fault of the cache: the second attention's cache is empty or misses its newest
    entry, positions are off by one, the causal cache loses the markers, or a new window contains entries of the
    previous one."""
    run, plan = random_run(position=position), PLANS["uniform"]
    attend, read = Store.attend, Decoder.read
    if loss == "meta_cache":

        def attend_nothing(self, layer, q, k, v):
            return attend(self, layer, q, k, v) * (self.room == run.config.model.block_size)

        monkeypatch.setattr(Store, "attend", attend_nothing)
    elif loss == "meta_keys":

        def forgetful(self, layer, q, k, v):
            y = attend(self, layer, q, k, v)
            if self.room != run.config.model.block_size and q.size(2) == 1:
                self.k[layer].flatten(0, 1)[self.slots] = 0
            return y

        monkeypatch.setattr(Store, "attend", forgetful)
    elif loss in ("late", "early"):
        forward, shift = GPT.forward, 1 if loss == "late" else -1

        def shifted(self, tokens, positions, *rest, **named):
            moved = positions + shift if tokens.size(1) < 4 else positions
            return forward(self, tokens, moved.clamp(0, 23), *rest, **named)

        monkeypatch.setattr(GPT, "forward", shifted)
    elif loss == "marker_keys":
        monkeypatch.setattr(Decoder, "read", lambda self, *args: drop_markers(read, self, *args))
    else:
        monkeypatch.setattr(Decoder, "forget", lambda self, row: None)
    with pytest.raises(AssertionError if loss != "stale" else IndexError):
        compare(run, [laid_out(5, plan)], [plan], 60, recorded)


@pytest.mark.parametrize("loss", ["sums", "window", "reads"])
def test_the_comparison_notices_a_fault_of_what_ordinary_tokens_get(loss, recorded, monkeypatch):
    """The sums of the values are lost after each call, or kept in a new window; or tokens before the first marker
    receive the output of a key that they may not read."""
    run, plan = random_run(second_attention="read_meta" if loss == "reads" else "meta_mean"), PLANS["uniform"]
    mean, place, read = RunningSums.mean, RunningSums.place, Store.read
    if loss == "sums":

        def forgetful(self, layer, values):
            self.calls = [(start, end, row, 0) for start, end, row, _ in self.calls]
            return mean(self, layer, values)

        monkeypatch.setattr(RunningSums, "mean", forgetful)
    elif loss == "window":

        def stale(self, rows):
            self.used = [used or 1 for used in self.used]
            place(self, rows)

        monkeypatch.setattr(RunningSums, "place", stale)
    else:
        monkeypatch.setattr(Store, "read", lambda self, *of: (read(self, *of)[0], torch.ones_like(self.reads)))
    with pytest.raises(AssertionError):
        compare(run, [laid_out(5, plan), content(4)], [plan, PLANS["none"]], 40, recorded)


def drop_markers(read, decoder, new, *rest):
    """Reads the new tokens and then removes the markers from the causal cache."""
    before = decoder.causal.used[0]
    logits = read(decoder, new, *rest)
    for i, row in enumerate(new[0]):
        if row.token == META:
            for part in decoder.causal.v:
                part[0, before + i] = 0
    return logits


@pytest.mark.parametrize("rule", ["ignore", "skip"])
def test_sampling_draws_as_from_recomputed_logits(rule):
    """Draws at random: every prompt has its own generator, whatever else is in the batch."""
    run, plans = random_run(rule), [PLANS[name] for name in ("uniform", "none", "other")]
    prompts = [laid_out(n, plan, n) for n, plan in zip((3, 9, 6), plans, strict=True)]
    found: dict = {0: [], 1: [], 2: []}
    for number, token in generate_batch(run, prompts, plans, 60, 1.1, 30, 0.9, seeds=[7, 8, 9]):
        found[number].append(token)
    for number, (prompt, plan, seed) in enumerate(zip(prompts, plans, (7, 8, 9), strict=True)):
        generator = torch.Generator().manual_seed(stable_key(seed, "sample") >> 1)
        expected = reference.generate(exact(run), prompt, plan, 60, lambda x, g=generator: pick(x, 1.1, 30, 0.9, g))
        assert found[number] == [token for token, _ in expected]
        assert found[number] == list(generate(run, prompt, plan, 60, 1.1, 30, 0.9, seed=seed))
    assert len(set(map(tuple, found.values()))) == 3


def test_a_batch_continues_when_some_texts_have_ended():
    run, plan = random_run(), PLANS["uniform"]
    with torch.no_grad():
        run.model.wte.weight[EOT] *= 3  # so that <|endoftext|> is drawn at some point
    prompts, seeds = [laid_out(n, plan, n) for n in (2, 7, 12, 5)], [1, 2, 3, 4]
    found: dict = {number: [] for number in range(4)}
    for number, token in generate_batch(run, prompts, [plan] * 4, 60, 1.5, None, 1.0, seeds, stop_at_endoftext=True):
        found[number].append(token)
    alone = [
        list(generate(run, prompt, plan, 60, 1.5, None, 1.0, seed, stop_at_endoftext=True))
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    assert list(found.values()) == alone
    ends = [len(ids) for ids in alone if ids[-1] == EOT]
    assert len(set(ends)) >= 2 and all(EOT not in ids[:-1] for ids in alone)


def test_markers_cost_no_extra_step_and_no_token_is_read_twice(recorded, monkeypatch):
    run, plan, sizes = random_run(block_size=100), PLANS["other"], []
    forward = GPT.forward

    def counting(self, tokens, *rest, **named):
        sizes.append(tokens.size(1))
        return forward(self, tokens, *rest, **named)

    monkeypatch.setattr(GPT, "forward", counting)
    prompt = laid_out(5, plan)
    ids = list(generate(run, prompt, plan, 40, temperature=0))
    assert len(sizes) == len(recorded) == 40 and sum(sizes) == len(prompt) + len(ids) - 1
    assert ids.count(META) > 20 and max(sizes[1:]) > 2


def test_samples_of_a_batch_can_be_read_in_any_order():
    """The samples of a batch are generated together; each can be read on its own, in any order."""
    run = random_run()
    run.state = {"data": {"chunk_content": 9, "chunk_markers": 3, "injection": "uniform"}}
    run.tokenizer.encode_prompt = lambda text: [3, 1, 4]
    cfg = SampleConfig(max_new_tokens=20, top_k=None)
    mixed = start_samples(run, cfg, "x", range(4, 7))
    alone = [start_samples(run, cfg, "x", [number])[0] for number in range(4, 7)]
    for i in (1, 0, 2):
        assert mixed[i][0] == alone[i][0] and list(mixed[i][1]) == list(alone[i][1])
    assert len({tuple(prompt) for prompt, _ in mixed}) > 1


def test_prepared_weights_can_be_used_for_several_calls():
    run, plan = random_run(), PLANS["uniform"]
    weights, prompt = prepare_weights(run), laid_out(5, plan)
    texts = [list(generate(run, prompt, plan, 30, temperature=0, weights=weights)) for _ in range(2)]
    assert texts[0] == texts[1] == list(generate(run, prompt, plan, 30, temperature=0))


def test_bfloat16_decoding_gives_the_logits_of_autocast(recorded):
    """The weights are cast once, for the decoder only. Its products and logits are those of autocast."""
    run, plan = random_run(), PLANS["uniform"]
    prompt, before = laid_out(9, plan), {name: p.clone() for name, p in run.model.named_parameters()}
    with torch.autocast("cpu", torch.bfloat16):
        ids = prompt + list(generate(run, prompt, plan, 8, temperature=0))
        starts = [i for i in range(len(prompt), len(ids)) if ids[i] != META]
        for step, i in zip(recorded, starts, strict=True):
            hidden = hidden_states(run.model, text_batch(run, ids[:i], plan))[0, -1]
            expected = run.model.logits(hidden)[:V]
            exact = reference.next_logits(run, ids[:i])
            assert (step[0] - expected).abs().max() < 0.1 * exact.std()
    for name, p in run.model.named_parameters():
        assert torch.equal(p, before[name]) and p.dtype == torch.float32
    assert isinstance(run.model.h[0].mlp.c_fc, torch.nn.Linear)


def test_one_token_of_every_sequence_takes_one_attention_call():
    """One call for each sequence would give the same numbers, and take longer."""
    cfg = GPTConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=64, content_vocab_size=V)
    store = Store(cfg, 3, 8, torch.float32, torch.device("cpu"))
    store.place([0, 0, 1, 1, 2, 2], [0, 1] * 3, [1, 2] * 3)
    assert store.calls == [(0, 2, None, 0, None), (2, 4, None, 0, None), (4, 6, None, 0, None)]
    store.place([0, 1, 2], [2] * 3, [3] * 3)
    assert store.calls == [(0, 3, slice(0, 3), 3, None)]
    store.place([0, 1, 2, 2], [3, 3, 3, 4], [4, 4, 4, 5])  # not one token of each
    assert [call[:4] for call in store.calls] == [
        (0, 1, slice(0, 1), 4), (1, 2, slice(1, 2), 4), (2, 4, slice(2, 3), 5)
    ]  # fmt: skip
