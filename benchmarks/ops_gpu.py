"""Sparse attention on a GPU: DSA's parts and NSA in Triton, beside dense attention and other libraries' kernels.

One layer, one causal sequence, bfloat16. Attention over a selection is timed with three kinds of selections, because
caches serve them very differently: random keys of the past, a window with sinks, and one recorded from a model. Every
operation takes its turn several times, makes its inputs anew, and has the L2 cache overwritten before each measurement;
CUDA events time it and the median counts. TFLOP/s count the pairs of query and key that are attended to, whatever a
kernel computes beside: forward 2 H (E + V) a pair, backward 2 H (3E + 2V), which recomputes the scores.

`--device cpu --tokens 64` runs everything once, tiny, in Triton's interpreter, to see that it runs; its times mean
nothing. Needs `pip install rorqual[bench,gpu]`; fla's NSA is timed where flash-linear-attention is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version

if {"cpu", "--device=cpu"} & set(sys.argv):
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when a kernel is defined.

import torch
import torch.nn.functional as F
from common import SEED, markdown_table, parser
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from rorqual.ops import dispatch, dsa, dsa_tiled, nsa
from rorqual.ops.gpu import dsa as dsa_gpu

PARTS = ("attention", "decode", "select", "kl", "nsa")
FLUSHED_BYTES = 256 << 20
"""Several times the L2 cache of any GPU."""

DENSE = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}


@dataclass(frozen=True)
class Shape:
    """Heads of sparse attention, and of the dense attention of the same model."""

    name: str
    heads: int
    groups: int
    width: int
    value_width: int
    dense: tuple[int, int, int]
    """Key-value heads, and widths of keys and values, of dense attention."""


SHAPES = (
    Shape("MQA 128 x 576/512", 128, 1, 576, 512, (128, 192, 128)),
    Shape("MQA 64 x 576/512", 64, 1, 576, 512, (64, 192, 128)),
    Shape("GQA 64/4 x 128", 64, 4, 128, 128, (4, 128, 128)),
)
TINY_SHAPES = (Shape("MQA 2 x 48/32", 2, 1, 48, 32, (2, 32, 16)), Shape("GQA 4/2 x 16", 4, 2, 16, 16, (2, 16, 16)))


@dataclass
class Operation:
    """Something to time: `build` makes inputs, and from them what computes the output."""

    name: str
    tokens: int
    build: Callable[[], tuple[list[Tensor], Callable[[], Tensor]]]
    flops: float | None = None
    flops_backward: float | None = None
    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    reason: str = ""

    def cells(self) -> list[str]:
        cells = [self.name, f"{self.tokens:,}"]
        if self.reason:
            return [*cells, self.reason, "", "", "", ""]
        for seconds, flops in ((self.forward, self.flops), (self.backward, self.flops_backward)):
            median = statistics.median(seconds) if seconds else 0.0
            cells.append(f"{1e3 * median:.3f}" if seconds else "")
            cells.append(f"{flops / median / 1e12:.1f}" if seconds and flops else "")
        return [*cells, f"{self.peak_bytes / 2**30:.2f}"]


class Clock:
    """Times work on a device, after overwriting its L2 cache."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.flushed = torch.empty(FLUSHED_BYTES if self.cuda else 0, dtype=torch.int8, device=device)

    def seconds(self, work: Callable[[], object]) -> float:
        if not self.cuda:
            started = time.perf_counter()
            work()
            return time.perf_counter() - started
        self.flushed.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def take_turn(operation: Operation, clock: Clock, rounds: int, warm_up: int) -> None:
    """Adds one turn's measurements. What cannot run says why, and keeps the others running."""
    try:
        inputs, work = operation.build()
        rest = torch.cuda.memory_allocated() if clock.cuda else 0
        if clock.cuda:
            torch.cuda.reset_peak_memory_stats()
        with torch.no_grad():
            times = [clock.seconds(work) for _ in range(warm_up + rounds)]
        operation.forward += times[warm_up:]
        if inputs:
            out = work()
            direction = torch.randn_like(out)
            times = [
                clock.seconds(lambda: torch.autograd.grad(out, inputs, direction, retain_graph=True))
                for _ in range(warm_up + rounds)
            ]
            operation.backward += times[warm_up:]
        if clock.cuda:
            operation.peak_bytes = torch.cuda.max_memory_allocated() - rest
    except (ValueError, RuntimeError) as error:  # A missing form; a back-end that refuses, or too little memory.
        operation.reason = str(error).partition(". ")[0]


# ---------------------------------------------------------------------------------------------------------- selections


def random_keys(num_tokens: int, top_k: int, device: torch.device) -> Tensor:
    """Of each of `top_k` equal stretches of a query's past one key: int32 [1, T, top_k], distinct and ascending."""
    generator = torch.Generator(device).manual_seed(SEED)
    place = torch.arange(top_k, device=device)
    selected = torch.empty(1, num_tokens, top_k, dtype=torch.int32, device=device)
    for start in range(0, num_tokens, 4096):
        count = torch.arange(start, min(start + 4096, num_tokens), device=device)[:, None] + 1
        begin, end = place * count // top_k, (place + 1) * count // top_k
        draw = torch.rand(end.shape, generator=generator, device=device, dtype=torch.float64)
        keys = begin + (draw * (end - begin)).long()
        selected[0, start : start + len(count)] = torch.where(
            count > top_k, keys, torch.where(place < count, place, -1)
        )
    return selected


def local_keys(num_tokens: int, top_k: int, device: torch.device) -> Tensor:
    """The first 64 keys, or an eighth of all that are selected, and the latest: int32 [1, T, top_k]."""
    sinks = min(64, top_k // 8)
    place, query = torch.arange(top_k, device=device), torch.arange(num_tokens, device=device)[:, None]
    start = (query - top_k + 1).clamp(min=0)
    keys = torch.where(place < sinks, place, start + place)
    return keys.masked_fill(keys > query, -1).int()[None]


def recorded_keys(path: str, num_tokens: int, device: torch.device) -> Tensor:
    """`selected` [T, S] of a safetensors file, -1 where there is none, of its first tokens.

    Raises: ValueError for a file of fewer tokens.
    """
    selected = load_file(path)["selected"]
    if len(selected) < num_tokens:
        raise ValueError(f"{path} records {len(selected)} tokens; {num_tokens} are timed. Give fewer --tokens.")
    return selected[None, :num_tokens].int().to(device)


def selections(num_tokens: int, chosen: argparse.Namespace) -> dict[str, Tensor]:
    top_k = min(chosen.top_k, num_tokens)
    kinds = {
        "random": random_keys(num_tokens, top_k, chosen.device),
        "local + sink": local_keys(num_tokens, top_k, chosen.device),
    }
    if chosen.recorded:
        kinds["recorded"] = recorded_keys(chosen.recorded, num_tokens, chosen.device)
    return kinds


# ---------------------------------------------------------------------------------------------------------- operations


def random(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(*shape, device=device, dtype=torch.bfloat16).requires_grad_()


def attention(num_tokens: int, chosen: argparse.Namespace) -> Iterator[Operation]:
    """Sparse attention of every shape over every selection, and the dense attention of the same model."""
    kinds = selections(num_tokens, chosen)
    for shape in chosen.shapes:
        for kind, selected in kinds.items():
            pairs, both = int((selected >= 0).sum()), 2 * shape.heads * (shape.width + shape.value_width)
            backward = 2 * shape.heads * (3 * shape.width + 2 * shape.value_width)
            build = sparse_builder(shape, selected, 1, num_tokens, chosen)
            yield Operation(f"{shape.name}, {kind}", num_tokens, build, pairs * both, pairs * backward)
        groups, width, value_width = shape.dense
        pairs = num_tokens * (num_tokens + 1) // 2
        flops = 2.0 * pairs * shape.heads * (width + value_width)
        backward = 2.0 * pairs * shape.heads * (3 * width + 2 * value_width)
        for name in DENSE:
            build = dense_builder(shape, name, num_tokens, chosen.device)
            label = f"dense {name}, {shape.heads}/{groups} x {width}/{value_width}"
            yield Operation(label, num_tokens, build, flops, backward)


def sparse_builder(
    shape: Shape, selected: Tensor, rows: int, num_keys: int, chosen: argparse.Namespace
) -> Callable[[], tuple[list[Tensor], Callable[[], Tensor]]]:
    def build() -> tuple[list[Tensor], Callable[[], Tensor]]:
        q = random(chosen.device, rows, selected.shape[1], shape.heads, shape.width)
        k = random(chosen.device, rows, num_keys, shape.groups, shape.width)
        inputs, v = [q, k], k[..., : shape.value_width]
        if not chosen.values_in_keys:
            inputs.append(v := random(chosen.device, *v.shape))
        return inputs, lambda: dsa_gpu.sparse_attention(q, k, v, selected, shape.width**-0.5)

    return build


def dense_builder(
    shape: Shape, name: str, num_tokens: int, device: torch.device
) -> Callable[[], tuple[list[Tensor], Callable[[], Tensor]]]:
    """FlashAttention takes one width: values are padded to that of the keys, as is done where it trains such models."""
    groups, width, value_width = shape.dense

    def build() -> tuple[list[Tensor], Callable[[], Tensor]]:
        q, k = random(device, 1, shape.heads, num_tokens, width), random(device, 1, groups, num_tokens, width)
        v = random(device, 1, groups, num_tokens, width if name == "flash" else value_width)

        def work() -> Tensor:
            with sdpa_kernel(DENSE[name]):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=groups < shape.heads)

        return [q, k, v], work

    return build


def decode(num_tokens: int, chosen: argparse.Namespace) -> Iterator[Operation]:
    """The last query of 1, 16 and 64 sequences."""
    last = random_keys(num_tokens, min(chosen.top_k, num_tokens), chosen.device)[:, -1:]
    for shape in chosen.shapes:
        for rows in chosen.decode_rows:
            inner = sparse_builder(shape, last.expand(rows, -1, -1), rows, num_tokens, chosen)
            name = f"{shape.name}, {rows} x 1 query"
            yield Operation(name, num_tokens, lambda inner=inner: ([], inner()[1]))


def indexer(num_tokens: int, chosen: argparse.Namespace) -> dsa.IndexerOutput:
    heads, width = chosen.index
    shapes = ((heads, width), (width,), (heads,))
    return dsa.IndexerOutput(*(random(chosen.device, 1, num_tokens, *shape) for shape in shapes))


def select(num_tokens: int, chosen: argparse.Namespace) -> Iterator[Operation]:
    """Index scores and top-k."""
    last = torch.arange(num_tokens, device=chosen.device)[None]

    def build() -> tuple[list[Tensor], Callable[[], Tensor]]:
        index = indexer(num_tokens, chosen)
        kernels = dispatch.dsa_kernels(index.q, "triton")
        return [], lambda: kernels.select_keys(index, last, None, chosen.top_k)

    flops = num_tokens * (num_tokens + 1.0) * chosen.index[0] * chosen.index[1]
    yield Operation("select_keys", num_tokens, build, flops)


def kl(num_tokens: int, chosen: argparse.Namespace) -> Iterator[Operation]:
    """The indexer's loss with its gradient: over all keys, and over a selection."""
    last = torch.arange(num_tokens, device=chosen.device)[None]
    weight = torch.full((1, num_tokens), 1.0 / num_tokens, device=chosen.device)
    selected = random_keys(num_tokens, min(chosen.top_k, num_tokens), chosen.device).long()
    for shape in chosen.shapes:
        for kind, keys in (("all keys", None), ("selected keys", selected)):

            def build(shape: Shape = shape, keys: Tensor | None = keys) -> tuple[list[Tensor], Callable[[], Tensor]]:
                index = indexer(num_tokens, chosen)
                q = random(chosen.device, 1, num_tokens, shape.heads, shape.width).detach()
                k = random(chosen.device, 1, num_tokens, shape.groups, shape.width).detach()
                main = dsa_tiled.MainAttention(q, k, shape.width**-0.5, last)
                kernels = dispatch.dsa_kernels(q, "triton")

                def work() -> Tensor:  # Its gradient may be taken in the forward pass: both are one measurement.
                    with torch.enable_grad():
                        loss, _, _ = kernels.indexer_kl(main, index, weight, keys)
                    return torch.autograd.grad(loss, list(index))[0]

                return [], work

            yield Operation(f"indexer_kl and gradients, {kind}, {shape.name}", num_tokens, build)


def native(num_tokens: int, chosen: argparse.Namespace) -> Iterator[Operation]:
    """Native sparse attention, and fla's, whose blocks are pooled means and whose branches share keys."""
    shape, sizes, device = chosen.shapes[-1], chosen.nsa, chosen.device
    place = torch.arange(num_tokens, device=device)[None]
    scale = shape.width**-0.5

    def build() -> tuple[list[Tensor], Callable[[], Tensor]]:
        q, gates = (
            random(device, 1, num_tokens, shape.heads, shape.width),
            random(device, 1, num_tokens, shape.heads, 3),
        )
        counts = [nsa.num_compressed(num_tokens, sizes)] * 2 + [num_tokens] * 4
        branches = nsa.Branches(*(random(device, 1, count, shape.groups, shape.width) for count in counts))
        kernels = dispatch.nsa_kernels(q, "triton")
        return [q, *branches, gates], lambda: kernels.native_sparse_attention(q, branches, gates, place, sizes, scale)

    yield Operation(f"NSA, {shape.name}", num_tokens, build)
    if importlib.util.find_spec("fla") is None:
        return
    from fla.ops.nsa.parallel import parallel_nsa

    def build_fla() -> tuple[list[Tensor], Callable[[], Tensor]]:
        q = random(device, 1, num_tokens, shape.heads, shape.width)
        k, v = (random(device, 1, num_tokens, shape.groups, shape.width) for _ in range(2))
        gates = [random(device, 1, num_tokens, shape.heads) for _ in range(3)]
        blocks = {"block_counts": sizes.num_selected, "block_size": sizes.selected_length, "window_size": sizes.window}
        return [q, k, v, *gates], lambda: parallel_nsa(q, k, v, *gates, scale=scale, **blocks)

    yield Operation(f"fla parallel_nsa, {shape.name}", num_tokens, build_fla)


OPERATIONS = {"attention": attention, "decode": decode, "select": select, "kl": kl, "nsa": native}


# ------------------------------------------------------------------------------------------------------------- command


def options() -> argparse.Namespace:
    result = parser("Sparse attention in Triton beside dense attention, on a GPU.", rounds=30)
    result.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a check that everything runs")
    lengths = [4096, 8192, 16384, 32768, 65536, 131072]
    result.add_argument("--tokens", type=int, nargs="+", default=lengths, help="(default: %(default)s)")
    result.add_argument("--top-k", type=int, default=2048, help="keys a query (default: %(default)s)")
    result.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="(default: all)")
    result.add_argument("--turns", type=int, default=3, help="that the rounds are dealt out to (default: %(default)s)")
    result.add_argument("--recorded", help="a safetensors file with `selected` [tokens, keys] of a model")
    result.add_argument("--values-in-keys", action="store_true", help="values are the first numbers of the keys")
    chosen = result.parse_args()
    tiny = chosen.device == "cpu"
    chosen.shapes = TINY_SHAPES if tiny else SHAPES
    chosen.index = (2, 16) if tiny else (64, 128)
    chosen.nsa = nsa.BlockSizes(8, 4, 16, 2, 1, 1, 16) if tiny else nsa.BlockSizes(32, 16, 64, 16, 1, 2, 512)
    chosen.decode_rows = (1, 2) if tiny else (1, 16, 64)
    chosen.warm_up = 0 if tiny else 3
    if tiny:
        chosen.rounds, chosen.turns, chosen.top_k = 1, 1, min(chosen.top_k, 8)
    chosen.device = torch.device(chosen.device)
    return chosen


def gpu_conditions(chosen: argparse.Namespace) -> str:
    """One line that says on what and how the figures were taken, clocks at the end of the run included."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "triton", "rorqual"))
    how = f"medians of {chosen.rounds} rounds in {chosen.turns} turns, bfloat16, {chosen.top_k} keys a query"
    if chosen.device.type == "cpu":
        return f"Triton's interpreter on a CPU: the times mean nothing; {how}; {packages}."
    query = ["nvidia-smi", "--query-gpu=name,clocks.sm,clocks.max.sm,power.draw,power.limit", "--format=csv,noheader"]
    card = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().replace("\n", "; ")
    return f"{card} (clock, its maximum, power, its limit); {how}; {packages}."


def main() -> int:
    chosen = options()
    if chosen.device.type == "cuda" and not torch.cuda.is_available():
        sys.stderr.write(
            "There is no CUDA device. --device cpu --tokens 64 checks that this runs, in an interpreter.\n"
        )
        return 1
    torch.manual_seed(SEED)
    torch.set_num_threads(chosen.threads)
    clock = Clock(chosen.device)
    head = ["", "tokens", "forward, ms", "TFLOP/s", "backward, ms", "TFLOP/s", "peak above inputs, GiB"]
    for part in chosen.parts:
        done: list[Operation] = []
        for num_tokens in chosen.tokens:
            operations = list(OPERATIONS[part](num_tokens, chosen))
            for _ in range(chosen.turns):
                for operation in operations:
                    if not operation.reason:
                        take_turn(operation, clock, -(-chosen.rounds // chosen.turns), chosen.warm_up)
            done += operations
        print(f"\n{part}\n\n{markdown_table(head, [operation.cells() for operation in done])}", flush=True)
    print(f"\n{gpu_conditions(chosen)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
