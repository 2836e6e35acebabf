"""What the Triton kernels of native sparse attention share: loads of vectors, a step of the running softmax, its
derivative, and how large their tiles are.

The queries of a row and the heads that share keys are laid flat for a kernel: a *line* is one query of one head, and
consecutive lines are the heads of a group, query by query. Every group size fills a tile. All sums are float32.

Shapes: as in `nsa.py`; M lines of a tile, N keys of a tile.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rorqual.ops.gpu.numbers import product, rounded

LOG2_E = 1.4426950408889634

NUM_BRANCHES = tl.constexpr(3)

DEFAULT_SHARED_BYTES = 227 << 10
"""Of an H100; where there is no CUDA device, the interpreter cuts the tiles as if it were one."""


class Tile(NamedTuple):
    """Lines and keys of a step, and how a program runs: its warps, and how many steps' loads are on their way.

    Tiles depend on sizes and the device alone, never on a measurement, so that a run and its repetition cut alike.
    """

    lines: int
    keys: int
    warps: int
    stages: int


class Plan(NamedTuple):
    """Tiles of one operation's kernels: of queries that pass over keys, forward and backward, and of keys that pass
    over queries."""

    forward: Tile
    query_backward: Tile
    key_backward: Tile


class Upstream(NamedTuple):
    """Of the gated sum: its gradient [R, Q, H, E], the gates, and their gradients in float32 [R, Q, H, 3]."""

    grad_out: Tensor
    gates: Tensor
    grad_gates: Tensor


def plan(x: Tensor) -> Plan:
    """For vectors of the last dimension of `x`."""
    width, roomy = padded(x.shape[-1]), shared_bytes(x.device) >= 160 << 10
    if x.element_size() == 4:  # Products without matrix units, from registers.
        small = Tile(32, 32, 4, 1) if width <= 64 else Tile(16, 32, 4, 1) if width <= 128 else Tile(16, 16, 4, 1)
        return Plan(small, small, small)
    if width > 128:
        return Plan(Tile(64, 32, 4, 2), Tile(64, 32, 8, 1), Tile(32, 32, 8, 1))
    stages = 3 if roomy else 2
    if not roomy:
        return Plan(Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(32, 64, 4, 2))
    return Plan(Tile(128, 64, 8, stages), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2))


def padded(size: int) -> int:
    """The next power of two that `tl.dot` takes."""
    return max(16, int(triton.next_power_of_2(size)))


def shared_bytes(device: torch.device) -> int:
    """Shared memory that a program may have."""
    if device.type != "cuda":
        return DEFAULT_SHARED_BYTES
    index = torch.cuda.current_device() if device.index is None else device.index
    return int(triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"])


@triton.jit  # type: ignore[untyped-decorator]
def vectors(
    base: tl.tensor, at: tl.tensor, there: tl.tensor, WIDTH: tl.constexpr, PADDED: tl.constexpr, CHECKED: tl.constexpr
) -> tl.tensor:
    """Vectors number `at` [M] of an array [..., WIDTH]: [M, PADDED]; zeros where not `there`, if that is CHECKED."""
    dim = tl.arange(0, PADDED)
    where = base + at.to(tl.int64)[:, None] * WIDTH + dim[None]
    if CHECKED and PADDED == WIDTH:
        x = tl.load(where, mask=there[:, None], other=0.0)
    elif CHECKED:
        x = tl.load(where, mask=there[:, None] & (dim < WIDTH)[None], other=0.0)
    elif PADDED == WIDTH:
        x = tl.load(where)
    else:
        x = tl.load(where, mask=(dim < WIDTH)[None], other=0.0)
    return x


@triton.jit  # type: ignore[untyped-decorator]
def put_vectors(
    base: tl.tensor, at: tl.tensor, there: tl.tensor, x: tl.tensor, WIDTH: tl.constexpr, PADDED: tl.constexpr
) -> None:
    """Writes `x` [M, PADDED] where `vectors` would read it."""
    dim = tl.arange(0, PADDED)
    where = base + at.to(tl.int64)[:, None] * WIDTH + dim[None]
    tl.store(where, rounded(x, base.dtype.element_ty), mask=there[:, None] & (dim < WIDTH)[None])


@triton.jit  # type: ignore[untyped-decorator]
def take_in(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    seen: tl.tensor,
    highest: tl.tensor,
    total: tl.tensor,
    weighted: tl.tensor,
    scale_log2: tl.tensor,
    CHECKED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """A tile of keys into the running softmax of each line: highest score (base 2), sum, weighted values."""
    scores = product(q, tl.trans(k), tl.zeros([q.shape[0], k.shape[0]], tl.float32)) * scale_log2
    if CHECKED:
        scores = tl.where(seen, scores, -float("inf"))
    higher = tl.maximum(highest, tl.max(scores, axis=1))
    base = tl.where(higher == -float("inf"), 0.0, higher) if CHECKED else higher
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(highest - base)
    weighted = product(rounded(weights, v.dtype), v, weighted * shrink[:, None])
    return higher, total * shrink + tl.sum(weights, axis=1), weighted


@triton.jit  # type: ignore[untyped-decorator]
def put_attention(
    out: tl.tensor,
    log_sum: tl.tensor,
    at: tl.tensor,
    there: tl.tensor,
    highest: tl.tensor,
    total: tl.tensor,
    weighted: tl.tensor,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
) -> None:
    """Writes what the running softmax has come to, and log2 of its sum. Of a line that saw nothing these are 0 and
    infinity: the weights that are made from it again are 0."""
    nothing = total == 0.0
    safe = tl.where(nothing, 1.0, total)
    put_vectors(out, at, there, weighted / safe[:, None], WIDTH, PADDED)
    tl.store(log_sum + at, tl.where(nothing, float("inf"), highest + tl.log2(safe)), mask=there)


@triton.jit  # type: ignore[untyped-decorator]
def line_scalars(
    log_sum: tl.tensor, gates: tl.tensor, grad_gates: tl.tensor, at: tl.tensor, there: tl.tensor, BRANCH: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """log2 of the softmax's sum, gate, and the gate's gradient, which is also the mean of the weights' gradients."""
    log = tl.load(log_sum + at, mask=there, other=float("inf"))
    gate = tl.load(gates + at * NUM_BRANCHES + BRANCH, mask=there, other=0.0).to(tl.float32)
    return log, gate, tl.load(grad_gates + at * NUM_BRANCHES + BRANCH, mask=there, other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def query_gradient(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    seen: tl.tensor,
    grad_out: tl.tensor,
    log: tl.tensor,
    gate: tl.tensor,
    mean: tl.tensor,
    grad_q: tl.tensor,
    scale_log2: tl.tensor,
    CHECKED: tl.constexpr,
) -> tl.tensor:
    """`grad_q` and what a tile of keys adds to it, but for the scale: `dq = sum of p g (dO.v - mean) k`."""
    nothing = tl.zeros([q.shape[0], k.shape[0]], tl.float32)
    weights = tl.exp2(product(q, tl.trans(k), nothing) * scale_log2 - log[:, None])
    if CHECKED:
        weights = tl.where(seen, weights, 0.0)
    grad = weights * (product(grad_out, tl.trans(v), nothing) - mean[:, None]) * gate[:, None]
    return product(rounded(grad, k.dtype), k, grad_q)


@triton.jit  # type: ignore[untyped-decorator]
def key_gradients(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    seen: tl.tensor,
    grad_out: tl.tensor,
    log: tl.tensor,
    gate: tl.tensor,
    mean: tl.tensor,
    grad_k: tl.tensor,
    grad_v: tl.tensor,
    scale_log2: tl.tensor,
    CHECKED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The gradients of a tile of keys and values, and what a tile of lines adds to them; `seen` is [N, M]."""
    nothing = tl.zeros([k.shape[0], q.shape[0]], tl.float32)
    weights = tl.exp2(product(k, tl.trans(q), nothing) * scale_log2 - log[None])
    if CHECKED:
        weights = tl.where(seen, weights, 0.0)
    weights *= gate[None]
    grad_v = product(rounded(weights, q.dtype), grad_out, grad_v)
    grad = weights * (product(v, tl.trans(grad_out), nothing) - mean[None])
    return product(rounded(grad, q.dtype), q, grad_k), grad_v
