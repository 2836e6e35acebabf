"""A minute of 64 streaming clients against `rorqual serve`, some of which leave in the middle or read slowly.

Every client asks with a seed, so that every answer is known: the first whole answer to a seed is what all later ones
must equal, or begin with what was read of them. At the end nothing may be in flight. Prints what became of the
requests, cross-talk, slots that were not given back, and the server's memory after a quarter of the time and at the
end; the exit code is 1 when something is amiss. Needs `pip install rorqual[bench]`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import httpx
from common import SEED
from servers import free_port, resident_mib, rorqual_command, running, write_chat_checkpoint

NUM_SEEDS = 40
MAX_GROWTH_MIB = 32.0
IDLE_SECONDS = 10.0


class Soak:
    """What the clients have seen. answers: the text of each seed; cross_talk: texts that are another's."""

    def __init__(self, url: str, until: float, tokens: int) -> None:
        self.url, self.until, self.tokens = url, until, tokens
        self.outcomes: Counter[str] = Counter()
        self.answers: dict[int, str] = {}
        self.pieces: list[tuple[int, str]] = []
        self.cross_talk = 0

    async def client(self, number: int) -> None:
        """Ask again and again, on a connection of its own."""
        plan = random.Random(SEED + number)
        limits = httpx.Limits(max_connections=4)
        async with httpx.AsyncClient(base_url=self.url, timeout=30, limits=limits) as http:
            while time.monotonic() < self.until:
                seed = plan.randrange(NUM_SEEDS)
                try:
                    outcome, text = await self._ask(http, seed, plan)
                except httpx.HTTPError as error:
                    outcome, text = f"failed: {type(error).__name__}", ""
                self.outcomes[outcome] += 1
                if outcome == "refused with 429":
                    await asyncio.sleep(plan.uniform(0.05, 0.3))
                elif outcome == "whole":
                    self.cross_talk += self.answers.setdefault(seed, text) != text
                elif text:
                    self.pieces.append((seed, text))

    async def _ask(self, http: httpx.AsyncClient, seed: int, plan: random.Random) -> tuple[str, str]:
        leaves_after = plan.choice([None, None, None, 1, 5, 20])
        pause = plan.choice([0.0, 0.0, 0.0, 0.02, 0.1])
        body = {
            "messages": [{"role": "user", "content": f"the whale swims {seed}"}],
            "max_tokens": self.tokens,
            "seed": seed,
            "stream": True,
        }
        text, count = "", 0
        async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
            if answer.status_code != 200:
                return f"refused with {answer.status_code}", ""
            async for line in answer.aiter_lines():
                if line == "data: [DONE]":
                    return "whole", text
                if line:
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        return "error in the stream", text
                    text += "".join(choice["delta"].get("content", "") for choice in event["choices"])
                    count += 1
                    await asyncio.sleep(pause)
                if count == leaves_after:
                    return "left", text
        return "cut", text

    def count_foreign_pieces(self) -> None:
        """What those who left had read must be the beginning of their own answer."""
        for seed, text in self.pieces:
            if seed in self.answers:
                self.cross_talk += not self.answers[seed].startswith(text)


async def in_engine(url: str) -> float:
    """Requests in the engine, as `/metrics` counts them, once it has had time to become idle."""
    deadline = time.monotonic() + IDLE_SECONDS
    value = -1.0
    async with httpx.AsyncClient(timeout=10) as http:
        while time.monotonic() < deadline and value != 0.0:
            page = (await http.get(f"{url}/metrics")).text
            value = next(float(line.split()[1]) for line in page.splitlines() if line.startswith("rorqual_requests_in"))
            await asyncio.sleep(0.1)
    return value


async def soak(given: argparse.Namespace, url: str, memory: list[float], measure: object) -> Soak:
    state = Soak(url, time.monotonic() + given.seconds, given.tokens)
    clients = [asyncio.create_task(state.client(number)) for number in range(given.clients)]
    await asyncio.sleep(given.seconds / 4)
    memory.append(measure())  # type: ignore[operator]
    await asyncio.gather(*clients)
    return state


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seconds", type=float, default=60.0, help="how long (default: %(default)s)")
    options.add_argument("--clients", type=int, default=64, help="clients at a time (default: %(default)s)")
    options.add_argument("--tokens", type=int, default=64, help="most tokens an answer (default: %(default)s)")
    options.add_argument("--slots", type=int, default=24, help="slots of the server (default: %(default)s)")
    options.add_argument("--waiting", type=int, default=24, help="requests that may wait (default: %(default)s)")
    given = options.parse_args()
    memory: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, port = write_chat_checkpoint(Path(folder) / "tiny"), free_port()
        url = f"http://127.0.0.1:{port}"
        command = rorqual_command(checkpoint, port, given.slots, given.waiting)
        with running(command, port, "/health") as process:
            state = asyncio.run(soak(given, url, memory, lambda: resident_mib(process)))
            left_behind = asyncio.run(in_engine(url))
            memory.append(resident_mib(process))
    state.count_foreign_pieces()
    total = sum(state.outcomes.values())
    print(f"{total} requests by {given.clients} clients in {given.seconds:g} s:")
    for outcome, number in state.outcomes.most_common():
        print(f"  {outcome}: {number}")
    print(f"cross-talk: {state.cross_talk}; requests left in the engine: {left_behind:g}")
    print(f"memory of the server: {memory[0]:.0f} MiB after a quarter, {memory[1]:.0f} MiB at the end")
    amiss = state.outcomes.keys() - {"whole", "left", "refused with 429"}
    return int(bool(amiss or state.cross_talk or left_behind or memory[1] - memory[0] > MAX_GROWTH_MIB))


if __name__ == "__main__":
    sys.exit(main())
