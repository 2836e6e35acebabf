"""Sparse attention beside dense on a CPU: DSA and `scaled_dot_product_attention`, one layer, one causal sequence.

Prefill, prefill with backward, and one decoded token are timed; the indexer's scores, top-k and attention apart
(gathering keys is a part of attention: they are read where they lie). The two sides take turns in one process. `--kl`
times the indexer's loss over all keys instead, and measures its memory. Needs `pip install rorqual[bench]`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from common import SEED, conditions, markdown_table, memory_at_rest, memory_peak, parser, spread
from torch import Tensor

from rorqual.models.index_keys import pack_index_keys, unpack_index_keys
from rorqual.ops import dsa, dsa_tiled
from rorqual.ops.cpu import dsa as dsa_cpu
from rorqual.ops.dispatch import dsa_kernels

DECODED = 20
"""Tokens decoded in each turn: one takes about a millisecond."""


@dataclass(frozen=True)
class Layer:
    """One layer's queries, keys and values, and what its indexer gives."""

    q: Tensor
    k: Tensor
    v: Tensor
    index: dsa.IndexerOutput
    last: Tensor

    @property
    def scale(self) -> float:
        return float(self.q.shape[-1] ** -0.5)

    def newest(self) -> Layer:
        """The last query alone, before the same keys: what a step of decoding computes."""
        index = dsa.IndexerOutput(self.index.q[:, -1:], self.index.k, self.index.weight[:, -1:])
        return Layer(self.q[:, -1:].detach(), self.k.detach(), self.v.detach(), index, self.last[:, -1:])


def random_layer(num_tokens: int, chosen: argparse.Namespace) -> Layer:
    generator = torch.Generator().manual_seed(SEED)

    def random(*shape: int) -> Tensor:
        return torch.randn(1, num_tokens, *shape, generator=generator)

    heads = (random(chosen.heads, chosen.dim), random(chosen.kv_heads, chosen.dim), random(chosen.kv_heads, chosen.dim))
    index = dsa.IndexerOutput(
        random(chosen.index_heads, chosen.index_dim), random(chosen.index_dim), random(chosen.index_heads)
    )
    return Layer(*(each.requires_grad_() for each in heads), index, torch.arange(num_tokens)[None])


def dense(layer: Layer) -> Tensor:
    q, k, v = (each.transpose(1, 2) for each in (layer.q, layer.k, layer.v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=layer.scale, enable_gqa=True)


def dense_decode(layer: Layer) -> Tensor:
    """Heads that share keys stand as queries of one head, which reads the keys once: the faster form for one token."""
    q = layer.q[0].unflatten(1, (layer.k.shape[2], -1))
    k, v = (each.transpose(1, 2) for each in (layer.k, layer.v))
    return F.scaled_dot_product_attention(q, k, v, scale=layer.scale)


class Sparse:
    """Our side; keeps the last selection, so that its parts can be timed apart."""

    def __init__(self, layer: Layer, top_k: int) -> None:
        self.layer, self.top_k, self.kernels = layer, top_k, dsa_kernels(layer.q)
        self.selected = torch.empty(0)

    def score(self) -> None:
        dsa_cpu.for_each_tile_of_ranks(self.layer.index, self.layer.last, None, lambda row, tile, ranks: None)

    def select(self) -> None:
        self.selected = self.kernels.select_keys(self.layer.index, self.layer.last, None, self.top_k)

    def attend(self) -> Tensor:
        return self.kernels.sparse_attention(self.layer.q, self.layer.k, self.layer.v, self.selected, self.layer.scale)

    def learn(self) -> None:
        """The indexer's loss over the selected keys, with its gradients."""
        main = dsa_tiled.MainAttention(self.layer.q, self.layer.k, self.layer.scale, self.layer.last)
        index = dsa.IndexerOutput(*(each.detach().requires_grad_() for each in self.layer.index))
        weight = torch.full(self.layer.last.shape, 1 / self.layer.last.shape[1])
        self.kernels.indexer_kl(main, index, weight, self.selected)[0].backward()


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def ratio(times: dict[str, list[float]], peer: str, *ours: str) -> str:
    """Of medians; above 1 we are faster."""
    return f"{statistics.median(times[peer]) / sum(statistics.median(times[name]) for name in ours):.2f}"


def prefill(num_tokens: int, chosen: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Rows of two tables: forward, and forward with backward."""
    layer = random_layer(num_tokens, chosen)
    sparse = Sparse(layer, chosen.top_k)
    names = ("dense", "score", "select", "attend", "dense+", "attend+", "learn")
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(chosen.rounds + 1):
        found = {}
        with torch.no_grad():
            found["dense"] = timed(lambda: dense(layer))
            found["score"], found["select"] = timed(sparse.score), timed(sparse.select)
            found["attend"] = timed(sparse.attend)
        if num_tokens <= chosen.backward_up_to:
            found["dense+"] = timed(lambda: dense(layer).sum().backward())
            found["attend+"] = timed(lambda: sparse.attend().sum().backward())
            found["learn"] = timed(sparse.learn)
        for name, seconds in found.items():
            if turn:  # The first turn loads what is compiled.
                times[name].append(seconds)
    top_k = [max(0.0, both - score) for both, score in zip(times["select"], times["score"], strict=True)]
    shown = [spread(each) for each in (times["dense"], times["score"], top_k, times["attend"])]
    forward = [f"{num_tokens:,}", *shown, ratio(times, "dense", "select", "attend")]
    if not times["dense+"]:
        return forward, []
    shown = [spread(times[name]) for name in ("dense+", "select", "attend+", "learn")]
    ratios = [ratio(times, "dense+", "select", "attend+"), ratio(times, "dense+", "select", "attend+", "learn")]
    return forward, [f"{num_tokens:,}", *shown, *ratios]


def decode(num_tokens: int, chosen: argparse.Namespace) -> list[str]:
    """Milliseconds of one token; the index keys as the cache keeps them, in three formats."""
    layer = random_layer(num_tokens, chosen).newest()
    formats = {"float32": torch.float32, "bfloat16": torch.bfloat16, "fp8": torch.uint8}
    stored = {name: pack_index_keys(layer.index.k, dtype) for name, dtype in formats.items()}
    sparse = {name: Sparse(Layer(layer.q, layer.k, layer.v, layer.index, layer.last), chosen.top_k) for name in formats}

    def select(name: str) -> None:
        index = layer.index._replace(k=unpack_index_keys(stored[name]))
        sparse[name].selected = sparse[name].kernels.select_keys(index, layer.last, None, chosen.top_k)

    times: dict[str, list[float]] = {name: [] for name in ("dense", *formats, "attend")}
    with torch.inference_mode():
        for turn in range((chosen.rounds + 1) * DECODED):
            found = {"dense": timed(lambda: dense_decode(layer))}
            for name in formats:
                found[name] = timed(lambda name=name: select(name))
            found["attend"] = timed(sparse["float32"].attend)
            for name, seconds in found.items():
                if turn >= DECODED:
                    times[name].append(seconds)
    shown = [f"{1e3 * min(times[name]):.2f} / {1e3 * statistics.median(times[name]):.2f}" for name in times]
    return [f"{num_tokens:,}", *shown, *(ratio(times, "dense", name, "attend") for name in formats)]


def warm_up(num_tokens: int, chosen: argparse.Namespace) -> list[str]:
    """Seconds of the indexer's loss with its gradients over all causal keys, and MiB above what was there before."""
    layer = random_layer(num_tokens, chosen)
    index = dsa.IndexerOutput(*(each.requires_grad_() for each in layer.index))
    main = dsa_tiled.MainAttention(layer.q, layer.k, layer.scale, layer.last)
    weight = torch.full((1, num_tokens), 1 / num_tokens)
    kernels = dsa_kernels(layer.q)
    rest = memory_at_rest()
    seconds = timed(lambda: kernels.indexer_kl(main, index, weight)[0].backward())
    whole = 4 * chosen.heads * num_tokens**2 / 2**20
    return [f"{num_tokens:,}", f"{seconds:.1f}", f"{memory_peak() - rest:.0f}", f"{whole:,.0f}"]


def options() -> argparse.Namespace:
    result = parser("Sparse attention beside dense, on a CPU.", rounds=3)
    result.add_argument(
        "--tokens", type=int, nargs="+", default=[4096, 8192, 16384, 32768, 65536], help="(default: %(default)s)"
    )
    result.add_argument(
        "--backward-up-to", type=int, default=32768, help="longest that is differentiated (default: %(default)s)"
    )
    result.add_argument("--top-k", type=int, default=512, help="keys a query (default: %(default)s)")
    result.add_argument("--heads", type=int, default=8, help="(default: %(default)s)")
    result.add_argument("--kv-heads", type=int, default=2, help="(default: %(default)s)")
    result.add_argument("--dim", type=int, default=64, help="of a head (default: %(default)s)")
    result.add_argument("--index-heads", type=int, default=4, help="(default: %(default)s)")
    result.add_argument("--index-dim", type=int, default=32, help="(default: %(default)s)")
    result.add_argument("--kl", action="store_true", help="the indexer's warm-up loss instead, once for each length")
    return result.parse_args()


def main() -> None:
    chosen = options()
    torch.set_num_threads(chosen.threads)
    if chosen.kl:
        head = ["tokens", "seconds", "MiB above rest", "MiB of [heads, tokens, tokens]"]
        print(markdown_table(head, [warm_up(length, chosen) for length in chosen.tokens]))
    else:
        compare(chosen)
    sizes = (
        f"{chosen.heads} heads, {chosen.kv_heads} key-value heads of {chosen.dim}, {chosen.index_heads} index heads "
        f"of {chosen.index_dim}, {chosen.top_k} keys; milliseconds, min / median; ratios of medians, above 1 sparse "
        "is faster."
    )
    rounds = 1 if chosen.kl else chosen.rounds
    print(f"\n{sizes} {conditions(chosen.threads, rounds, ('torch', 'numba', 'rorqual'))}")


def compare(chosen: argparse.Namespace) -> None:
    rows = []
    for length in chosen.tokens:
        print(f"{length:,} tokens ...", file=sys.stderr, flush=True)
        rows.append(prefill(length, chosen))
    print("Prefill:\n")
    print(markdown_table(["tokens", "dense", "indexer", "top-k", "attention", "ratio"], [row for row, _ in rows]))
    print("\nForward and backward:\n")
    head = ["tokens", "dense", "indexer, top-k", "attention", "indexer's loss", "ratio", "with the loss"]
    print(markdown_table(head, [row for _, row in rows if row]))
    print("\nOne decoded token; selection from index keys in three formats:\n")
    formats = ("float32", "bfloat16", "FP8")
    head = ["tokens", "dense", *(f"select, {name}" for name in formats), "attention", *(f"ratio, {n}" for n in formats)]
    print(markdown_table(head, [decode(length, chosen) for length in chosen.tokens]))


if __name__ == "__main__":
    main()
