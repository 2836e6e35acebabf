"""Attention over selected keys in Triton, forward: the kernel, and how large its blocks are.

A program owns one query and a block of the heads of one key-value group. Its queries stay where they are; the selected
keys come by in blocks, gathered by their indices, and a running softmax (maximum, sum, weighted values, all float32)
takes them in. All heads of a query share its selection, so that a gathered key is used by a whole block of heads: with
the 64 to 128 heads of DeepSeek's latent attention a product is as large as tensor cores like it.

A head dimension is cut into the largest power of two and a padded rest: 576 is 512 + 64, 192 is 128 + 64.

Shapes: as in `dsa.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rorqual.ops.gpu.numbers import product, rounded

LOG2_E = 1.4426950408889634

DEFAULT_SHARED_BYTES = 227 << 10
"""Of an H100; where there is no CUDA device, the interpreter cuts the blocks as if it were one."""

LEAST = 16
"""Least size of a side of `tl.dot`."""

COUNTED = tl.constexpr(1024)
"""Selected keys that are looked at at once when a query's are counted."""


class Cut(NamedTuple):
    """A dimension as kernels hold it: a power of two, and a padded rest, 0 where there is none."""

    main: int
    rest: int


def cut(width: int) -> Cut:
    main = max(LEAST, 1 << (width.bit_length() - 1))
    return Cut(main, max(LEAST, triton.next_power_of_2(width - main)) if width > main else 0)


def padded(width: int) -> int:
    """The next power of two that `tl.dot` takes."""
    return max(LEAST, int(triton.next_power_of_2(width)))


class Blocks(NamedTuple):
    """Heads and keys of a step, and how a program runs: its warps, and how many steps' keys are on their way."""

    heads: int
    keys: int
    stages: int
    warps: int


class Sizes(NamedTuple):
    """What the choice of blocks depends on: heads that share keys, E, V, bytes of a number, whether values are keys."""

    sharing: int
    width: int
    value_width: int
    itemsize: int
    values_are_keys: bool


def sizes_of(q_RQHE: Tensor, k_RKGE: Tensor, v_RKGV: Tensor) -> Sizes:
    """Values are keys where they are the first numbers of the same keys in memory, as in latent attention, and fill the
    main part of the cut: they are then loaded once."""
    same_place = v_RKGV.data_ptr() == k_RKGE.data_ptr() and v_RKGV.stride() == k_RKGE.stride()
    width, value_width = k_RKGE.shape[-1], v_RKGV.shape[-1]
    sharing = q_RQHE.shape[2] // k_RKGE.shape[2]
    return Sizes(sharing, width, value_width, q_RQHE.element_size(), same_place and value_width == cut(width).main)


def shared_bytes(device: torch.device) -> int:
    """Shared memory that a program may have."""
    if device.type != "cuda":
        return DEFAULT_SHARED_BYTES
    index = torch.cuda.current_device() if device.index is None else device.index
    return int(triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"])


def choose_blocks(sizes: Sizes, shared: int) -> Blocks:
    """The largest blocks that fit into `shared` bytes: as many heads as share keys, up to 64, since each block of heads
    gathers the keys anew; then steps under way; then keys. It depends on sizes and the device alone, so that a run and
    its repetition cut alike.

    float32 is multiplied outside tensor cores, from registers, and takes the smallest. Values that are keys need two
    steps under way: with one the compiler copies them in a second layout.
    Raises: ValueError where not even the smallest fit.
    """
    half = sizes.itemsize == 2
    most_heads = min(64, padded(sizes.sharing)) if half else LEAST
    choices = ((64, 2), (32, 2), (64, 1), (32, 1)) if half else ((16, 2), (16, 1))
    per_key = sum(cut(sizes.width)) + (0 if sizes.values_are_keys else padded(sizes.value_width))
    warps = 8 if not half or most_heads * padded(sizes.value_width) >= 64 * 256 else 4
    for heads in (size for size in (64, 32, 16) if size <= most_heads):
        for keys, stages in choices[:2] if sizes.values_are_keys and half else choices:
            numbers = heads * sum(cut(sizes.width)) + stages * keys * per_key + 2 * heads * keys
            if sizes.itemsize * numbers <= shared:
                return Blocks(heads, keys, stages, warps)
    raise ValueError(
        f"Heads of {sizes.width} and values of {sizes.value_width} numbers of {sizes.itemsize} bytes do not fit into "
        f"the {shared} bytes of shared memory of this device; use half precision, or kernels = 'tiled'."
    )


@triton.jit  # type: ignore[untyped-decorator]
def last_selected(selected: tl.tensor, num_selected: tl.tensor) -> tl.tensor:
    """One more than the place of the last key that is present, so that queries with few keys end early."""
    end = 0
    for start in range(0, num_selected, COUNTED):
        place = start + tl.arange(0, COUNTED)
        key = tl.load(selected + place, mask=place < num_selected, other=-1)
        end = tl.maximum(end, tl.max(tl.where(key >= 0, place + 1, 0), axis=0))
    return end


@triton.jit(do_not_specialize=["num_queries"])  # type: ignore[untyped-decorator]
def _forward(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    selected: tl.tensor,
    out: tl.tensor,
    log_sum: tl.tensor,
    scale_log2: tl.tensor,
    num_queries: tl.tensor,
    num_selected: tl.tensor,
    num_groups: tl.tensor,
    q_row: tl.tensor,
    q_query: tl.tensor,
    q_head: tl.tensor,
    k_row: tl.tensor,
    k_key: tl.tensor,
    k_group: tl.tensor,
    v_row: tl.tensor,
    v_key: tl.tensor,
    v_group: tl.tensor,
    SHARING: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    VALUES: tl.constexpr,
    VALUES_ARE_KEYS: tl.constexpr,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
) -> None:
    """Writes the attention [R, Q, H, V] and the logarithm of the sum of its softmax, base 2, [R, Q, H]."""
    head_blocks: tl.constexpr = (SHARING + HEADS - 1) // HEADS
    program = tl.program_id(0).to(tl.int64)
    group = program // head_blocks % num_groups
    at = program // (head_blocks * num_groups)
    row = at // num_queries
    head = program % head_blocks * HEADS + tl.arange(0, HEADS)
    is_head = (head < SHARING)[:, None]
    head = group * SHARING + head
    main, rest, value = tl.arange(0, MAIN), MAIN + tl.arange(0, REST if REST else 1), tl.arange(0, VALUES)
    is_main, is_rest, is_value = (main < WIDTH)[None], (rest < WIDTH)[None], (value < VALUE_WIDTH)[None]

    q += row * q_row + at % num_queries * q_query + head[:, None] * q_head
    q_main = tl.load(q + main[None], mask=is_head & is_main, other=0.0)
    if REST:
        q_rest = tl.load(q + rest[None], mask=is_head & is_rest, other=0.0)
    k += row * k_row + group * k_group
    v += row * v_row + group * v_group
    selected += at * num_selected

    highest = tl.full([HEADS], -float("inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    weighted = tl.zeros([HEADS, VALUES], tl.float32)
    end = last_selected(selected, num_selected)
    for start in range(0, end, KEYS):
        place = start + tl.arange(0, KEYS)
        key = tl.load(selected + place, mask=place < end, other=-1).to(tl.int64)
        is_key = (key >= 0)[:, None]
        k_main = tl.load(k + key[:, None] * k_key + main[None], mask=is_key & is_main, other=0.0)
        scores = product(q_main, tl.trans(k_main), tl.zeros([HEADS, KEYS], tl.float32))
        if REST:
            k_rest = tl.load(k + key[:, None] * k_key + rest[None], mask=is_key & is_rest, other=0.0)
            scores = product(q_rest, tl.trans(k_rest), scores)
        scores = tl.where((key >= 0)[None], scores * scale_log2, -float("inf"))
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        base = tl.where(higher == -float("inf"), 0.0, higher)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(highest - base)
        total = total * shrink + tl.sum(weights, axis=1)
        if VALUES_ARE_KEYS:
            values = k_main
        else:
            values = tl.load(v + key[:, None] * v_key + value[None], mask=is_key & is_value, other=0.0)
        weighted = product(rounded(weights, v.dtype.element_ty), values, weighted * shrink[:, None])
        highest = higher

    safe = tl.where(total == 0.0, 1.0, total)
    place = (at * num_groups * SHARING + head)[:, None]
    answer = rounded(weighted / safe[:, None], out.dtype.element_ty)
    tl.store(out + place * VALUE_WIDTH + value[None], answer, mask=is_head & is_value)
    log = tl.where(total == 0.0, 0.0, highest + tl.log2(safe))
    tl.store(log_sum + place, log[:, None], mask=is_head)


def forward(
    q_RQHE: Tensor, k_RKGE: Tensor, v_RKGV: Tensor, selected_RQS: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention [R, Q, H, V] and log2 of the softmax's sum [R, Q, H], float32, 0 for a query that has no key.

    The last dimension of every tensor is contiguous, and `selected_RQS` is as a whole.
    """
    (num_rows, num_queries, num_heads, width), groups = q_RQHE.shape, k_RKGE.shape[2]
    value_width, num_selected = v_RKGV.shape[-1], selected_RQS.shape[-1]
    out_RQHV = q_RQHE.new_empty(num_rows, num_queries, num_heads, value_width)
    log_sum_RQH = q_RQHE.new_empty(num_rows, num_queries, num_heads, dtype=torch.float32)
    sizes = sizes_of(q_RQHE, k_RKGE, v_RKGV)
    blocks = choose_blocks(sizes, shared_bytes(q_RQHE.device))
    _forward[(num_rows * num_queries * groups * triton.cdiv(sizes.sharing, blocks.heads),)](
        q_RQHE,
        k_RKGE,
        v_RKGV,
        selected_RQS,
        out_RQHV,
        log_sum_RQH,
        scale * LOG2_E,
        num_queries,
        num_selected,
        groups,
        *q_RQHE.stride()[:3],
        *k_RKGE.stride()[:3],
        *v_RKGV.stride()[:3],
        SHARING=sizes.sharing,
        WIDTH=width,
        VALUE_WIDTH=value_width,
        MAIN=cut(width).main,
        REST=cut(width).rest,
        VALUES=padded(value_width),
        VALUES_ARE_KEYS=sizes.values_are_keys,
        HEADS=blocks.heads,
        KEYS=blocks.keys,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    return out_RQHV, log_sum_RQH
