import math
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nanometa.config import GPTConfig
from nanometa.data.loader import Windows
from nanometa.inference.decoder import DecodingWeights
from nanometa.layers.loss import Tally, _SummedNats, gather_scored, summed_nats, token_scores
from nanometa.model import GPT


def reference(hidden, weight, targets, n_content):
    """Computes the cross-entropy over all logits, one row at a time."""
    total = []
    for h, t in zip(hidden, targets, strict=True):
        logits = (weight[:n_content] @ h).double() if h.dtype == torch.float64 else (weight[:n_content] @ h).float()
        total.append(F.cross_entropy(logits[None], t[None], reduction="sum") if t >= 0 else logits.sum() * 0)
    return torch.stack(total)


def case(N, seed, dtype=torch.float64, V=17, n_content=13, C=6):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, C, generator=g, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, C, generator=g, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, n_content, (N,), generator=g)
    targets[torch.rand(N, generator=g) < 0.3] = -100
    return hidden, weight, targets, n_content


def test_a_compiled_loss_has_the_same_gradients():
    # A GPU compiles this function. On a CPU summed_nats keeps it out of torch.compile, so it is called directly here.
    # With torch 2.11, an in-place sum of the result gave the right loss and zero gradients, without any message.
    hidden, weight, targets, n = case(20, 0)

    def loss(hidden, weight):
        return _SummedNats.apply(hidden * 1, weight, targets, None, n, torch.float64, 7)

    nats, *grads = loss(hidden, weight), *torch.autograd.grad(loss(hidden, weight), (hidden, weight))
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)(hidden, weight)
    assert compiled.item() == nats.item()
    for grad, expected in zip(torch.autograd.grad(compiled, (hidden, weight)), grads, strict=True):
        assert expected.norm() > 0.1
        torch.testing.assert_close(grad, expected)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 20), st.integers(1, 25), st.integers(1, 9), st.integers(0, 10**6))
def test_the_loss_equals_the_reference_for_any_chunk_and_block(N, chunk, block, seed):
    hidden, weight, targets, n = case(N, seed)
    slow = reference(hidden, weight, targets, n)
    with mock.patch("nanometa.layers.loss.block_rows", lambda device, vocabulary: block):
        nats, hits = token_scores(hidden, weight, targets, n, chunk)
        torch.testing.assert_close(nats, slow.detach())
        assert torch.equal(hits, (hidden @ weight.T)[:, :n].argmax(1) == targets)
        fast = summed_nats(hidden, weight, targets, n, chunk)
    torch.testing.assert_close(fast, slow.sum())
    for ours, expected in zip(
        torch.autograd.grad(fast * 0.7, (hidden, weight)),
        torch.autograd.grad(slow.sum() * 0.7, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("rule", ["ignore", "skip"])
@pytest.mark.parametrize("name", ["u", "n"])
def test_a_head_at_scored_positions_only_gives_the_same_loss_and_gradients(workdir, rule, name):
    data = Windows(workdir / "data" / name, "val", 28 if name == "n" else 32, rule)
    batch = data.batch(np.arange(data.n_windows))
    torch.manual_seed(0)
    hidden = torch.randn(*batch.tokens.shape, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(data.tokenizer.n_vocab, 6, dtype=torch.float64, requires_grad=True)
    rows, targets = gather_scored(hidden, batch.targets, batch.scored_index)
    assert len(rows) == len(targets) == data.n_windows * (28 if name == "n" else 29)
    whole, few = (summed_nats(h.reshape(-1, 6), weight, t.flatten(), data.tokenizer.n_content)
                  for h, t in ((hidden, batch.targets), (rows, targets)))  # fmt: skip
    torch.testing.assert_close(few, whole)
    for ours, expected in zip(*(torch.autograd.grad(loss, (hidden, weight)) for loss in (few, whole)), strict=True):
        torch.testing.assert_close(ours, expected)


def test_gradients_equal_finite_differences():
    """gradcheck cannot be used, because it calls backward more than once."""
    hidden, weight, targets, n = case(7, 2)
    with torch.no_grad():
        for x, slopes in zip(
            (hidden, weight),
            torch.autograd.grad(_tripled(hidden, weight, targets, n), (hidden, weight)),
            strict=True,
        ):
            for place in range(x.numel()):
                ends = []
                for step in (1e-6, -2e-6, 1e-6):  # forward, then backward, then back
                    x.view(-1)[place] += step
                    ends.append(_tripled(hidden, weight, targets, n))
                torch.testing.assert_close((ends[0] - ends[1]) / 2e-6, slopes.view(-1)[place], rtol=1e-6, atol=1e-8)


@torch.enable_grad()
def _tripled(hidden, weight, targets, n):
    """Returns three times the loss, so that the gradient that reaches summed_nats is not 1."""
    return 3 * summed_nats(hidden, weight, targets, n, 3)


def test_a_second_backward_pass_is_an_error():
    """On a CPU the first one scales the gradient in place, so a second one would be wrong."""
    hidden, weight, targets, n = case(7, 2)
    loss = _tripled(hidden, weight, targets, n)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_no_rows_have_no_loss_and_no_gradient():
    weight, hidden = torch.randn(5, 3, requires_grad=True), torch.zeros(0, 3, requires_grad=True)
    loss = summed_nats(hidden, weight, torch.zeros(0, dtype=torch.long), 5)
    assert loss == 0 and torch.autograd.grad(loss, weight)[0].eq(0).all()


def test_rows_without_a_target_do_not_matter():
    """Not even if they are NaN: neither the loss nor a gradient sees them."""
    hidden, weight, targets, n = case(7, 2)
    with torch.no_grad():
        hidden[targets < 0] = math.nan
    loss = _tripled(hidden, weight, targets, n)
    kept = targets >= 0
    few = _tripled(hidden[kept], weight, targets[kept], n)
    torch.testing.assert_close(loss, few)
    ours, expected = (torch.autograd.grad(of, (hidden, weight)) for of in (loss, few))
    torch.testing.assert_close(ours[1], expected[1])
    assert (targets < 0).any() and ours[0][~kept].eq(0).all()


def test_an_extremely_unlikely_target_has_a_finite_loss():
    """Its probability, exp(-300), is too small for fp32."""
    weight, hidden = torch.eye(4), torch.tensor([[300.0, 0, 0, 0]], requires_grad=True)
    loss = summed_nats(hidden, weight, torch.tensor([1]), 4)
    assert loss == 300
    assert torch.autograd.grad(loss, hidden)[0].tolist() == [[1.0, -1.0, 0.0, 0.0]]


def test_bfloat16_products_stay_near_the_float32_loss():
    hidden, weight, targets, n = case(400, 1, torch.float32, V=300, n_content=290, C=32)
    exact = summed_nats(hidden, weight, targets, n)
    with torch.autocast("cpu", torch.bfloat16):
        rough = summed_nats(hidden, weight, targets, n)
    assert rough.dtype == torch.float32
    assert 0 < abs(rough - exact) / exact < 2e-3
    got, expected = (torch.autograd.grad(loss, weight)[0] for loss in (rough, exact))
    assert F.cosine_similarity(got.flatten(), expected.flatten(), dim=0) > 0.999


def test_markers_and_spare_ids_get_neither_probability_nor_gradient():
    hidden, weight, targets, n = case(9, 4)
    with torch.no_grad():
        weight[n:] *= 1000  # if they were in the softmax, they would take nearly all of the probability
    grad = torch.autograd.grad(summed_nats(hidden, weight, targets, n), weight)[0]
    assert (grad[n:] == 0).all() and (grad[:n] != 0).any()
    torch.testing.assert_close(
        token_scores(hidden, weight, targets, n)[0], reference(hidden, weight, targets, n).detach()
    )


def test_loss_scorer_logits_and_decoder_allow_the_same_ids():
    """The loss, the scorer and the model's logits mask the other ids; the decoder's head leaves their rows out."""
    V, n = 64, 57
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=V, content_vocab_size=n))
    hidden, every = torch.randn(V, 8), torch.arange(V)
    content = every < n
    logits = model.logits(hidden).detach()
    assert (logits.isfinite() == content).all()
    nats, _ = token_scores(hidden, model.wte.weight, every, n)
    assert (nats.isfinite() == content).all()
    loss = summed_nats(hidden, model.wte.weight, every.clamp(max=n - 1), n)
    (gradient,) = torch.autograd.grad(loss, model.wte.weight)
    assert ((gradient != 0).any(dim=1) == content).all()
    decoded = DecodingWeights(model, torch.float32, 1).head(hidden)
    assert decoded.shape == (V, n)
    torch.testing.assert_close(decoded, logits[:, :n])


def test_figures_equal_a_calculation_by_hand():
    """Ids 0, 1 and 2 stand for 1, 2 and 5 bytes, and id 3 is <|endoftext|>."""
    tally = Tally(torch.tensor([1, 2, 5, 0]), torch.device("cpu"))
    tally.add(torch.tensor([[0.5, 1.0, 9.0]]), torch.tensor([[0, 2, -100]]))
    tally.add(torch.tensor([2.0, 4.0]), torch.tensor([1, 3]))
    figures = tally.figures()
    assert figures["loss"] == pytest.approx((0.5 + 1.0 + 2.0 + 4.0) / 4)
    assert figures["bits_per_byte"] == pytest.approx(3.5 / (math.log(2) * 8))
    assert figures["endoftext_loss"] == 4.0
    assert (figures["tokens"], figures["bytes"]) == (4, 8)


def test_bits_per_byte_of_a_uniform_model_do_not_depend_on_the_markers():
    """A model with uniform predictions costs log2(n_content) bits per token, however many markers lie between the
    tokens."""
    n_bytes = torch.tensor([1, 1, 1, 1, 0])
    values = []
    for targets in ([0, 1, 2, 3], [0, -100, 1, -100, -100, 2, 3]):
        targets = torch.tensor(targets)
        nats, _ = token_scores(torch.zeros(len(targets), 2), torch.ones(5, 2), targets, n_content=4)
        tally = Tally(n_bytes, torch.device("cpu"))
        tally.add(nats, targets)
        values.append(tally.figures()["bits_per_byte"])
    assert values[0] == values[1] == pytest.approx(2.0)
