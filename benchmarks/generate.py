"""Tokens a second of the built-in engine beside `transformers` `generate`, on the same model and prompts.

Both sample at temperature 1 from the whole distribution, in float32, with a key-value cache, and draw the same number
of tokens; no two prompts are equal, and no round repeats one. The engine also returns the log-prob of every drawn token
and the entropy it was drawn at. The two take turns in one process, and who begins changes every round.
Needs `pip install rorqual[bench]`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from common import SEED, conditions, markdown_table, parser, spread, write_checkpoint
from torch import Tensor
from transformers import Qwen2ForCausalLM

from rorqual.engines.local import EngineConfig, LocalEngine
from rorqual.models.checkpoints import load_checkpoint
from rorqual.records import GenerateRequest, SamplingParams

WARMUP_ROUNDS = 1


def peer(directory: Path, num_new: int) -> Callable[[Tensor], None]:
    """`generate` of transformers, with attention by `scaled_dot_product_attention`."""
    model = Qwen2ForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="sdpa").eval()

    @torch.no_grad()
    def run(prompt_ids_RP: Tensor) -> None:
        output = model.generate(
            prompt_ids_RP,
            attention_mask=torch.ones_like(prompt_ids_RP),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            use_cache=True,
            min_new_tokens=num_new,
            max_new_tokens=num_new,
        )
        _require_tokens(output.numel() - prompt_ids_RP.numel(), len(prompt_ids_RP) * num_new)

    return run


def engine(directory: Path, num_new: int, batch_size: int) -> Callable[[Tensor], None]:
    """The built-in engine with a slot for every row."""
    local = LocalEngine(load_checkpoint(directory), EngineConfig(num_slots=batch_size))
    drawn = [0]

    def run(prompt_ids_RP: Tensor) -> None:
        requests = []
        for row, ids in enumerate(prompt_ids_RP.tolist()):
            drawn[0] += 1
            params = SamplingParams(max_new_tokens=num_new, seed=drawn[0])
            requests.append(GenerateRequest(request_id=str(row), prompt_ids=array("i", ids), params=params))
        completions = local.generate(requests)
        _require_tokens(sum(len(each.token_ids) for each in completions), len(requests) * num_new)

    return run


def _require_tokens(found: int, expected: int) -> None:
    if found != expected:
        raise ValueError(f"{found} tokens were drawn, {expected} were asked for; the comparison would not be fair.")


def compare(chosen: argparse.Namespace, directory: Path, batch_size: int) -> tuple[list[float], list[float]]:
    """Seconds of transformers and of the engine, for each round."""
    sides = (peer(directory, chosen.new_tokens), engine(directory, chosen.new_tokens, batch_size))
    seconds: tuple[list[float], list[float]] = ([], [])
    generator = torch.Generator().manual_seed(SEED)
    for turn in range(WARMUP_ROUNDS + chosen.rounds):
        prompt_ids_RP = torch.randint(3, chosen.vocabulary, (batch_size, chosen.prompt), generator=generator)
        for index in (0, 1) if turn % 2 else (1, 0):
            started = time.perf_counter()
            sides[index](prompt_ids_RP)
            seconds[index].append(time.perf_counter() - started)
    return seconds[0][WARMUP_ROUNDS:], seconds[1][WARMUP_ROUNDS:]


def row(batch_size: int, new_tokens: int, theirs: list[float], ours: list[float]) -> list[str]:
    drawn = batch_size * new_tokens
    rates = [f"{drawn / max(s):,.0f} / {drawn / median(s):,.0f} / {drawn / min(s):,.0f}" for s in (theirs, ours)]
    return [str(batch_size), *rates, f"{median(theirs) / median(ours):.1f}", spread(theirs), spread(ours)]


def options() -> argparse.Namespace:
    result = parser("Tokens a second of the built-in engine beside transformers.", rounds=10)
    result.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64, 256], help="rows (default: %(default)s)")
    result.add_argument("--prompt", type=int, default=32, help="tokens of a prompt (default: %(default)s)")
    result.add_argument("--new-tokens", type=int, default=64, help="tokens to draw (default: %(default)s)")
    result.add_argument("--vocabulary", type=int, default=256, help="(default: %(default)s)")
    return result.parse_args()


def main() -> None:
    chosen = options()
    torch.set_num_threads(chosen.threads)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        directory = write_checkpoint(Path(name), chosen.vocabulary, 2 * (chosen.prompt + chosen.new_tokens))
        for batch_size in chosen.batch:
            rows.append(row(batch_size, chosen.new_tokens, *compare(chosen, directory, batch_size)))
    print(
        f"Prompt {chosen.prompt}, {chosen.new_tokens} new tokens, vocabulary {chosen.vocabulary:,}. Tokens a second, "
        "least / median / most; milliseconds, least / median.\n"
    )
    head = ["batch", "transformers", "Rorqual", "ratio", "transformers, ms", "Rorqual, ms"]
    print(markdown_table(head, rows))
    print(f"\n{conditions(chosen.threads, chosen.rounds, ('torch', 'transformers', 'rorqual'))}")


if __name__ == "__main__":
    main()
