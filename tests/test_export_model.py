"""Tests an exported model in this process: places of markers, caches, labels, and the refusal of misuse."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from nanometa.inference.generation import MarkerPlan
from nanometa.inference.scoring import score
from nanometa.interop.hugging_face.configuration_nanometa import MarkerPlan as ExportedPlan
from nanometa.interop.hugging_face.configuration_nanometa import NanoMetaConfig
from nanometa.interop.hugging_face.modeling_nanometa import NanoMetaForCausalLM
from nanometa.interop.weights import config_of, weights_of
from tests.runs import small_run


def model_of(run, placement="implicit", **changes) -> NanoMetaForCausalLM:
    model = NanoMetaForCausalLM(NanoMetaConfig(**{**config_of(run, placement, 1337), **changes}))
    model.load_state_dict(weights_of(run), strict=False)
    model.tie_weights()
    return model.eval()


@pytest.mark.parametrize(("injection", "C", "M"), [("uniform", 28, 4), ("uniform", 461, 51), ("periodic", 9, 7)])
def test_the_exported_plan_is_the_plan(injection, C, M):
    ours = MarkerPlan(injection, C, M, key=2**64 - 5)
    theirs = ExportedPlan(injection, C, M, key=2**64 - 5).until(3 * C)
    assert len(theirs) >= 3 * (C + M) and theirs == [position in ours for position in range(len(theirs))]


TEXT = "the cat sat on a mat and saw that one dog had run over two hills"


def implicit(tokenizer, **changes):
    data = {"injection": "uniform", "chunk_content": 26, "chunk_markers": 6, "dataset": "x"}
    run = small_run(tokenizer, data, **changes)
    return run, model_of(run)


def test_a_window_holds_exactly_n_positions_text_tokens(dataset_tokenizer):
    _, model = implicit(dataset_tokenizer)
    ids = torch.arange(52)[None]
    assert model.config.n_positions == 52 and model(ids).logits.shape == (1, 52, 320)
    with pytest.raises(ValueError, match="more than the model's window of 64"):
        model(torch.arange(53)[None])
    half = model(ids[:, :51], use_cache=True)
    full = model(ids[:, 51:], cache=half.cache)
    assert torch.allclose(full.logits[0, -1], model(ids).logits[0, -1], atol=1e-5)
    with pytest.raises(ValueError, match="more than the model's window of 64"):
        model(ids[:, :1], cache=full.cache)


def test_misuse_is_refused_instead_of_giving_other_numbers(dataset_tokenizer):
    run, model = implicit(dataset_tokenizer)
    ids = torch.arange(20)[None]
    marked = torch.tensor([[1, run.tokenizer.meta, 2]])
    with pytest.raises(ValueError, match="input_ids contain the marker 300, but marker_placement=implicit"):
        model(marked)
    assert model(marked, attention_mask=torch.tensor([[1, 0, 1]])).logits.shape[1] == 3
    with pytest.raises(ValueError, match="marker_placement='some' must be"):
        model_of(run, marker_placement="some")
    with pytest.raises(ValueError, match="needs a rule that places markers"):
        model_of(run, marker_count=0)
    with pytest.raises(ValueError, match="input_ids is missing"):
        model()
    for name in ("position_ids", "inputs_embeds"):
        with pytest.raises(ValueError, match=f"{name} is not supported"):
            model(ids, **{name: ids})
    with pytest.raises(ValueError, match="needs a DynamicCache of its own"):
        model(ids, cache=StaticCache(config=model.config, max_cache_len=64))
    with pytest.raises(ValueError, match=r"the cache holds \[0\] tokens, but attention_mask has \[5\] before"):
        model(ids, attention_mask=torch.ones(1, 25))
    with pytest.raises(ValueError, match="attention_mask has the shape"):
        model(ids, attention_mask=torch.ones(1, 1, 20, 20))
    with pytest.raises(TypeError, match="the ids of one text as a list of int"):
        model.place_markers(ids)
    assert len(model.place_markers(ids[0].tolist())) > 20
    cache = model(ids, use_cache=True).cache
    place = MarkerPlan.of_run(run)
    cache.crop(-3)  # rows, markers among them
    assert any(position in place for position in range(cache.get_seq_length(), cache.get_seq_length() + 3))
    with pytest.raises(ValueError, match=r"the cache holds \[\d+\] tokens, but attention_mask has \[19\] before"):
        model(ids[:, :1], cache=cache, attention_mask=torch.ones(1, 20))


def test_pads_without_a_mask_are_warned_about(dataset_tokenizer, monkeypatch):
    said = []
    monkeypatch.setattr("transformers.modeling_utils.logger.warning_once", said.append)
    _, model = implicit(dataset_tokenizer)
    ids = torch.tensor([[model.config.pad_token_id, 1, 2], [3, 4, 5]])
    model(ids, attention_mask=(ids != model.config.pad_token_id).long())
    assert not said
    model(ids)
    assert len(said) == 1 and "attention_mask" in said[0]


def test_a_cache_may_be_filled_in_pieces_of_any_size(dataset_tokenizer):
    for rule in ("ignore", "skip"):
        _, model = implicit(dataset_tokenizer, rule=rule, position="rope", second_attention="meta_mean")
        ids = torch.arange(40)[None]
        whole = model(ids).logits
        for size in (1, 7, 20):
            cache, parts = DynamicCache(config=model.config), []
            for part in ids.split(size, dim=1):
                parts.append(model(part, cache=cache).logits)
            assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-5)


def test_a_window_of_the_second_attention_is_exported(dataset_tokenizer):
    run, model = implicit(dataset_tokenizer)
    windowed = model_of(run, second_window=3)
    for block in run.model.h:
        block.second_attn.window = 3
    nats = score(run, TEXT, MarkerPlan.of_run(run))[1]
    ids = torch.tensor([[run.tokenizer.eot, *run.tokenizer.encode(TEXT).tolist()]])
    assert windowed(ids, labels=ids).loss.item() == pytest.approx(sum(nats) / len(nats), abs=1e-5)
    assert abs(model(ids, labels=ids).loss - windowed(ids, labels=ids).loss) > 1e-3
    cached = windowed(ids[:, 9:], cache=windowed(ids[:, :9]).cache).logits
    assert torch.allclose(cached, windowed(ids).logits[:, 9:], atol=1e-5)


def test_hidden_states_are_those_of_the_text_tokens(dataset_tokenizer):
    _, model = implicit(dataset_tokenizer, rule="skip")
    ids = torch.arange(20)[None]
    out = model(ids, output_hidden_states=True)
    assert len(out.hidden_states) == 3 and out.hidden_states[-1].shape == (1, 20, 16)
    assert torch.allclose(model.lm_head(out.hidden_states[-1])[..., :300], out.logits[..., :300])
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, out.logits[:, -2:])


def test_a_training_step_reaches_every_weight(dataset_tokenizer):
    _, model = implicit(dataset_tokenizer, dropout=0.1, bias=True)
    model.train()
    ids = torch.arange(50)[None]
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


def test_labels_of_markers_pads_and_the_first_token_are_not_scored(dataset_tokenizer):
    run, _ = implicit(dataset_tokenizer)
    model = model_of(run, "explicit")
    ids = torch.tensor([model.place_markers(list(range(20)))])
    loss = model(ids, labels=ids).loss
    logits = model(ids).logits.log_softmax(-1)[0, :-1]
    targets, first = ids[0, 1:], int((ids[0] != 300).nonzero()[0])
    scored = (targets != 300) & (torch.arange(len(targets)) >= first)
    assert int(scored.sum()) == 19
    picked = logits[scored].gather(1, targets[scored, None])
    assert torch.allclose(loss, -picked.mean(), atol=1e-6)
