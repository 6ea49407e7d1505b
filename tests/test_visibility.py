"""Tests attention within limits: against a dense mask, in gradients, and in the whole model."""

import math

import pytest
import torch
import torch.nn.functional as F

from nanometa.config import GPTConfig
from nanometa.data.layout import FOREVER
from nanometa.layers.visibility import BlockAttention, DenseAttention, SegmentAttention, limited_attention, visible
from nanometa.meta_attention import blockwise_attention
from nanometa.model import GPT

B, H, T, D = 2, 3, 40, 8


def heads(dtype=torch.float32, T=T) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(B, H, T, D, generator=generator, dtype=dtype, requires_grad=True) for _ in range(3)]


def slow(q, k, v, mask) -> torch.Tensor:
    """Attention, one query at a time, over the keys that it may read."""
    out = torch.zeros_like(v)
    for b in range(B):
        for t in range(q.size(2)):
            keys = mask[b, 0, t].nonzero().squeeze(1)
            weights = (q[b, :, t, None] * k[b][:, keys] / math.sqrt(D)).sum(-1).softmax(-1)
            out[b, :, t] = (weights[..., None] * v[b][:, keys]).sum(1)
    return out


def closing_rows() -> torch.Tensor:
    """reads_from (B, T) with segments of several sizes, also neighboring and empty ones, and one at the start."""
    reads_from = torch.zeros(B, T, dtype=torch.long)
    for row, closing, first in (
        (0, 5, 0), (0, 9, 6), (0, 10, 10), (0, 11, 11), (0, 39, 20), (1, 12, 1), (1, 13, 13), (1, 30, 25),
    ):  # fmt: skip
        reads_from[row, closing] = first
    return reads_from


def evicting() -> torch.Tensor:
    """read_until (B, T) with random values, at least the own place."""
    generator = torch.Generator().manual_seed(2)
    until = torch.arange(T) + torch.randint(0, 12, (B, T), generator=generator)
    return torch.where(torch.rand(B, T, generator=generator) < 0.4, until, FOREVER)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_closing_markers_apart_equal_a_dense_mask(dtype):
    reads_from, tolerance = closing_rows(), {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 3e-2}[dtype]
    mask = visible(reads_from, None, T)
    q, k, v = heads(dtype)
    expected = slow(*(x.double() for x in (q, k, v)), mask)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3))
    gradients = torch.autograd.grad(expected, (q, k, v), grad.double())
    for attention in (limited_attention(reads_from, None, T, 0.0), DenseAttention(mask, 0.0)):
        y = attention(q, k, v)
        assert y.dtype == dtype and torch.allclose(y.double(), expected, atol=tolerance, rtol=tolerance)
        for ours, theirs in zip(torch.autograd.grad(y, (q, k, v), grad.to(dtype)), gradients, strict=True):
            assert torch.allclose(ours.double(), theirs.double(), atol=10 * tolerance, rtol=10 * tolerance)
    assert isinstance(limited_attention(reads_from, None, T, 0.0), SegmentAttention)


def test_forgotten_positions_are_not_read():
    reads_from, read_until = closing_rows(), evicting()
    attention, mask = limited_attention(reads_from, read_until, T, 0.0), visible(reads_from, read_until, T)
    q, k, v = heads(torch.float64)
    y = attention(q, k, v)
    assert torch.allclose(y, slow(q, k, v, mask), atol=1e-13)
    only = limited_attention(None, read_until, T, 0.0)
    assert torch.allclose(only(q, k, v), slow(q, k, v, visible(None, read_until, T)), atol=1e-13)


@pytest.mark.parametrize("columns", [(True, True), (True, False), (False, True)])
def test_flex_attention_equals_a_dense_mask(columns):
    """On a CPU it has no backward pass; test_cuda.py has the gradients."""
    limits = [column if given else None for column, given in zip((closing_rows(), evicting()), columns, strict=True)]
    q, k, v = (x.detach() for x in heads())
    expected = DenseAttention(visible(*limits, T), 0.0)(q, k, v)
    assert torch.allclose(BlockAttention(*limits, T)(q, k, v), expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_that_hides_nothing_gives_the_bits_of_causal_attention(dtype):
    q, k, v = heads(dtype, T=300)
    mask = torch.ones(300, 300, dtype=torch.bool).tril().expand(B, 1, -1, -1)
    with torch.no_grad():
        assert torch.equal(
            F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
            F.scaled_dot_product_attention(q, k, v, is_causal=True),
        )
    masked, plain = blockwise_attention(q, k, v, mask), blockwise_attention(q, k, v)
    assert torch.equal(masked, plain)
    pairs = zip(*(torch.autograd.grad(y.sum(), (q, k, v)) for y in (masked, plain)), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
    assert limited_attention(None, None, 300, 0.0) is None


def test_the_gradient_of_segment_attention_is_exact():
    q, k, v = (x.detach()[:1, :1, :14, :2].double().requires_grad_() for x in heads())
    attention = SegmentAttention(closing_rows()[:1, :14], 14, 0.0)
    assert torch.autograd.gradcheck(attention, (q, k, v))


def test_dropout_of_segments_keeps_the_mean():
    reads_from = torch.zeros(B, T, dtype=torch.long)
    reads_from[:, -1] = 1
    q, k, v = heads()
    v = torch.ones_like(v)
    torch.manual_seed(0)
    attention = SegmentAttention(reads_from, T, 0.5)
    rows = torch.stack([attention(q, k, v)[:, :, -1] for _ in range(200)])
    assert rows.detach().std() > 0.05 and abs(float(rows.detach().mean()) - 1) < 0.02


def test_a_closing_position_may_offer_the_means_of_its_span():
    """Spans 2..7 and 0..3 are closed by 9 and 5; the opening markers 8 and 4 are not among the means."""
    reads_from, read_until = torch.zeros(B, T, dtype=torch.long), torch.full((B, T), FOREVER)
    closing = torch.tensor([[9, 22], [5, T]])
    for row, first, last in ((0, 2, 9), (0, 12, 22), (1, 0, 5)):
        read_until[row, first:last], reads_from[row, last - 1], reads_from[row, last] = last, last - 1, first
    q, k, v = heads(torch.float64)
    y = limited_attention(reads_from, read_until, T, 0.0, closing)(q, k, v)
    means = [x.clone() for x in (k, v)]
    for row, first, last in ((0, 2, 9), (0, 12, 22), (1, 0, 5)):
        for x, mean in zip((k, v), means, strict=True):
            mean[row, :, last] = x[row, :, first : last - 1].mean(1)
    assert torch.allclose(y, slow(q, *means, visible(reads_from, read_until, T)), atol=1e-13)


# ----------------------------------------------------------------------------- in the model


def model(second: str = "none", **settings) -> GPT:
    cfg = GPTConfig(
        n_layer=2, n_head=2, n_embd=16, block_size=T, vocab_size=20, content_vocab_size=16, position="rope",
        second_attention=second, **settings,
    )  # fmt: skip
    gpt = GPT(cfg).double()
    with torch.no_grad():
        for block in gpt.h:
            if second != "none":  # it starts at zero
                block.second_attn.c_proj.weight.normal_(0, 0.2, generator=torch.Generator().manual_seed(4))
    return gpt


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(0, 16, (B, T), generator=torch.Generator().manual_seed(5))
    return tokens, torch.arange(T).expand(B, T)


@pytest.mark.parametrize("second", ["none", "causal", "meta"])
def test_no_change_reaches_a_position_that_may_not_read_it(second):
    """A change of a token reaches exactly the positions that can read it, directly or through others."""
    gpt, (tokens, positions) = model(second), inputs()
    index = torch.tensor([[5, 9, 10, 11, 39], [12, 13, 30, T, T]])
    reads_from, read_until = closing_rows(), evicting()
    seen = visible(reads_from, read_until, T)[:, 0].double()
    block = seen @ seen if second == "causal" else seen
    if second == "meta":
        member = torch.zeros(B, T + 1).scatter(1, index, 1)[:, :T].double()
        block = (torch.eye(T) + (member[:, :, None] * member[:, None, :]).tril()) @ seen
    reach = block @ block > 0  # through two blocks
    before = gpt(tokens, positions, index, reads_from, read_until)
    for place in range(T):
        changed = tokens.clone()
        changed[:, place] = (changed[:, place] + 1) % 16
        after = gpt(changed, positions, index, reads_from, read_until)
        moved = (after - before).abs().amax(-1) > 1e-12
        assert torch.equal(moved, reach[:, :, place])


def test_a_closed_span_gets_gradient_through_its_summary_alone():
    """Spans 2..7 and 12..20 are closed by the markers at 9 and 22, behind opening markers at 8 and 21."""
    gpt, (tokens, positions) = model(), inputs()
    reads_from, read_until = torch.zeros(B, T, dtype=torch.long), torch.full((B, T), FOREVER)
    for first, closing in ((2, 9), (12, 22)):
        read_until[:, first:closing] = closing
        reads_from[:, closing - 1], reads_from[:, closing] = closing - 1, first

    def gradient(cut: bool) -> torch.Tensor:
        """Returns the gradient of the outputs behind the first span by its embeddings; cut: detach its summary."""
        embedded = gpt.wte(tokens).detach().requires_grad_()
        hooks = [gpt.wte.register_forward_hook(lambda *_: embedded)]

        def detach(module, args, output):
            return torch.cat((output[:, :9], output[:, 9:10].detach(), output[:, 10:]), dim=1)

        if cut:
            hooks += [block.attn.c_attn.register_forward_hook(detach) for block in gpt.h]
        hidden = gpt(tokens, positions, None, reads_from, read_until)
        for hook in hooks:
            hook.remove()
        (grad,) = torch.autograd.grad(hidden[:, 10:].pow(2).sum(), embedded)
        return grad

    assert (gradient(cut=False)[:, 2:8] != 0).all()
    assert (gradient(cut=True)[:, 2:9] == 0).all()
