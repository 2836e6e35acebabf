"""Time to first token and tokens a second of `rorqual serve` beside `transformers serve`, on the same checkpoint.

Each side is a process of its own on loopback, asked by the `openai` client at temperature 1; prompts of about 60 tokens
that all differ, answers of at most `--tokens`. Both decode in float32 with the same number of threads, one after the
other, and who begins changes every round. A token is counted where the server says that it was drawn. Needs
`pip install rorqual[bench]`.
"""

from __future__ import annotations

import asyncio
import os
import random
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import openai
from common import SEED, conditions, markdown_table, parser
from servers import WORDS, free_port, rorqual_command, running, transformers_command, write_chat_checkpoint

CONCURRENCIES = (1, 16)
PROMPT_WORDS = 50
TIMEOUT_SECONDS = 120.0


@dataclass
class Side:
    """A server and what was measured: by concurrency, seconds to first tokens and tokens a second of each round."""

    name: str
    url: str
    model: str
    first: dict[int, list[float]] = field(default_factory=dict)
    rates: dict[int, list[float]] = field(default_factory=dict)


async def one_answer(client: openai.AsyncOpenAI, model: str, prompt: str, num_tokens: int) -> tuple[float, int]:
    """(seconds to the first text, tokens drawn)."""
    begun, first, pieces, drawn = time.perf_counter(), None, 0, None
    stream = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": prompt}],
        max_tokens=num_tokens,
        temperature=1.0,
        stream=True,
        stream_options={"include_usage": True},
    )
    async for chunk in stream:
        drawn = chunk.usage.completion_tokens if chunk.usage else drawn
        if chunk.choices and chunk.choices[0].delta.content:
            first = first or time.perf_counter() - begun
            pieces += 1
    return first or time.perf_counter() - begun, drawn or pieces


async def one_round(side: Side, concurrency: int, num_requests: int, num_tokens: int, words: random.Random) -> None:
    prompts = [" ".join(words.choice(WORDS) for _ in range(PROMPT_WORDS)) for _ in range(num_requests)]
    gate = asyncio.Semaphore(concurrency)
    async with openai.AsyncOpenAI(
        base_url=f"{side.url}/v1", api_key="none", max_retries=0, timeout=TIMEOUT_SECONDS
    ) as client:

        async def ask(prompt: str) -> tuple[float, int]:
            async with gate:
                return await one_answer(client, side.model, prompt, num_tokens)

        begun = time.perf_counter()
        answers = await asyncio.gather(*map(ask, prompts))
        seconds = time.perf_counter() - begun
    side.first.setdefault(concurrency, []).extend(first for first, _ in answers)
    side.rates.setdefault(concurrency, []).append(sum(drawn for _, drawn in answers) / seconds)


def main() -> None:
    options = parser(__doc__ or "", rounds=3)
    options.add_argument("--requests", type=int, default=16, help="answers a round (default: %(default)s)")
    options.add_argument("--tokens", type=int, default=48, help="most tokens an answer (default: %(default)s)")
    given = options.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(given.threads)
    words = random.Random(SEED)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_chat_checkpoint(Path(folder) / "tiny")
        ports = [free_port() for _ in range(3)]
        with (
            running(rorqual_command(checkpoint, ports[0], 16, 64), ports[0], "/health"),
            running(transformers_command(checkpoint, ports[1], False), ports[1], "/health"),
            running(transformers_command(checkpoint, ports[2], True), ports[2], "/health"),
        ):
            where = [f"http://127.0.0.1:{port}" for port in ports]
            sides = [
                Side("`rorqual serve`", where[0], "tiny"),
                Side("`transformers serve`", where[1], str(checkpoint)),
                Side("`transformers serve --continuous-batching`", where[2], str(checkpoint)),
            ]
            for number in range(given.rounds + 1):
                for side in sides if number % 2 else sides[::-1]:
                    for concurrency in CONCURRENCIES:
                        asyncio.run(one_round(side, concurrency, given.requests, given.tokens, words))
                if number == 0:
                    for side in sides:
                        side.first, side.rates = {}, {}
    rows = [
        [
            side.name,
            str(concurrency),
            f"{1e3 * min(side.first[concurrency]):.1f} / {1e3 * statistics.median(side.first[concurrency]):.1f}",
            f"{statistics.median(side.rates[concurrency]):.0f} / {max(side.rates[concurrency]):.0f}",
        ]
        for concurrency in CONCURRENCIES
        for side in sides
    ]
    head = ["server", "clients", "first token, ms (min / median)", "tokens a second (median / max)"]
    print(markdown_table(head, rows))
    print()
    print(conditions(given.threads, given.rounds, ["torch", "transformers", "numba", "uvicorn"]))


if __name__ == "__main__":
    main()
