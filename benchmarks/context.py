"""What each way to manage a context does for a policy whose history does not fit its window, in two opposite worlds.

    A   one part behind a few documents, among decoys that begin alike and go on longer: a wrong lead fills the context
    B   many parts, each of them near: everything that was found must be held together

Every strategy of `rollout.context` has the same tasks, the same window, and the same budget of steps and of generated
tokens, all runs and summaries counted. The policy is the scripted reader (`scripted_reader.py` says what it assumes),
or with --base-url a model behind any OpenAI-compatible endpoint. `docs/context_benchmark.md` says what follows from the
figures and what does not. Needs `pip install rorqual[eval]`, and `openai` for an endpoint.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

import msgspec
from context_plot import write_plot
from context_session import Budget, EndpointPolicy, Outcome, Policy, PromptPolicy, make_encoding, play, solved_within
from scripted_reader import ReaderConfig, ScriptedReader

from rorqual.envs.document_graph import OPEN, SEARCH, DocumentGraphConfig, DocumentGraphEnvironment, document_task
from rorqual.evals.statistics import Difference, mean_at_k, paired_difference
from rorqual.records import Record
from rorqual.rollout.compaction import Strategy
from rorqual.rollout.context import ContextConfig

REGIMES = {
    "A": DocumentGraphConfig(num_parts=1, depth=4, num_trails=5, decoy_depth=40),
    "B": DocumentGraphConfig(num_parts=8, depth=1, num_trails=2, decoy_depth=1),
}
TITLES = {"A": "A: anchored on a wrong lead", "B": "B: evidence that must be held together"}
STRATEGIES: tuple[Strategy, ...] = ("none", "summary", "discard_75", "discard_all", "parallel_fewest_step")
REFERENCE: Strategy = "discard_all"

Outcomes = dict[Strategy, list[Outcome]]


class Setting(Record):
    """All that is the same for every strategy. endpoint: base URL, model and temperature; None for the reader."""

    world: DocumentGraphConfig
    window: int
    budget: Budget
    reader: ReaderConfig = ReaderConfig()
    parallel_runs: int = 8
    reserve_tokens: int = 96
    endpoint: tuple[str, str, float] | None = None


def outcome(setting: Setting, strategy: Strategy, seed: int) -> Outcome:
    """One task under one strategy."""
    config = ContextConfig(
        strategy=strategy, parallel_runs=setting.parallel_runs, reserve_tokens=setting.reserve_tokens
    )
    encoding = make_encoding(setting.world)
    policy: Policy = PromptPolicy(ScriptedReader(encoding, setting.reader))
    if setting.endpoint is not None:
        url, model, temperature = setting.endpoint
        policy = EndpointPolicy(_client(url), model, encoding, (SEARCH, OPEN), {"temperature": temperature})
    task = document_task(setting.world, seed)
    return play(task, DocumentGraphEnvironment(), policy, encoding, config, (setting.window, setting.budget))


def outcomes(setting: Setting, strategies: Sequence[Strategy], seeds: int, executor: Executor) -> Outcomes:
    """Every strategy on the same worlds, those of seeds 0, 1..."""
    return {each: list(executor.map(partial(outcome, setting, each), range(seeds))) for each in strategies}


def _client(url: str) -> Any:
    try:
        from openai import OpenAI
    except ImportError as error:
        raise ValueError("An endpoint needs the openai package, which is not installed: pip install openai.") from error
    return OpenAI(base_url=url, api_key=os.environ.get("OPENAI_API_KEY", "none"))


# ------------------------------------------------------------------------------------------------------------ figures


def compared(results: Outcomes, value: Callable[[Outcome], float], scale: float = 1.0) -> dict[Strategy, Difference]:
    """`value` / `scale`, which is in [0, 1], of each strategy minus that of the reference, paired by task."""

    def values(strategy: Strategy) -> dict[str, list[float]]:
        return {str(seed): [value(each) / scale] for seed, each in enumerate(results[strategy])}

    base = values(REFERENCE) if REFERENCE in results else {}
    return {each: paired_difference(base, values(each)) for each in results if base and each != REFERENCE}


def accuracy(results: Sequence[Outcome]) -> str:
    estimate = mean_at_k({str(seed): [float(each.solved)] for seed, each in enumerate(results)})
    interval = estimate.over_problems
    return f"{estimate.mean:.3f}" + (f" ({interval.low:.3f}–{interval.high:.3f})" if interval else "")


def mean_of(results: Sequence[Outcome], name: str) -> float:
    return fmean(getattr(each.spent, name) for each in results)


def spent_table(results: Outcomes) -> str:
    head = ["strategy", "accuracy (95 %)", "steps", "generated", "prefill", "prefill, prefix cached"]
    head += ["resets", "repeated calls", "parts kept"]
    rows = []
    for strategy, each in results.items():
        names = ("num_steps", "num_generated", "num_prefilled", "num_prefilled_cached")
        recalled = [share for one in each for share in one.spent.recalled]
        cells = [strategy, accuracy(each), *(f"{mean_of(each, name):,.0f}" for name in names)]
        cells += [f"{mean_of(each, name):.1f}" for name in ("num_resets", "num_repeated_calls")]
        rows.append([*cells, f"{fmean(recalled):.2f}" if recalled else "–"])
    return markdown_table(head, rows)


def paired_table(results: Outcomes, budget: Budget) -> str:
    """Accuracy and steps of each strategy minus those of the reference."""
    accuracies = compared(results, lambda each: float(each.solved))
    steps = compared(results, lambda each: each.spent.num_steps, budget.num_steps)
    rows = [
        [each, difference(accuracies[each], 1.0, "+.3f"), difference(steps[each], budget.num_steps, "+.1f")]
        for each in accuracies
    ]
    return markdown_table([f"minus {REFERENCE}", "accuracy", "steps"], rows)


def difference(found: Difference, scale: float, form: str) -> str:
    interval = found.over_problems
    between = f" ({scale * interval.low:{form}} to {scale * interval.high:{form}})" if interval else ""
    return f"{scale * found.mean:{form}}{between}"


def steps_table(results: Outcomes, budget: Budget) -> str:
    """Accuracy where only so many steps are allowed."""
    limits = [budget.num_steps * share // 8 for share in (1, 2, 3, 4, 6, 8)]
    rows = [[each, *(f"{fmean(solved_within(o, n) for o in results[each]):.3f}" for n in limits)] for each in results]
    return markdown_table(["steps allowed", *map(str, limits)], rows)


def overhead_table(results: Mapping[str, Outcomes], chosen: argparse.Namespace) -> str:
    """Milliseconds a step inside the context manager; with --engine, as a share of a call of the built-in engine.

    The last column is of a call that finds all but the newest result in a prefix cache, so that little is left of it.
    """
    every = [one for found in results.values() for each in found.values() for one in each]
    num_steps = sum(one.spent.num_steps for one in every)
    new_tokens = round(sum(one.spent.num_generated for one in every) / num_steps)
    lengths = (chosen.window // 2, round(sum(one.spent.num_prefilled_cached for one in every) / num_steps))
    calls: list[float] = []
    if chosen.engine:
        from context_overhead import engine_call_seconds  # it needs torch, which nothing else here does

        calls = [engine_call_seconds(length, new_tokens) for length in lengths]
    rows = []
    for title, found in results.items():
        for strategy, each in found.items():
            managing = sum(one.spent.managing_seconds for one in each) / sum(one.spent.num_steps for one in each)
            shares = [f"{100 * managing / call:.2f} %" for call in calls]
            rows.append([f"{title}: {strategy}", f"{1e3 * managing:.3f}", *shares])
    head = [
        "context management",
        "ms a step",
        *(f"of a call that prefills {length:,}" for length in lengths[: len(calls)]),
    ]
    took = " and ".join(f"{1e3 * call:.0f} ms" for call in calls)
    note = f"\n\nThe calls of the built-in engine, {new_tokens} tokens written: {took}." if calls else ""
    return markdown_table(head, rows) + note


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first column left, the others right."""
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


# ------------------------------------------------------------------------------------------------------ command line


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    result = argparse.ArgumentParser(description="Strategies of context management at equal budgets.")
    add = result.add_argument
    add("--seeds", type=int, default=100, help="tasks of each regime (default: %(default)s)")
    add("--regimes", nargs="+", choices=REGIMES, default=list(REGIMES))
    add("--strategies", nargs="+", choices=[*get_args(Strategy), "all"], default=list(STRATEGIES))
    add("--window", type=int, default=5000, help="tokens of a context (default: %(default)s)")
    add("--steps", type=int, default=200, help="model calls of a task (default: %(default)s)")
    add("--tokens", type=int, default=20_000, help="generated tokens of a task (default: %(default)s)")
    add("--page-words", type=int, default=60, help="size of tool outputs (default: %(default)s)")
    add("--decoy-depth", type=int, nargs="+", help="documents on a wrong lead, in regime A; several: tables for each")
    add("--num-parts", type=int, nargs="+", help="parts of the answer, in regime B; several: tables for each")
    add("--anchoring", type=float, nargs="+", default=[2.0], help="of the scripted reader; several: tables for each")
    add("--parallel-runs", type=int, default=8, help="of parallel_fewest_step (default: %(default)s)")
    add("--jobs", type=int, default=os.cpu_count(), help="tasks at a time (default: %(default)s)")
    add("--plot", type=Path, help="an HTML file to write the curves to")
    add("--engine", action="store_true", help="time a call of the built-in engine too, to compare the overhead with")
    add("--base-url", help="an OpenAI-compatible endpoint; its key is in OPENAI_API_KEY")
    add("--model", default="default", help="its model")
    add("--temperature", type=float, default=1.0, help="its temperature (default: %(default)s)")
    return result.parse_args(arguments)


def settings_of(chosen: argparse.Namespace) -> dict[str, Setting]:
    """The settings that were asked for, by their titles."""
    found = {}
    for name in chosen.regimes:
        varied, asked = ("decoy_depth", chosen.decoy_depth) if name == "A" else ("num_parts", chosen.num_parts)
        values = asked or [getattr(REGIMES[name], varied)]
        for value, anchoring in itertools.product(values, chosen.anchoring):
            title = TITLES[name]
            title += f", {varied} {value}" if len(values) > 1 else ""
            title += f", anchoring {anchoring:g}" if len(chosen.anchoring) > 1 else ""
            found[title] = Setting(
                world=msgspec.structs.replace(REGIMES[name], page_words=chosen.page_words, **{varied: value}),
                window=chosen.window,
                budget=Budget(num_steps=chosen.steps, num_tokens=chosen.tokens),
                reader=ReaderConfig(anchoring=anchoring),
                parallel_runs=chosen.parallel_runs,
                reserve_tokens=1024 if chosen.base_url else 96,
                endpoint=(chosen.base_url, chosen.model, chosen.temperature) if chosen.base_url else None,
            )
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = options(arguments)
    strategies = get_args(Strategy) if "all" in chosen.strategies else chosen.strategies
    started = time.perf_counter()
    results: dict[str, Outcomes] = {}
    pool: Executor = ThreadPoolExecutor(chosen.jobs) if chosen.base_url else ProcessPoolExecutor(chosen.jobs)
    with pool as executor:
        for title, setting in settings_of(chosen).items():
            results[title] = found = outcomes(setting, strategies, chosen.seeds, executor)
            print(f"## {title}\n\n{spent_table(found)}\n", flush=True)
            if REFERENCE in found and len(found) > 1:
                print(f"{paired_table(found, setting.budget)}\n")
            print(f"{steps_table(found, setting.budget)}\n", flush=True)
    seconds = time.perf_counter() - started
    if not chosen.base_url:
        print(overhead_table(results, chosen))
    policy = f"{chosen.model} at {chosen.base_url}" if chosen.base_url else "scripted reader"
    print(
        f"\n{policy}; {chosen.seeds} seeds a regime, window {chosen.window:,}, at most {chosen.steps} steps and "
        f"{chosen.tokens:,} generated tokens a task; {seconds:.0f} s on {chosen.jobs} processes; "
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}."
    )
    if chosen.plot:
        write_plot(chosen.plot, results, chosen.steps)
        print(f"Curves: {chosen.plot}")


if __name__ == "__main__":
    main()
