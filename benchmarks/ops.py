"""Sparse attention beside dense: DSA's parts and `scaled_dot_product_attention`, one layer, one causal sequence.

Indexer and top-k, and attention over what they select, are timed apart; forward, and forward with backward. The two
sides take turns in one process. `--kl` times the indexer's loss over all keys instead, and measures its memory.
Needs `pip install rorqual[bench]`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from common import SEED, conditions, markdown_table, memory_at_rest, memory_peak, parser, spread
from torch import Tensor

from rorqual.ops import dsa, dsa_tiled


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


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def compare(num_tokens: int, chosen: argparse.Namespace) -> list[str]:
    """One row of the table: seconds of both sides, and their ratio in the forward pass and with backward."""
    layer = random_layer(num_tokens, chosen)
    times: dict[str, list[float]] = {name: [] for name in ("sdpa", "sdpa+", "select", "attend", "attend+")}
    selected: list[Tensor] = []

    def select() -> None:
        selected[:] = [dsa_tiled.select_keys(layer.index, layer.last, None, chosen.top_k)]

    def attend() -> Tensor:
        return dsa_tiled.sparse_attention(layer.q, layer.k, layer.v, selected[0], layer.scale)

    for _ in range(chosen.rounds):
        with torch.no_grad():
            times["sdpa"].append(timed(lambda: dense(layer)))
            times["select"].append(timed(select))
            times["attend"].append(timed(attend))
        times["sdpa+"].append(timed(lambda: dense(layer).sum().backward()))
        times["attend+"].append(timed(lambda: attend().sum().backward()))
    forward = min(times["sdpa"]) / (min(times["select"]) + min(times["attend"]))
    both = min(times["sdpa+"]) / (min(times["select"]) + min(times["attend+"]))
    names = ("sdpa", "select", "attend", "sdpa+", "attend+")
    return [f"{num_tokens:,}", *(spread(times[name]) for name in names), f"{forward:.2f}", f"{both:.2f}"]


def warm_up(num_tokens: int, chosen: argparse.Namespace) -> list[str]:
    """Seconds of the indexer's loss with its gradients over all causal keys, and MiB above what was there before."""
    layer = random_layer(num_tokens, chosen)
    index = dsa.IndexerOutput(*(each.requires_grad_() for each in layer.index))
    main = dsa_tiled.MainAttention(layer.q, layer.k, layer.scale, layer.last)
    weight = torch.full((1, num_tokens), 1 / num_tokens)
    rest = memory_at_rest()
    seconds = timed(lambda: dsa_tiled.indexer_kl(main, index, weight)[0].backward())
    whole = 4 * chosen.heads * num_tokens**2 / 2**20
    return [f"{num_tokens:,}", f"{seconds:.1f}", f"{memory_peak() - rest:.0f}", f"{whole:,.0f}"]


def options() -> argparse.Namespace:
    result = parser("Sparse attention beside dense, on a CPU.", rounds=3)
    result.add_argument(
        "--tokens", type=int, nargs="+", default=[4096, 8192, 16384, 32768], help="(default: %(default)s)"
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
        head = ["tokens", "dense", "indexer, top-k", "attention", "dense, backward too", "attention, backward too"]
        rows = [compare(length, chosen) for length in chosen.tokens]
        print(markdown_table([*head, "ratio", "with backward"], rows))
    sizes = (
        f"{chosen.heads} heads, {chosen.kv_heads} key-value heads of {chosen.dim}, {chosen.index_heads} index heads "
    )
    sizes += (
        f"of {chosen.index_dim}, {chosen.top_k} keys; milliseconds, min / median; ratios of minima, sparse is faster "
    )
    sizes += "above 1."
    print(f"\n{sizes} {conditions(chosen.threads, chosen.rounds, ('torch', 'rorqual'))}")


if __name__ == "__main__":
    main()
