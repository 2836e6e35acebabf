"""Tokens a second of the built-in engine beside `transformers` `generate`, on the same model and prompts.

Both sample at temperature 1 from the whole distribution, in float32, with a key-value cache. Three kinds of work: all
prompts differ and all answers are equally long; prompts in groups of 8, as in GRPO; and four batches of answers of
unequal length, of which only the wanted tokens count. No round repeats a prompt. The engine also returns the log-prob
of every drawn token and the entropy it was drawn at. The two take turns in one process, and who begins changes every
round. Needs `pip install rorqual[bench]`.
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
from common import SEED, conditions, markdown_table, parser, write_checkpoint
from torch import Tensor
from transformers import Qwen2ForCausalLM

from rorqual.engines.local import EngineConfig, LocalEngine
from rorqual.models.checkpoints import load_checkpoint
from rorqual.records import GenerateRequest, SamplingParams

Side = Callable[[Tensor, list[int]], None]

WARMUP_ROUNDS = 1


def peer(directory: Path, batch_size: int) -> Side:
    """`generate` of transformers, with attention by `scaled_dot_product_attention`, a full batch at a time.

    A batch is drawn to its longest answer, since its rows end together.
    """
    model = Qwen2ForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="sdpa").eval()

    @torch.no_grad()
    def run(prompt_ids_RP: Tensor, lengths: list[int]) -> None:
        for start in range(0, len(lengths), batch_size):
            prompts, longest = prompt_ids_RP[start : start + batch_size], max(lengths[start : start + batch_size])
            output = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                use_cache=True,
                min_new_tokens=longest,
                max_new_tokens=longest,
            )
            _require_tokens(output.numel() - prompts.numel(), len(prompts) * longest)

    return run


def engine(directory: Path, batch_size: int) -> Side:
    """The built-in engine with a slot for every row of a batch; all requests are given at once."""
    local = LocalEngine(load_checkpoint(directory), EngineConfig(num_slots=batch_size))
    drawn = [0]

    def run(prompt_ids_RP: Tensor, lengths: list[int]) -> None:
        requests = []
        for row, (ids, length) in enumerate(zip(prompt_ids_RP.tolist(), lengths, strict=True)):
            drawn[0] += 1
            params = SamplingParams(max_new_tokens=length, seed=drawn[0])
            requests.append(GenerateRequest(request_id=str(row), prompt_ids=array("i", ids), params=params))
        completions = local.generate(requests)
        _require_tokens(sum(len(each.token_ids) for each in completions), sum(lengths))

    return run


def _require_tokens(found: int, expected: int) -> None:
    if found != expected:
        raise ValueError(f"{found} tokens were drawn, {expected} were asked for; the comparison would not be fair.")


def compare(
    chosen: argparse.Namespace, directory: Path, batch_size: int, group: int, batches: int
) -> tuple[list[float], list[float]]:
    """Tokens a second of transformers and of the engine, for each round.

    Prompts come in groups of `group` equal ones. One batch: every answer has --new-tokens; several: answers of 1 to
    --new-tokens, evenly spread.
    """
    sides = (peer(directory, batch_size), engine(directory, batch_size))
    rates: tuple[list[float], list[float]] = ([], [])
    generator = torch.Generator().manual_seed(SEED)
    num_rows = batch_size * batches
    for turn in range(WARMUP_ROUNDS + chosen.rounds):
        prompt_ids_RP = torch.randint(3, chosen.vocabulary, (num_rows // group, chosen.prompt), generator=generator)
        prompt_ids_RP = prompt_ids_RP.repeat_interleave(group, dim=0)
        lengths = [chosen.new_tokens] * num_rows
        if batches > 1:
            lengths = torch.randint(1, chosen.new_tokens + 1, (num_rows,), generator=generator).tolist()
        for index in (0, 1) if turn % 2 else (1, 0):
            started = time.perf_counter()
            sides[index](prompt_ids_RP, lengths)
            rates[index].append(sum(lengths) / (time.perf_counter() - started))
    return rates[0][WARMUP_ROUNDS:], rates[1][WARMUP_ROUNDS:]


def row(title: str, theirs: list[float], ours: list[float]) -> list[str]:
    rates = [f"{min(each):,.0f} / {median(each):,.0f} / {max(each):,.0f}" for each in (theirs, ours)]
    return [title, *rates, f"{median(ours) / median(theirs):.1f}", f"{max(ours) / max(theirs):.1f}"]


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
    settings = [(f"{size}", size, 1, 1) for size in chosen.batch]
    settings += [(f"{size}, groups of 8", size, 8, 1) for size in chosen.batch if size >= 16]
    settings += [(f"{size}, unequal answers", size, 1, 4) for size in chosen.batch if size >= 16]
    rows = []
    with tempfile.TemporaryDirectory() as name:
        directory = write_checkpoint(Path(name), chosen.vocabulary, 2 * (chosen.prompt + chosen.new_tokens))
        for title, size, group, batches in settings:
            rows.append(row(title, *compare(chosen, directory, size, group, batches)))
    print(
        f"Prompt {chosen.prompt}, {chosen.new_tokens} new tokens, vocabulary {chosen.vocabulary:,}. Tokens a second, "
        "least / median / most.\n"
    )
    head = ["batch", "transformers", "Rorqual", "ratio of medians", "of the best"]
    print(markdown_table(head, rows))
    print(f"\n{conditions(chosen.threads, chosen.rounds, ('torch', 'transformers', 'rorqual', 'numba'))}")


if __name__ == "__main__":
    main()
