"""Native Sparse Attention in Triton, forward and backward, for CUDA; in Triton's interpreter on a CPU.

Three branches (`nsa_span.py` for compression and window, `nsa_selected.py`), the choice of blocks between
them (`nsa_choice.py`), and the gated sum. Memory grows with queries times (heads + selected blocks); what the
backward needs of a softmax is made again from the logarithm of its sum. No sum depends on the order in which programs
run: a repetition gives the same bits.

The gate scales the weights of its branch, and the gradient of a gate, `dg = dO . out`, is the mean by which a softmax's
gradient is lessened: `dS = g p (dO . v - dg)`. So neither gated outputs nor gated gradients are ever written.

Shapes: as in `nsa.py`; M lines of a tile (`nsa_tiles.py`).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from rorqual.ops.gpu import nsa_choice, nsa_selected, nsa_selected_backward, nsa_span, nsa_span_backward
from rorqual.ops.gpu.nsa_selected import Tiles
from rorqual.ops.gpu.nsa_span import Span
from rorqual.ops.gpu.nsa_tiles import NUM_BRANCHES, Upstream, padded, put_vectors, vectors
from rorqual.ops.gpu.numbers import INTERPRETED
from rorqual.ops.nsa import BlockSizes, Branches

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

MIXED_NUMBERS = 4096
"""Numbers of a program that sums branches, which reads each once."""


def native_sparse_attention(
    q_RQHE: Tensor, branches: Branches, gates_RQH3: Tensor, position_RQ: Tensor, sizes: BlockSizes, scale: float
) -> Tensor:
    """`nsa.native_sparse_attention`: [R, Q, H, E].

    Raises: ValueError for a dtype that no kernel is for, for queries, keys and values of unlike dtypes, and on a CPU
    without Triton's interpreter.
    """
    dtypes = {x.dtype for x in (q_RQHE, *branches)}
    if len(dtypes) > 1 or q_RQHE.dtype not in DTYPES:
        raise ValueError(
            f"The Triton kernels got {', '.join(sorted(map(str, dtypes)))}; they take queries, keys and values all in "
            "float32, bfloat16 or float16. Cast them, or use kernels = 'tiled'."
        )
    if q_RQHE.device.type == "cpu" and not INTERPRETED.value:
        raise ValueError(
            "The Triton kernels got tensors on a CPU, where they run in Triton's interpreter alone; set "
            "TRITON_INTERPRET=1 before the start, to test them, or use kernels = 'auto'."
        )
    start_R = position_RQ[:, 0].int().contiguous()
    out: Tensor = _NativeSparseAttention.apply(q_RQHE, *branches, gates_RQH3, start_R, sizes, scale)
    return out


class _NativeSparseAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_RQHE: Tensor, *rest: Any) -> Tensor:
        *tensors, start_R, sizes, scale = rest
        q_RQHE, *branches, gates_RQH3 = (x.contiguous() for x in (q_RQHE, *tensors))
        compressed_kv, selected_kv, window_kv = zip(branches[::2], branches[1::2], strict=True)
        num_keys, groups = selected_kv[0].shape[1:3]
        num_blocks, of_blocks, of_tokens = triton.cdiv(num_keys, sizes.selected_length), *spans(sizes)
        with torch.cuda.device_of(q_RQHE):
            compressed = nsa_span.forward(q_RQHE, compressed_kv, start_R, of_blocks, scale)
            blocks_RQGS = nsa_choice.choose_blocks(
                q_RQHE, compressed_kv[0], start_R, compressed[1], num_keys, sizes, scale
            )
            queries = nsa_selected.tile_queries(q_RQHE, groups)
            tiles = nsa_selected.tiles_of(blocks_RQGS, num_blocks, queries)
            selected = nsa_selected.forward(q_RQHE, selected_kv, start_R, tiles, sizes.selected_length, scale)
            window = nsa_span.forward(q_RQHE, window_kv, start_R, of_tokens, scale)
            out_RQHE = gated_sum(compressed[0], selected[0], window[0], gates_RQH3)
        ctx.sizes, ctx.scale = sizes, scale
        saved = (q_RQHE, *branches, gates_RQH3, start_R, blocks_RQGS, *tiles, *compressed, *selected, *window)
        ctx.save_for_backward(*saved)
        return out_RQHE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out_RQHE: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        q_RQHE, *branches, gates_RQH3, start_R, blocks_RQGS = saved[:10]
        tiles = Tiles(*saved[10:13])
        compressed, of_compressed, selected, of_selected, window, of_window = saved[13:]
        compressed_kv, selected_kv, window_kv = zip(branches[::2], branches[1::2], strict=True)
        sizes, scale, (of_blocks, of_tokens) = ctx.sizes, ctx.scale, spans(ctx.sizes)
        with torch.cuda.device_of(q_RQHE):
            grad_out_RQHE = grad_out_RQHE.to(q_RQHE.dtype).contiguous()
            grad_gates_RQH3 = gate_gradients(grad_out_RQHE, compressed, selected, window)
            upstream = Upstream(grad_out_RQHE, gates_RQH3, grad_gates_RQH3)
            grad_q_RQHE, *grad_selected = nsa_selected_backward.backward(
                q_RQHE, selected_kv, start_R, blocks_RQGS, tiles, of_selected, upstream, sizes.selected_length, scale
            )
            grad_window = nsa_span_backward.backward(
                q_RQHE, window_kv, start_R, of_window, upstream, grad_q_RQHE, of_tokens, scale, 2
            )
            grad_compressed = nsa_span_backward.backward(
                q_RQHE, compressed_kv, start_R, of_compressed, upstream, grad_q_RQHE, of_blocks, scale, 0
            )
        grads = (grad_q_RQHE.to(q_RQHE.dtype), *grad_compressed, *grad_selected, *grad_window)
        return *grads, grad_gates_RQH3.to(gates_RQH3.dtype), None, None, None


def spans(sizes: BlockSizes) -> tuple[Span, Span]:
    """What queries see of compressed blocks, and of tokens in their window."""
    return Span(sizes.length, sizes.stride, 0), Span(1, 1, sizes.window)


@triton.jit  # type: ignore[untyped-decorator]
def _gated_sum(
    compressed: tl.tensor,
    selected: tl.tensor,
    window: tl.tensor,
    gates: tl.tensor,
    out: tl.tensor,
    num_lines: tl.tensor,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    LINES: tl.constexpr,
) -> None:
    at = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
    there = at < num_lines
    gate = gates + at * NUM_BRANCHES
    total = tl.load(gate, mask=there, other=0.0).to(tl.float32)[:, None] * vectors(
        compressed, at, there, WIDTH, PADDED, True
    ).to(tl.float32)
    total += tl.load(gate + 1, mask=there, other=0.0).to(tl.float32)[:, None] * vectors(
        selected, at, there, WIDTH, PADDED, True
    ).to(tl.float32)
    total += tl.load(gate + 2, mask=there, other=0.0).to(tl.float32)[:, None] * vectors(
        window, at, there, WIDTH, PADDED, True
    ).to(tl.float32)
    put_vectors(out, at, there, total, WIDTH, PADDED)


@triton.jit  # type: ignore[untyped-decorator]
def _gate_gradients(
    grad_out: tl.tensor,
    compressed: tl.tensor,
    selected: tl.tensor,
    window: tl.tensor,
    grad_gates: tl.tensor,
    num_lines: tl.tensor,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    LINES: tl.constexpr,
) -> None:
    at = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
    there = at < num_lines
    grad = vectors(grad_out, at, there, WIDTH, PADDED, True).to(tl.float32)
    to = grad_gates + at * NUM_BRANCHES
    of_compressed = grad * vectors(compressed, at, there, WIDTH, PADDED, True).to(tl.float32)
    of_selected = grad * vectors(selected, at, there, WIDTH, PADDED, True).to(tl.float32)
    of_window = grad * vectors(window, at, there, WIDTH, PADDED, True).to(tl.float32)
    tl.store(to, tl.sum(of_compressed, axis=1), mask=there)
    tl.store(to + 1, tl.sum(of_selected, axis=1), mask=there)
    tl.store(to + 2, tl.sum(of_window, axis=1), mask=there)


def gated_sum(compressed_RQHE: Tensor, selected_RQHE: Tensor, window_RQHE: Tensor, gates_RQH3: Tensor) -> Tensor:
    """[R, Q, H, E], summed in float32."""
    out_RQHE = torch.empty_like(compressed_RQHE)
    _by_lines(_gated_sum, compressed_RQHE, selected_RQHE, window_RQHE, gates_RQH3, out_RQHE)
    return out_RQHE


def gate_gradients(
    grad_out_RQHE: Tensor, compressed_RQHE: Tensor, selected_RQHE: Tensor, window_RQHE: Tensor
) -> Tensor:
    """`dO . out` of each branch: float32 [R, Q, H, 3]."""
    grad_RQH3 = grad_out_RQHE.new_empty(*grad_out_RQHE.shape[:3], 3, dtype=torch.float32)
    _by_lines(_gate_gradients, grad_out_RQHE, compressed_RQHE, selected_RQHE, window_RQHE, grad_RQH3)
    return grad_RQH3


def _by_lines(kernel: Any, x_RQHE: Tensor, *rest: Tensor) -> None:
    """Runs a kernel over all lines, in the order in which they lie in memory."""
    width = x_RQHE.shape[-1]
    num_lines, lines = x_RQHE.numel() // width, max(1, MIXED_NUMBERS // padded(width))
    kernel[(triton.cdiv(num_lines, lines),)](x_RQHE, *rest, num_lines, WIDTH=width, PADDED=padded(width), LINES=lines)
