"""The decoder on Triton's kernels of native sparse attention gives what it gives in plain torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from rorqual.models.cache import cached_layout
from rorqual.models.decoder import Decoder
from rorqual.models.layout import TokenRun, causal_layout, layout_from_runs
from rorqual.ops.dispatch import Kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BOTH: tuple[Kernels, Kernels] = ("tiled", "triton")


def random_ids(length: int) -> Tensor:
    return torch.randint(61, (length,), generator=torch.Generator().manual_seed(0)).to(DEVICE)


def small(tiny_decoder: Callable[..., Decoder]) -> Decoder:
    return tiny_decoder("gqa+nsa", num_layers=1).float().to(DEVICE)


def assert_close(ours: Tensor, expected: Tensor) -> None:
    assert float((ours - expected).detach().norm()) <= 1e-5 * float(expected.detach().norm())


def test_packed_logits_and_gradients(tiny_decoder: Callable[..., Decoder]) -> None:
    """Sequences shorter than a block, and completions that share a packed prompt."""
    runs = [TokenRun(0, 7), TokenRun(7, 9, 0, 7), TokenRun(16, 2)]
    decoder, ids, layout = small(tiny_decoder).train(), random_ids(18), layout_from_runs(runs, DEVICE, 3.0)
    logits, gradients = [], []
    for kernels in BOTH:
        decoder.kernels = kernels
        logits.append(decoder.logits(decoder(ids, layout).hidden))
        loss = F.cross_entropy(logits[-1][:-1], ids[1:])
        gradients.append(torch.autograd.grad(loss, list(decoder.parameters())))
    assert_close(logits[1], logits[0])
    for ours, expected in zip(gradients[1], gradients[0], strict=True):
        assert_close(ours, expected)


def test_cached_decode(tiny_decoder: Callable[..., Decoder]) -> None:
    """Two rows of unlike length: a prompt at once, then token by token."""
    decoder, ids = small(tiny_decoder), random_ids(22)
    prompts, hidden = [ids[:11].expand(2, -1), ids[11:13, None], ids[13:15, None]], []
    with torch.no_grad():
        for kernels in BOTH:
            decoder.kernels = kernels
            cache = decoder.new_cache(num_slots=2, capacity=24)
            decoder.forward_cached(ids[None, 15:21], cache, cached_layout([1], [0], 6, cache))
            fed, parts = [0, 6], []
            for rows_RQ in prompts:
                layout = cached_layout([0, 1], fed, rows_RQ.shape[1], cache)
                parts.append(decoder.forward_cached(rows_RQ, cache, layout).hidden)
                fed = [done + rows_RQ.shape[1] for done in fed]
            hidden.append(torch.cat(parts, dim=1))
        assert_close(hidden[1], hidden[0])


def test_packed_equals_cached_on_the_kernels(tiny_decoder: Callable[..., Decoder]) -> None:
    decoder, ids = small(tiny_decoder), random_ids(12)
    decoder.kernels = "triton"
    with torch.no_grad():
        expected = decoder(ids, causal_layout([12], DEVICE)).hidden
        cache = decoder.new_cache(num_slots=1, capacity=12)
        decoder.forward_cached(ids[None, :9], cache, cached_layout([0], [0], 9, cache))
        output = decoder.forward_cached(ids[None, 9:], cache, cached_layout([0], [9], 3, cache))
    assert_close(output.hidden[0], expected[9:])
