"""Attention in float64 against the formula written out, token by token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from rorqual.models import attention
from rorqual.models.attention import GroupedQueryAttention, MultiHeadLatentAttention
from rorqual.models.cache import CachedLayout, Column, KVCache, cached_layout
from rorqual.models.decoder import Decoder
from rorqual.models.layout import AttentionBlock, PackedLayout, causal_layout
from rorqual.models.rope import Rotation


@pytest.mark.parametrize("kind", ("gqa", "mla", "softmax"))
def test_cached_equals_packed(tiny_decoder: Callable[..., Decoder], kind: str) -> None:
    """For "mla" this is the absorbed form (one token a call) against the expanded one, to float64 precision."""
    decoder = tiny_decoder(kind)
    token_ids_RQ = torch.randint(61, (3, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected_RQD = decoder(token_ids_RQ.flatten(), causal_layout([12, 12, 12])).hidden.view(3, 12, -1)
        cache = decoder.new_cache(num_slots=3, capacity=12)
        for position in range(12):
            layout = cached_layout(range(3), [position] * 3, 1, cache)
            out = decoder.forward_cached(token_ids_RQ[:, position : position + 1], cache, layout).hidden
            torch.testing.assert_close(out[:, 0], expected_RQD[:, position], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("qkv_bias", (False, True))
def test_mla_formula(tiny_decoder: Callable[..., Decoder], qkv_bias: bool) -> None:
    """DeepSeek-V2, equations 9 to 19, one query and one head at a time, all ranks and dimensions unlike each other."""
    decoder = tiny_decoder("mla", qkv_bias=qkv_bias)
    attention = decoder.layers[0].self_attn
    assert isinstance(attention, MultiHeadLatentAttention)
    x_TD = torch.randn(6, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    rotation = decoder.rope(torch.arange(6), torch.float64)
    found_TD = attention(x_TD, rotation, causal_layout([6]))

    query_TX = attention.q_b_proj(attention.q_a_layernorm(attention.q_a_proj(x_TD)))
    down_TX = attention.kv_a_proj_with_mqa(x_TD)
    latent_TL = attention.kv_a_layernorm(down_TX[:, :8])
    key_position_TP = rotation.rotate(down_TX[:, None, 8:])[:, 0]
    outputs = []
    for head in range(4):
        query_TE = query_TX[:, head * 10 : (head + 1) * 10]
        query_position_TP = rotation.rotate(query_TE[:, None, 6:])[:, 0]
        up_XL = attention.kv_b_proj.weight[head * 11 : (head + 1) * 11]
        key_TN, value_TV = latent_TL @ up_XL[:6].T, latent_TL @ up_XL[6:].T
        scores_TT = (query_TE[:, :6] @ key_TN.T + query_position_TP @ key_position_TP.T) / 10**0.5
        outputs.append(causal_softmax(scores_TT) @ value_TV)
    expected_TD = attention.o_proj(torch.cat(outputs, dim=-1))
    torch.testing.assert_close(found_TD, expected_TD, rtol=1e-11, atol=1e-11)


def test_grouped_query_formula(tiny_decoder: Callable[..., Decoder]) -> None:
    decoder = tiny_decoder("gqa")
    attention = decoder.layers[0].self_attn
    assert isinstance(attention, GroupedQueryAttention)
    x_TD = torch.randn(6, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    rotation = decoder.rope(torch.arange(6), torch.float64)
    q_THE = rotation.rotate(attention.q_norm(attention.q_proj(x_TD).view(6, 4, 10)))
    k_TGE = rotation.rotate(attention.k_norm(attention.k_proj(x_TD).view(6, 2, 10)))
    v_TGE = attention.v_proj(x_TD).view(6, 2, 10)
    heads = [
        causal_softmax(q_THE[:, head] @ k_TGE[:, head // 2].T / 10**0.5) @ v_TGE[:, head // 2] for head in range(4)
    ]
    expected_TD = attention.o_proj(torch.cat(heads, dim=-1))
    torch.testing.assert_close(attention(x_TD, rotation, causal_layout([6])), expected_TD, rtol=1e-11, atol=1e-11)


def causal_softmax(scores_TT: Tensor) -> Tensor:
    rows = []
    for query, row in enumerate(scores_TT):
        weights = (row[: query + 1] - row[: query + 1].max()).exp()
        rows.append(torch.nn.functional.pad(weights / weights.sum(), (0, len(row) - query - 1)))
    return torch.stack(rows)


def test_mla_needs_its_config(tiny_decoder: Callable[..., Decoder]) -> None:
    with pytest.raises(ValueError, match="mla"):
        MultiHeadLatentAttention(tiny_decoder("gqa").config)


@pytest.mark.parametrize("lengths", ([5, 5, 5], [5, 3, 1]))
def test_one_query_against_cached_keys(lengths: list[int]) -> None:
    """Against the definition written out head by head. Values are wider than what is read of them."""
    generator = torch.Generator().manual_seed(0)
    slots, kv_heads, sharing, head_dim, value_dim = [3, 0, 2], 2, 3, 6, 4
    q_RHE = torch.randn(3, kv_heads * sharing, head_dim, generator=generator, dtype=torch.float64)
    k_SCGE, v_SCGE = torch.randn(2, 4, 7, kv_heads, head_dim, generator=generator, dtype=torch.float64)
    like = KVCache([(Column(1),)], 4, 7, like=q_RHE)
    layout = cached_layout(slots, [length - 1 for length in lengths], 1, like)
    found_RHV = attention.attend_once(q_RHE, k_SCGE, v_SCGE, value_dim, layout, 0.3)
    for row, (slot, length) in enumerate(zip(slots, lengths, strict=True)):
        for head in range(kv_heads * sharing):
            scores = 0.3 * k_SCGE[slot, :length, head // sharing] @ q_RHE[row, head]
            expected = scores.softmax(0) @ v_SCGE[slot, :length, head // sharing, :value_dim]
            torch.testing.assert_close(found_RHV[row, head], expected)


class AttentionCalls(TorchFunctionMode):
    """Notes how many key-value heads each call of torch's attention gets, and whether it is to share them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int, bool]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            assert args[1].shape[1] == args[2].shape[1]
            self.calls.append((args[1].shape[1], kwargs["enable_gqa"]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("device", "dtype", "masked", "expected"),
    (
        ("cpu", torch.float32, True, (2, True)),
        ("meta", torch.float32, True, (6, False)),
        ("meta", torch.float32, False, (6, False)),
        ("meta", torch.bfloat16, True, (6, False)),
        ("meta", torch.bfloat16, False, (2, True)),
    ),
)
def test_shared_keys_reach_no_kernel_that_holds_all_scores(
    device: str, dtype: torch.dtype, masked: bool, expected: tuple[int, bool]
) -> None:
    """Off the CPU only half precision without a mask has a kernel that shares keys and keeps no scores."""
    q_RHQE, k_RGKE, v_RGKV = (torch.zeros(3, heads, 5, 8, dtype=dtype, device=device) for heads in (6, 2, 2))
    mask_RQK = torch.ones(3, 5, 5, dtype=torch.bool, device=device) if masked else None
    with AttentionCalls() as noted:
        out_RHQV = attention.attend(q_RHQE, k_RGKE, v_RGKV, mask_RQK, 0.3, causal=not masked)
    assert out_RHQV.shape == (3, 6, 5, 8)
    assert noted.calls == [expected]


@pytest.mark.parametrize("packed", (True, False))
def test_both_calls_of_a_model_off_the_cpu_give_each_head_its_keys(
    tiny_decoder: Callable[..., Decoder], packed: bool
) -> None:
    decoder = tiny_decoder("gqa").float()
    block = decoder.layers[0].self_attn.to("meta")
    rotation = decoder.rope(torch.arange(6), torch.float32)
    rotation = Rotation(rotation.cos.to("meta"), rotation.sin.to("meta"), rotation.interleaved)
    x_TD = torch.zeros(6, 24, device="meta")
    with AttentionCalls() as noted:
        if packed:
            index_RQ = torch.arange(6, device="meta")[None]
            block(x_TD, rotation, PackedLayout(index_RQ[0], (AttentionBlock(index_RQ, index_RQ),)))
        else:
            columns = [torch.zeros(2, 3, 20, device="meta") for _ in range(2)]
            index_N = torch.arange(6, device="meta")
            layout = CachedLayout(slice(0, 2), index_N.view(2, 3), index_N, 3, masked=True, dtype=torch.float32)
            block.forward_cached(x_TD, rotation, columns, layout)
    assert noted.calls == [(4, False)]


def test_one_each_keeps_which_head_reads_which_keys() -> None:
    generator = torch.Generator().manual_seed(0)
    q_RHQE = torch.randn(2, 6, 5, 8, dtype=torch.float64, generator=generator)
    k_RGKE, v_RGKV = torch.randn(2, 2, 2, 5, 8, dtype=torch.float64, generator=generator)
    expected = F.scaled_dot_product_attention(q_RHQE, k_RGKE, v_RGKV, enable_gqa=True)
    found = F.scaled_dot_product_attention(q_RHQE, attention.one_each(k_RGKE, 6), attention.one_each(v_RGKV, 6))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
