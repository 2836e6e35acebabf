"""What one more token costs as the context grows: dense attention, DSA and NSA in the same small decoder, on a CPU.

The cache is filled with random numbers, so that nothing has to be prefilled; then tokens are decoded one by one through
`Decoder.forward_cached`, all layers and the logits included. The kinds take turns in one process. Needs
`pip install rorqual[bench]`.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from common import SEED, conditions, markdown_table, parser

from rorqual.models.cache import KVCache, cached_layout
from rorqual.models.config import DSAConfig, ModelConfig, NSAConfig
from rorqual.models.decoder import Decoder

KINDS = ("dense", "dsa", "nsa")


def build(kind: str, window: int, top_k: int) -> Decoder:
    config = ModelConfig(
        family="qwen3",
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_layers=4,
        num_heads=8,
        num_kv_heads=2,
        head_dim=64,
        context_window=window,
        attention=kind,
        dsa=DSAConfig(top_k=top_k, num_heads=4, head_dim=32, rope_dim=16) if kind == "dsa" else None,
        nsa=NSAConfig(compressor_size=64) if kind == "nsa" else None,
    )
    model = Decoder(config)
    model.initialize(torch.Generator().manual_seed(SEED))
    return model.eval()


def filled(model: Decoder, num_tokens: int) -> KVCache:
    cache = model.new_cache(1, num_tokens)
    generator = torch.Generator().manual_seed(SEED)
    for columns in cache.columns:
        for column in columns:
            column.normal_(generator=generator)
    return cache


def measure(num_tokens: int, chosen: argparse.Namespace) -> list[str]:
    """Milliseconds a token of each kind after so many tokens."""
    models = {kind: build(kind, num_tokens, chosen.top_k) for kind in KINDS}
    caches = {kind: filled(model, num_tokens) for kind, model in models.items()}
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with torch.inference_mode():
        for turn in range(chosen.rounds + 2):
            for kind, model in models.items():
                started = time.perf_counter()
                layout = cached_layout(range(1), [num_tokens - 1], 1, caches[kind])
                model.logits(model.forward_cached(torch.tensor([[turn]]), caches[kind], layout).hidden)
                if turn >= 2:  # The first ones load what is compiled.
                    times[kind].append(time.perf_counter() - started)
    median = {kind: statistics.median(each) for kind, each in times.items()}
    shown = [f"{1e3 * min(times[kind]):.2f} / {1e3 * median[kind]:.2f}" for kind in KINDS]
    return [f"{num_tokens:,}", *shown, *(f"{median['dense'] / median[kind]:.2f}" for kind in KINDS[1:])]


def main() -> None:
    options = parser("The cost of one token as the context grows, on a CPU.", rounds=20)
    options.add_argument(
        "--tokens", type=int, nargs="+", default=[1024, 4096, 16384, 65536], help="(default: %(default)s)"
    )
    options.add_argument("--top-k", type=int, default=512, help="keys that DSA selects (default: %(default)s)")
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    print(markdown_table(["tokens", *KINDS, "ratio, dsa", "ratio, nsa"], [measure(n, chosen) for n in chosen.tokens]))
    print(
        "\n4 layers, 8 heads, 2 key-value heads of 64; milliseconds a token, min / median; ratios of medians.", end=" "
    )
    print(conditions(chosen.threads, chosen.rounds, ("torch", "numba", "rorqual")))


if __name__ == "__main__":
    main()
