"""Every compiled kernel against the formula in float64, and what it does with NaN."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.ops.cpu import block as block_kernel
from rorqual.ops.cpu import compiled
from rorqual.ops.cpu.attention import RowReads, attend_next, attend_once
from rorqual.ops.cpu.block import BlockWeights, decode_block
from rorqual.ops.cpu.draw import draw_whole
from rorqual.ops.cpu.pointwise import rms_norm, rms_norm_backward, rotate_halves, swiglu, swiglu_backward

TIGHT = {"rtol": 3e-6, "atol": 3e-6}


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape, dtype=np.float32)


def exact(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x).double()


def close(found: np.ndarray, expected: torch.Tensor) -> None:
    torch.testing.assert_close(torch.from_numpy(found).double(), expected.detach(), **TIGHT)


def test_numba_is_here_so_that_these_tests_test_it() -> None:
    assert compiled.NUMBA is not None
    assert compiled.serves(torch.zeros(3))
    assert not compiled.serves(torch.zeros(3, dtype=torch.float64))
    assert not compiled.serves(torch.zeros(3, device="meta"))


def test_exp() -> None:
    @compiled.compiled
    def run(x: np.ndarray, out: np.ndarray) -> None:
        for i in range(len(x)):
            out[i] = compiled.exp(x[i])

    x = np.linspace(-86.9, 88.0, 100_001, dtype=np.float32)
    out = np.empty_like(x)
    run(x, out)
    np.testing.assert_allclose(out, np.exp(x.astype(np.float64)), rtol=2e-7)
    edges = np.array([0.0, -87.1, -1e30, -np.inf, np.nan], dtype=np.float32)
    run(edges, out[:5])
    np.testing.assert_array_equal(out[:5], np.array([1.0, 0.0, 0.0, 0.0, np.nan], dtype=np.float32))


@pytest.mark.parametrize("shape", ((1, 1), (5, 7), (33, 128)))
def test_rms_norm_and_its_gradients(shape: tuple[int, int]) -> None:
    x, weight, gradient = random(*shape), random(shape[1], seed=1), random(*shape, seed=2)
    out, inverse, x_gradient = np.empty_like(x), np.empty(shape[0], dtype=np.float32), np.empty_like(x)
    weight_gradient = np.ones_like(weight)
    rms_norm(x, weight, 1e-5, out, inverse)
    rms_norm_backward(gradient, x, weight, inverse, x_gradient, weight_gradient)
    x64, weight64 = exact(x).requires_grad_(), exact(weight).requires_grad_()
    expected = F.rms_norm(x64, (shape[1],), weight64, eps=1e-5)
    expected.backward(exact(gradient))
    assert x64.grad is not None and weight64.grad is not None
    close(out, expected)
    close(x_gradient, x64.grad)
    close(weight_gradient, 1.0 + weight64.grad)


def test_swiglu_and_its_gradients_far_out_too() -> None:
    gate, up, gradient = random(5, 37) * 40, random(5, 37, seed=1), random(5, 37, seed=2)
    out, gate_gradient, up_gradient = (np.empty_like(gate) for _ in range(3))
    swiglu(gate, up, out)
    swiglu_backward(gradient, gate, up, gate_gradient, up_gradient)
    gate64, up64 = exact(gate).requires_grad_(), exact(up).requires_grad_()
    expected = F.silu(gate64) * up64
    expected.backward(exact(gradient))
    assert gate64.grad is not None and up64.grad is not None
    for found, truth in ((out, expected), (gate_gradient, gate64.grad), (up_gradient, up64.grad)):
        torch.testing.assert_close(exact(found), truth.detach(), rtol=1e-5, atol=1e-5)


def test_swiglu_of_a_gate_that_no_float_squares() -> None:
    gate, one = np.array([[-1e35, -3e38, 0.0]], dtype=np.float32), np.ones((1, 3), dtype=np.float32)
    out, gate_gradient, up_gradient = (np.empty_like(gate) for _ in range(3))
    swiglu(gate, one, out)
    swiglu_backward(one, gate, one, gate_gradient, up_gradient)
    assert out.tolist() == up_gradient.tolist() == [[0.0, 0.0, 0.0]]
    assert gate_gradient.tolist() == [[0.0, 0.0, 0.5]]


def test_rotation_and_back() -> None:
    x, angle = random(5, 3, 2, 4), random(5, 4)
    cos, sin = np.stack([np.cos(angle)] * 2, axis=1), np.stack([-np.sin(angle), np.sin(angle)], axis=1)
    turned, back = np.empty_like(x), np.empty_like(x)
    rotate_halves(x, cos, sin, 1.0, turned)
    rotate_halves(turned, cos, sin, -1.0, back)
    expected = (x[:, :, 0] + 1j * x[:, :, 1]) * np.exp(1j * angle)[:, None]
    np.testing.assert_allclose(turned[:, :, 0] + 1j * turned[:, :, 1], expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(back, x, rtol=1e-6, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    data=st.data(), groups=st.sampled_from([1, 2]), sharing=st.sampled_from([1, 3]), width=st.sampled_from([2, 8, 34])
)
def test_attention_over_cached_keys(data: st.DataObject, groups: int, sharing: int, width: int) -> None:
    num_slots, capacity = 4, 11
    lengths = data.draw(st.lists(st.integers(1, capacity), min_size=1, max_size=num_slots))
    slots = data.draw(st.permutations(range(num_slots)))[: len(lengths)]
    shared = [data.draw(st.integers(0, length)) for length in lengths]
    value_width = data.draw(st.integers(1, width))
    k, v = random(num_slots, capacity, groups, width), random(num_slots, capacity, groups, width, seed=1)
    k[:, :], v[:, :] = k[:1], v[:1]  # all slots hold the same, so that any may be read for any
    q = random(len(lengths), groups * sharing, width, seed=2)
    out = np.full((*q.shape[:2], value_width), np.nan, dtype=np.float32)
    reads = RowReads(np.array(slots), np.array(lengths), np.array([3] * len(lengths)), np.array(shared))
    attend_once(q, k, v, reads, 0.7, out)
    for row, (slot, length) in enumerate(zip(slots, lengths, strict=True)):
        for head in range(groups * sharing):
            scores = 0.7 * exact(k[slot, :length, head // sharing]) @ exact(q[row, head])
            expected = scores.softmax(0) @ exact(v[slot, :length, head // sharing, :value_width])
            torch.testing.assert_close(exact(out[row, head]), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sharing", (1, 2, 3, 4))
def test_a_shared_prompt_is_read_in_its_own_slot(sharing: int) -> None:
    k, v, q = random(2, 5, 1, 4), random(2, 5, 1, 4, seed=1), random(1, sharing, 4, seed=2)
    k[1, :3], v[1, :3] = np.nan, np.nan
    out = np.empty_like(q)
    attend_once(q, k, v, RowReads(np.array([1]), np.array([5]), np.array([0]), np.array([3])), 1.0, out)
    keys, values = np.concatenate((k[0, :3], k[1, 3:]))[:, 0], np.concatenate((v[0, :3], v[1, 3:]))[:, 0]
    for head in range(sharing):
        close(out[0, head], (exact(keys) @ exact(q[0, head])).softmax(0) @ exact(values))


def test_the_next_token_is_turned_stored_and_seen() -> None:
    k, v, q = random(3, 6, 2, 8), random(3, 6, 2, 8, seed=1), random(2, 4, 8, seed=2)
    new_k, new_v, angle = random(2, 2, 8, seed=3), random(2, 2, 8, seed=4), random(2, 4, seed=5)
    cos, sin = np.concatenate([np.cos(angle)] * 2, axis=1), np.concatenate([-np.sin(angle), np.sin(angle)], axis=1)
    reads = RowReads(np.array([2, 0]), np.array([4, 6]), np.array([2, 0]), np.array([0, 0]))
    k_before, v_before, q_before, out, expected = k.copy(), v.copy(), q.copy(), np.empty_like(q), np.empty_like(q)
    attend_next(q, new_k, new_v, cos, sin, k, v, reads, 0.3, out)

    def turned(x: np.ndarray) -> np.ndarray:
        complex_x = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angle)[:, None]
        return np.concatenate((complex_x.real, complex_x.imag), axis=-1).astype(np.float32)

    for row, (slot, last) in enumerate(((2, 3), (0, 5))):
        k_before[slot, last], v_before[slot, last] = turned(new_k)[row], new_v[row]
    np.testing.assert_allclose(k, k_before, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(v, v_before)
    attend_once(turned(q_before), k_before, v_before, reads, 0.3, expected)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("where", ("query", "key", "value"))
def test_attention_keeps_nan_and_keeps_it_to_its_row(where: str) -> None:
    arrays = {"query": random(2, 1, 4), "key": random(2, 9, 1, 4), "value": random(2, 9, 1, 4, seed=1)}
    arrays[where][0].reshape(-1)[0] = np.nan
    out, slots = np.empty((2, 1, 4), dtype=np.float32), np.arange(2)
    attend_once(*arrays.values(), RowReads(slots, np.array([9, 9]), slots, np.array([0, 0])), 1.0, out)
    assert np.isnan(out[0]).any()
    assert np.isfinite(out[1]).all()


def test_nan_passes_through_every_pointwise_kernel() -> None:
    x = random(2, 8)
    x[0, 3] = np.nan
    out, inverse = np.empty_like(x), np.empty(2, dtype=np.float32)
    rms_norm(x, np.ones(8, dtype=np.float32), 1e-6, out, inverse)
    assert np.isnan(out[0]).all() and np.isfinite(out[1]).all()
    swiglu(x, np.ones_like(x), out)
    assert np.isnan(out[0, 3]) and np.isnan(out).sum() == 1


@pytest.mark.parametrize(("rows", "inputs", "outputs"), ((1, 1, 1), (4, 16, 4), (7, 33, 9), (66, 20, 13)))
def test_products_of_any_size(rows: int, inputs: int, outputs: int) -> None:
    x, weight, out = random(rows, inputs), random(outputs, inputs, seed=1), random(rows, outputs, seed=2)
    expected = exact(out) + exact(x) @ exact(weight).T
    block_kernel._accumulate(x, weight, out)
    torch.testing.assert_close(exact(out), expected, rtol=1e-5, atol=1e-5)


def test_a_block_takes_more_rows_than_it_does_at_once() -> None:
    """The same rows, alone and together."""
    none = np.empty(0, dtype=np.float32)
    matrices = {
        "q": (16, 12),
        "k": (8, 12),
        "v": (8, 12),
        "o": (12, 16),
        "gate": (20, 12),
        "up": (20, 12),
        "down": (12, 20),
    }
    norms = {"input_norm": random(12), "post_norm": random(12, seed=1)}
    weights = {name: random(*shape, seed=i) * 0.3 for i, (name, shape) in enumerate(matrices.items())} | norms
    block = BlockWeights(**{name: weights.get(name, none) for name in BlockWeights._fields})
    num_rows = 2 * block_kernel.ROWS_AT_ONCE + 3
    x, cos, sin = random(num_rows, 12), random(num_rows, 4), random(num_rows, 4, seed=1)
    slots, lengths = np.arange(num_rows), np.arange(num_rows) % 5 + 1
    caches = [(random(num_rows, 5, 2, 4), random(num_rows, 5, 2, 4, seed=1)) for _ in range(2)]
    together, alone = x.copy(), x.copy()
    reads = RowReads(slots, lengths, slots, np.zeros_like(slots))
    decode_block(together, block, cos, sin, *caches[0], reads, 1e-6, 0.5)
    for row in range(num_rows):
        own, part = RowReads(*(each[row : row + 1] for each in reads)), slice(row, row + 1)
        decode_block(alone[part], block, cos[part], sin[part], *caches[1], own, 1e-6, 0.5)
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(caches[0][0], caches[1][0], rtol=1e-5, atol=1e-6)
    assert not np.allclose(together, x)


@pytest.mark.parametrize("vocabulary", (1, 5, 256, 257, 1000))
def test_draws_invert_the_cumulative_distribution(vocabulary: int) -> None:
    num_rows = 40
    logits, uniform = random(num_rows, vocabulary) * 3, np.random.default_rng(0).random(num_rows)
    logits[3, : vocabulary // 2] = -np.inf
    scale = np.linspace(0.5, 2.0, num_rows, dtype=np.float32)
    token, (logprob, entropy) = np.empty(num_rows, dtype=np.int64), np.empty((2, num_rows), dtype=np.float32)
    draw_whole(logits, logits.max(axis=1), scale, uniform, token, logprob, entropy)
    truth = (exact(logits) * exact(scale)[:, None]).log_softmax(-1)
    cumulative = truth.exp().cumsum(-1)
    rows = torch.arange(num_rows)
    assert (exact(uniform) < cumulative[rows, token] + 1e-6).all()
    assert (exact(uniform) >= (cumulative - truth.exp())[rows, token] - 1e-6).all()
    torch.testing.assert_close(exact(logprob), truth[rows, token], rtol=1e-5, atol=1e-5)
    expected_entropy = -torch.special.xlogy(truth.exp(), truth.exp()).sum(-1)
    torch.testing.assert_close(exact(entropy), expected_entropy, rtol=1e-4, atol=1e-5)


def test_a_draw_at_the_very_end_has_weight() -> None:
    """Where the number drawn lies past what rounding lets the weights sum to, the last token of any weight is drawn."""
    logits = np.full((1, 600), -np.inf, dtype=np.float32)
    logits[0, [3, 300]] = 0.0
    token, (logprob, entropy) = np.empty(1, dtype=np.int64), np.empty((2, 1), dtype=np.float32)
    one, last = np.ones(1, dtype=np.float32), np.array([np.nextafter(1.0, 0.0)])
    draw_whole(logits, logits.max(axis=1), one, np.array([1.0]), token, logprob, entropy)
    assert token[0] == 300
    draw_whole(logits, logits.max(axis=1), one, last, token, logprob, entropy)
    assert token[0] == 300
    draw_whole(logits, logits.max(axis=1), one, np.array([0.0]), token, logprob, entropy)
    assert token[0] == 3
    assert logprob[0] == pytest.approx(-np.log(2), rel=1e-6)


def test_a_draw_from_nan_has_the_logprob_nan() -> None:
    logits = random(2, 300)
    logits[1, 299] = np.nan
    token, (logprob, entropy) = np.empty(2, dtype=np.int64), np.empty((2, 2), dtype=np.float32)
    highest = torch.from_numpy(logits).amax(-1).numpy()
    draw_whole(logits, highest, np.ones(2, dtype=np.float32), np.array([0.5, 0.5]), token, logprob, entropy)
    assert np.isfinite(logprob[0]) and np.isnan(logprob[1])
