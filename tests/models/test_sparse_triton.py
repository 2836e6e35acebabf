"""The decoder on Triton's kernels of DeepSeek Sparse Attention gives what it gives in plain torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from rorqual.models.cache import cached_layout
from rorqual.models.decoder import Decoder
from rorqual.models.layout import TokenRun, layout_from_runs
from rorqual.ops.dispatch import Kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KINDS = ("gqa+dsa", "mla+dsa")
BOTH: tuple[Kernels, Kernels] = ("tiled", "triton")


def random_ids(length: int) -> Tensor:
    return torch.randint(61, (length,), generator=torch.Generator().manual_seed(0)).to(DEVICE)


def assert_close(ours: Tensor, expected: Tensor) -> None:
    assert float((ours - expected).detach().norm()) <= 1e-5 * float(expected.detach().norm())


@pytest.mark.parametrize("kind", KINDS)
def test_packed_logits_selections_and_gradients_of_both_losses(tiny_decoder: Callable[..., Decoder], kind: str) -> None:
    """Sequences of unlike length, and completions that share a packed prompt."""
    decoder = tiny_decoder(kind).float().to(DEVICE).train()
    ids, layout = (
        random_ids(24),
        layout_from_runs([TokenRun(0, 9), TokenRun(9, 11, 0, 9), TokenRun(20, 4)], DEVICE, 3.0),
    )
    weight_T = torch.full((24,), 1 / 24, device=DEVICE)
    outputs, gradients = [], []
    for kernels in BOTH:
        decoder.kernels = kernels
        output = decoder(ids, layout, indexer_weight_T=weight_T)
        loss = F.cross_entropy(decoder.logits(output.hidden)[:-1], ids[1:])
        loss = loss + torch.stack([each.total for each in output.indexer_losses]).sum()
        outputs.append(output)
        gradients.append(torch.autograd.grad(loss, list(decoder.parameters())))
    assert torch.equal(outputs[1].selections, outputs[0].selections)
    assert_close(outputs[1].hidden, outputs[0].hidden)
    for ours, expected in zip(outputs[1].indexer_losses, outputs[0].indexer_losses, strict=True):
        assert_close(ours.kl_T, expected.kl_T)
    for ours, expected in zip(gradients[1], gradients[0], strict=True):
        assert_close(ours, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_cached_decode(tiny_decoder: Callable[..., Decoder], kind: str) -> None:
    """Two rows: a prompt at once, then token by token."""
    decoder, ids = tiny_decoder(kind).float().to(DEVICE).eval(), random_ids(20)
    hidden = []
    with torch.no_grad():
        for kernels in BOTH:
            decoder.kernels = kernels
            cache, parts = decoder.new_cache(num_slots=2, capacity=20), []
            for start, width in ((0, 8), (8, 1), (9, 1)):
                rows_RQ = torch.stack([ids[start : start + width], ids[10 + start : 10 + start + width]])
                layout = cached_layout(range(2), [start, start], width, cache)
                parts.append(decoder.forward_cached(rows_RQ, cache, layout).hidden)
            hidden.append(torch.cat(parts, dim=1))
    assert_close(hidden[1], hidden[0])
