"""selected_logprobs against log_softmax and numerical gradients: every way in which it cuts up the work."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rorqual.train import logprobs
from rorqual.train.logprobs import KeptBatch, selected_logprobs


def case(num_targets: int = 23, vocabulary: int = 57, hidden: int = 8, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden_ND = torch.randn(num_targets, hidden, dtype=torch.float64, generator=generator).requires_grad_()
    unembedding_VD = torch.randn(vocabulary, hidden, dtype=torch.float64, generator=generator).requires_grad_()
    return hidden_ND, unembedding_VD, torch.randint(vocabulary, (num_targets,), generator=generator)


def kept_sets(target_N: Tensor, vocabulary: int, sizes: tuple[int, ...] = (1, 2, 7), seed: int = 1) -> KeptBatch:
    """Random ascending sets of varied size, each with its target in it."""
    generator = torch.Generator().manual_seed(seed)
    sets = []
    for row, target in enumerate(target_N.tolist()):
        others = torch.randperm(vocabulary, generator=generator).tolist()[: sizes[row % len(sizes)] - 1]
        sets.append(sorted({target, *others}))
    offsets = torch.tensor([0, *(len(each) for each in sets)]).cumsum(0)
    return KeptBatch(offsets, torch.tensor([token for each in sets for token in each]))


def naive(
    hidden_ND: Tensor, unembedding_VD: Tensor, target_N: Tensor, temperature: float, kept: KeptBatch | None
) -> Tensor:
    logits_NV = hidden_ND @ unembedding_VD.T / temperature
    if kept is not None:
        dropped_NV = torch.ones_like(logits_NV, dtype=torch.bool)
        for row in range(len(target_N)):
            dropped_NV[row, kept.ids[kept.offsets_N1[row] : kept.offsets_N1[row + 1]]] = False
        logits_NV = logits_NV.masked_fill(dropped_NV, -torch.inf)
    return torch.log_softmax(logits_NV, dim=-1).gather(1, target_N[:, None])[:, 0]


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation returned, backward included."""

    num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.is_contiguous():
                self.num_elements = max(self.num_elements, tensor.numel())
        return result


def gradients(logprobs_N: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    weight_N = torch.randn(len(logprobs_N), dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    return torch.autograd.grad(logprobs_N, inputs, weight_N.to(logprobs_N.dtype))


@pytest.mark.parametrize("temperature", [0.6, 1.0, 3.0])
@pytest.mark.parametrize("with_kept", [False, True])
@pytest.mark.parametrize(("chunk_tokens", "tile_elements"), [(None, 1 << 20), (None, 100), (1, 40), (7, 40), (64, 9)])
def test_values_and_gradients_equal_log_softmax(
    monkeypatch: pytest.MonkeyPatch, temperature: float, with_kept: bool, chunk_tokens: int | None, tile_elements: int
) -> None:
    monkeypatch.setitem(logprobs.TILE_ELEMENTS, "cpu", tile_elements)
    hidden_ND, unembedding_VD, target_N = case()
    kept = kept_sets(target_N, len(unembedding_VD)) if with_kept else None
    actual_N = selected_logprobs(
        hidden_ND, unembedding_VD, target_N, temperature=temperature, kept=kept, chunk_tokens=chunk_tokens
    )
    expected_N = naive(hidden_ND, unembedding_VD, target_N, temperature, kept)
    torch.testing.assert_close(actual_N, expected_N, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        gradients(actual_N, hidden_ND, unembedding_VD),
        gradients(expected_N, hidden_ND, unembedding_VD),
        rtol=1e-11,
        atol=1e-12,
    )


@pytest.mark.parametrize("with_kept", [False, True])
@pytest.mark.parametrize("chunk_tokens", [None, 2])
def test_gradcheck(with_kept: bool, chunk_tokens: int | None) -> None:
    hidden_ND, unembedding_VD, target_N = case(num_targets=5, vocabulary=6, hidden=3)
    kept = kept_sets(target_N, 6, sizes=(2, 4)) if with_kept else None
    assert torch.autograd.gradcheck(
        lambda h, w: selected_logprobs(h, w, target_N, temperature=0.7, kept=kept, chunk_tokens=chunk_tokens),
        (hidden_ND, unembedding_VD),
    )


def test_a_second_backward_through_the_same_graph_gives_the_same_gradients() -> None:
    hidden_ND, unembedding_VD, target_N = case()
    total = selected_logprobs(hidden_ND, unembedding_VD, target_N).sum()
    first = torch.autograd.grad(total, (hidden_ND, unembedding_VD), retain_graph=True)
    second = torch.autograd.grad(total, (hidden_ND, unembedding_VD))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_float32_is_close_to_float64_for_a_large_vocabulary_and_extreme_logits() -> None:
    hidden_ND, unembedding_VD, target_N = case(num_targets=40, vocabulary=30_011, hidden=16)
    hidden_ND = (hidden_ND.detach() * 20).requires_grad_()
    expected_N = naive(hidden_ND, unembedding_VD, target_N, 1.0, None)
    single = [each.detach().float().requires_grad_() for each in (hidden_ND, unembedding_VD)]
    actual_N = selected_logprobs(*single, target_N)
    assert actual_N.dtype == torch.float32
    assert float(expected_N.detach().min()) < -150
    torch.testing.assert_close(actual_N.double(), expected_N, rtol=3e-6, atol=3e-5)
    actual, expected = gradients(actual_N, *single), gradients(expected_N, hidden_ND, unembedding_VD)
    for mine, truth in zip(actual, expected, strict=True):
        assert mine.dtype == torch.float32
        assert float((mine - truth).norm() / truth.norm()) < 1e-4


def test_bfloat16_inputs_are_computed_in_float32() -> None:
    hidden_ND, unembedding_VD, target_N = case()
    half = [each.detach().bfloat16().requires_grad_() for each in (hidden_ND, unembedding_VD)]
    expected_N = naive(half[0].double(), half[1].double(), target_N, 1.0, None)
    actual_N = selected_logprobs(*half, target_N)
    assert actual_N.dtype == torch.float32
    torch.testing.assert_close(actual_N.double(), expected_N, rtol=1e-5, atol=1e-5)
    assert [each.dtype for each in gradients(actual_N, *half)] == [torch.bfloat16] * 2


def test_a_single_kept_token_has_log_prob_exactly_zero_and_no_gradient() -> None:
    hidden_ND, unembedding_VD, target_N = case()
    kept = KeptBatch(torch.arange(len(target_N) + 1), target_N)
    logprobs_N = selected_logprobs(hidden_ND, unembedding_VD, target_N, temperature=0.6, kept=kept)
    assert bool((logprobs_N == 0.0).all())
    assert all(bool((each == 0.0).all()) for each in gradients(logprobs_N, hidden_ND, unembedding_VD))


def test_log_probs_are_never_positive() -> None:
    hidden_ND, unembedding_VD, _ = case(num_targets=200, vocabulary=31)
    single = (hidden_ND.detach().float() * 30, unembedding_VD.detach().float())
    best_N = (single[0] @ single[1].T).argmax(1)
    assert float(selected_logprobs(*single, best_N, chunk_tokens=50).max()) <= 0.0


def test_no_targets_still_reach_both_inputs() -> None:
    hidden_ND, unembedding_VD, _ = case()
    none_N = selected_logprobs(hidden_ND[:0], unembedding_VD, torch.zeros(0, dtype=torch.int64))
    assert none_N.shape == (0,)
    assert all(bool((each == 0).all()) for each in torch.autograd.grad(none_N.sum(), (hidden_ND, unembedding_VD)))


def test_memory_stays_far_below_the_full_logits() -> None:
    hidden_ND, unembedding_VD, target_N = case(num_targets=2048, vocabulary=20_000, hidden=4)
    single = [each.detach().float().requires_grad_() for each in (hidden_ND, unembedding_VD)]
    with LargestTensor() as watch:
        selected_logprobs(*single, target_N).sum().backward()
    assert 0 < watch.num_elements <= logprobs.TILE_ELEMENTS["cpu"] < 2048 * 20_000 / 30


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_refuses_a_greedy_temperature(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature"):
        selected_logprobs(*case(), temperature=temperature)


def test_refuses_what_does_not_fit() -> None:
    hidden_ND, unembedding_VD, target_N = case()
    with pytest.raises(ValueError, match=r"expected \(22, 8\)"):
        selected_logprobs(hidden_ND, unembedding_VD, target_N[1:])
    with pytest.raises(ValueError, match="vocabulary has 57 entries"):
        selected_logprobs(hidden_ND, unembedding_VD, target_N + 57)
    kept = kept_sets(target_N, 57)
    with pytest.raises(ValueError, match="22 sets"):
        selected_logprobs(hidden_ND[1:], unembedding_VD, target_N[1:], kept=kept)
    strange_N = target_N.clone()
    strange_N[3] = (target_N[3] + 1) % 57
    with pytest.raises(ValueError, match="target 3 .* not in its own kept set"):
        selected_logprobs(hidden_ND, unembedding_VD, strange_N, kept=kept)
