import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meta_attention import CausalSelfAttention, MetaAttention, gather_rows, scatter_rows
from tests.reference.meta_attention import meta_attention, meta_index


def layer(C=8, n_head=2, seed=0):
    torch.manual_seed(seed)
    return MetaAttention(C, n_head, bias=True, dropout=0.0).double()


def masks(B, T, density, seed):
    return torch.rand(B, T, generator=torch.Generator().manual_seed(seed)) < density


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 14), st.sampled_from([0.0, 0.1, 0.3, 0.6, 1.0]), st.integers(0, 10**6))
def test_equals_the_double_loop_in_value_and_gradient(B, T, density, seed):
    m, is_meta = layer(seed=seed), masks(B, T, density, seed)
    x = torch.randn(B, T, 8, dtype=torch.float64, requires_grad=True)
    g = torch.randn(B, T, 8, dtype=torch.float64)
    inputs = [x, *m.parameters()]
    fast, slow = m(x, meta_index(is_meta)), meta_attention(x, is_meta, m.c_attn, m.c_proj, 2)
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-12)
    fast = torch.autograd.grad((fast * g).sum(), inputs)
    # where there is no meta-token the loops never touch the parameters
    slow = torch.autograd.grad((slow * g).sum(), inputs) if is_meta.any() else map(torch.zeros_like, inputs)
    for ours, expected in zip(fast, slow, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


def test_a_marker_at_position_0_in_a_padded_row():
    m = layer()
    is_meta = torch.tensor([[True, False, False, False, False], [False, True, True, False, True]])
    index = meta_index(is_meta)
    assert index.tolist() == [[0, 5, 5], [1, 2, 4]]
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(m(x, index), meta_attention(x, is_meta, m.c_attn, m.c_proj, 2))


def test_gradcheck():
    m = layer(C=4)
    index = meta_index(torch.tensor([[1, 0, 1, 1, 0], [0, 0, 1, 0, 0]]).bool())
    x = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, w: m(x * w, index), (x, torch.rand(4, dtype=torch.float64, requires_grad=True))
    )


def test_pads_cannot_be_seen():
    """More pads change nothing, not even where the row that a pad reads is not a number."""
    m, T = layer(), 6
    x = torch.randn(1, T, 8, dtype=torch.float64)
    x[0, T - 1] = float("nan")  # pads read the last row
    index = torch.tensor([[1, 3]])
    padded = torch.tensor([[1, 3, T, T, T]])
    out = m(x, index)
    assert torch.isfinite(out).all()
    torch.testing.assert_close(m(x, padded), out)


def test_other_rows_are_exactly_zero():
    m = layer()
    is_meta = masks(3, 20, 0.2, 5)
    out = m(torch.randn(3, 20, 8, dtype=torch.float64), meta_index(is_meta))
    assert (out[~is_meta] == 0).all() and (out[is_meta] != 0).all()


def test_no_meta_token_gives_zero_output_and_gradients_for_every_parameter():
    """DDP waits for the gradient of every parameter in every step."""
    m = layer()
    x = torch.randn(2, 7, 8, dtype=torch.float64, requires_grad=True)
    for index in (torch.empty(2, 0, dtype=torch.long), torch.full((2, 3), 7)):
        out = m(x, index)
        assert out.shape == x.shape and (out == 0).all()
        grads = torch.autograd.grad(out.sum(), list(m.parameters()))
        assert all((grad == 0).all() for grad in grads)


def test_all_meta_is_ordinary_causal_attention():
    m = layer()
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(m(x, torch.arange(9).expand(2, 9)), CausalSelfAttention.forward(m, x))


@given(st.integers(1, 12), st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_scatter_undoes_gather(T, seed):
    is_meta = masks(2, T, 0.5, seed)
    x = torch.randn(2, T, 3)
    index = meta_index(is_meta)
    assert torch.equal(scatter_rows(gather_rows(x, index), index, T), torch.where(is_meta[..., None], x, 0))


def test_the_reference_can_fail():
    m = layer()
    is_meta = masks(2, 8, 0.5, 1)
    x = torch.randn(2, 8, 8, dtype=torch.float64)
    wrong = meta_index(~is_meta)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(m(x, wrong), meta_attention(x, is_meta, m.c_attn, m.c_proj, 2))
