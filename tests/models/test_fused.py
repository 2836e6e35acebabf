"""The compiled block beside its twin: the same hidden states, the same cache; and when it steps aside."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rorqual.models import fused
from rorqual.models.cache import KVCache, cached_layout
from rorqual.models.decoder import Decoder
from rorqual.models.moe import MLP
from rorqual.ops.cpu import compiled


def decode(decoder: Decoder, num_steps: int = 6) -> tuple[Tensor, KVCache]:
    """Hidden states of three rows of unlike lengths, one token at a time."""
    cache, generator = decoder.new_cache(num_slots=4, capacity=16), torch.Generator().manual_seed(0)
    out = []
    with torch.no_grad():
        prompt_RQ = torch.randint(61, (3, 4), generator=generator)
        decoder.forward_cached(prompt_RQ, cache, cached_layout([2, 0, 3], [0, 0, 0], 4, cache))
        for step in range(num_steps):
            token_R1 = torch.randint(61, (3, 1), generator=generator)
            starts = [step + 4, step + 2, step + 3]
            out.append(decoder.forward_cached(token_R1, cache, cached_layout([2, 0, 3], starts, 1, cache)).hidden)
    return torch.cat(out, dim=1), cache


def count_kernel(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    original = fused.decode_block

    def counted(x, *rest):  # type: ignore[no-untyped-def]
        calls.append(len(x))
        original(x, *rest)

    monkeypatch.setattr(fused, "decode_block", counted)
    return calls


@pytest.mark.parametrize(
    "changes",
    (
        {},
        {"qk_norm": False, "qkv_bias": True},
        {"qkv_bias": True, "output_bias": True, "mlp_bias": True},
        {"num_kv_heads": 4},
        {"num_kv_heads": 1},
    ),
)
def test_fused_equals_its_twin(
    tiny_decoder: Callable[..., Decoder], monkeypatch: pytest.MonkeyPatch, changes: dict[str, object]
) -> None:
    decoder = tiny_decoder("gqa", **changes).float()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    calls = count_kernel(monkeypatch)
    found, found_cache = decode(decoder)
    assert calls == [3] * 6 * decoder.config.num_layers
    monkeypatch.setattr(compiled, "NUMBA", None)
    expected, expected_cache = decode(decoder)
    assert len(calls) == 6 * decoder.config.num_layers
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)
    for columns, expected_columns in zip(found_cache.columns, expected_cache.columns, strict=True):
        torch.testing.assert_close(columns, expected_columns, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kind", ("mla", "softmax"))
def test_other_blocks_are_left_to_torch(
    tiny_decoder: Callable[..., Decoder], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    calls = count_kernel(monkeypatch)
    decode(tiny_decoder(kind).float())
    assert calls == []


def test_float64_and_large_blocks_are_left_to_torch(
    tiny_decoder: Callable[..., Decoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = count_kernel(monkeypatch)
    decode(tiny_decoder("gqa"))
    assert calls == []
    monkeypatch.setattr(fused, "MOST_WEIGHTS", 100)
    decode(tiny_decoder("gqa").float())
    assert calls == []


def test_weights_are_those_of_now(tiny_decoder: Callable[..., Decoder]) -> None:
    """A step in place, other tensors in a parameter's stead, and a copy that goes its own way."""
    decoder = tiny_decoder("gqa").float()
    before, _ = decode(decoder)
    twin = copy.deepcopy(decoder)
    with torch.no_grad():
        decoder.layers[0].mlp.up_proj.weight.mul_(2.0)
    changed, _ = decode(decoder)
    assert not torch.allclose(changed, before)
    assert torch.equal(decode(twin)[0], before)
    twin.load_state_dict({name: each.clone() for name, each in decoder.state_dict().items()}, assign=True)
    assert torch.equal(decode(twin)[0], changed)


def test_a_replaced_or_hooked_module_is_seen(
    tiny_decoder: Callable[..., Decoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter in a layer's place, another MLP, a hook, a matrix that is stored turned: torch then decodes."""

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    def adapt(decoder: Decoder) -> None:
        old = decoder.layers[0].mlp.up_proj
        decoder.layers[0].mlp.up_proj = Doubled(old.in_features, old.out_features, bias=False)

    def replace_mlp(decoder: Decoder) -> None:
        decoder.layers[0].mlp = MLP(24, 32)

    def hook(decoder: Decoder) -> None:
        decoder.layers[0].mlp.up_proj.register_forward_hook(lambda module, inputs, output: output * 2)

    def turn(decoder: Decoder) -> None:
        linear = decoder.layers[0].mlp.up_proj
        linear.weight = nn.Parameter(linear.weight.detach().t().contiguous().t() * 2)

    for change in (adapt, replace_mlp, hook, turn):
        decoder = tiny_decoder("gqa").float()
        before, _ = decode(decoder)
        change(decoder)
        found, _ = decode(decoder)
        with monkeypatch.context() as patch:
            patch.setattr(compiled, "NUMBA", None)
            expected, _ = decode(decoder)
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)
        assert not torch.allclose(found, before)


def test_copies_and_pickles_bring_no_arrays_along(tiny_decoder: Callable[..., Decoder]) -> None:
    decoder = tiny_decoder("gqa").float()
    fresh = len(pickle.dumps(decoder))
    decode(decoder)
    assert len(pickle.dumps(decoder)) < 1.01 * fresh
    again = pickle.loads(pickle.dumps(decoder))
    assert torch.equal(decode(again)[0], decode(decoder)[0])


def test_gradients_are_left_to_torch(tiny_decoder: Callable[..., Decoder]) -> None:
    decoder = tiny_decoder("gqa").float()
    cache = decoder.new_cache(num_slots=1, capacity=2)
    hidden = decoder.forward_cached(torch.tensor([[7]]), cache, cached_layout([0], [0], 1, cache)).hidden
    hidden.pow(3).sum().backward()
    assert all(each.grad is not None and each.grad.any() for each in decoder.layers[0].self_attn.v_proj.parameters())
