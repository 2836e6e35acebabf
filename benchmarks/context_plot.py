"""The curves of the context benchmark as one self-contained HTML page of SVG, nothing to load."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from context_session import Outcome, solved_within

from rorqual.evals.statistics import mean_at_k

COLOURS = ("#6b7280", "#d97706", "#7c3aed", "#0f766e", "#be123c", "#1d4ed8", "#65a30d", "#a16207", "#0891b2", "#9d174d")
WIDTH, HEIGHT, LEFT, BOTTOM = 460, 300, 44, 40

Results = Mapping[str, Mapping[str, Sequence[Outcome]]]


def write_plot(path: Path, results: Results, num_steps: int) -> None:
    """One row for each setting: accuracy against the steps allowed, and against the tokens that were prefilled."""
    parts = ["<!doctype html><meta charset='utf-8'><title>Context management at equal budgets</title>", STYLE]
    parts.append("<h1>Context management at equal budgets</h1>")
    names = list(dict.fromkeys(name for each in results.values() for name in each))
    parts.append("<p>" + " ".join(f"<b style='color:{_colour(names, name)}'>■ {name}</b>" for name in names) + "</p>")
    for title, found in results.items():
        parts.append(f"<h2>{html.escape(title)}</h2>")
        parts.append(_curves(names, found, num_steps))
        parts.append(_points(names, found))
    parts.append(NOTES)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(parts), encoding="utf-8")


STYLE = """<style>
body { font: 15px system-ui, sans-serif; max-width: 1000px; margin: 2rem auto; color: #111; }
svg { width: 48%; } text { font: 11px system-ui, sans-serif; fill: #444; } h2 { font-size: 1.1rem; margin: 1.5rem 0 0; }
</style>"""

NOTES = """<p>Left: share of tasks solved where only so many steps are allowed; every model call is one, summaries and
all runs of a parallel strategy included. Bands and bars: 95 % intervals over tasks. Right: the same at the full
budget, against the prompt tokens of a task; filled with a prefix cache, hollow without one.</p>"""


def _curves(
    names: Sequence[str],
    found: Mapping[str, Sequence[Outcome]],
    num_steps: int,
) -> str:
    xs = sorted({round(num_steps * share / 60) for share in range(61)})
    shapes = _axes("steps allowed", [(x, f"{x:.0f}") for x in _ticks(num_steps)], lambda x: _x(x / num_steps))
    for name, outcomes in found.items():
        estimates = [_interval([solved_within(each, x) for each in outcomes]) for x in xs]
        line = " ".join(
            f"{_x(x / num_steps):.1f},{_y(mean):.1f}" for x, (_, mean, _) in zip(xs, estimates, strict=True)
        )
        upper = [f"{_x(x / num_steps):.1f},{_y(high):.1f}" for x, (_, _, high) in zip(xs, estimates, strict=True)]
        lower = [f"{_x(x / num_steps):.1f},{_y(low):.1f}" for x, (low, _, _) in zip(xs, estimates, strict=True)]
        colour = _colour(names, name)
        shapes.append(f"<polygon points='{' '.join(upper + lower[::-1])}' fill='{colour}' opacity='0.1'/>")
        shapes.append(f"<polyline points='{line}' fill='none' stroke='{colour}' stroke-width='2'/>")
    return _svg(shapes)


def _points(names: Sequence[str], found: Mapping[str, Sequence[Outcome]]) -> str:
    values = {
        name: [fmean(getattr(e.spent, field) for e in each) for field in ("num_prefilled_cached", "num_prefilled")]
        for name, each in found.items()
    }
    low = math.floor(math.log10(max(1.0, min(min(pair) for pair in values.values()))))
    high = max(low + 1, math.ceil(math.log10(max(max(pair) for pair in values.values()))))

    def place(tokens: float) -> float:
        return _x((math.log10(max(tokens, 1.0)) - low) / (high - low))

    ticks = [(10.0**power, f"{10**power:,}") for power in range(low, high + 1)]
    shapes = _axes("prefilled tokens a task", ticks, place)
    for name, each in found.items():
        least, mean, most = _interval([one.solved for one in each])
        colour = _colour(names, name)
        for tokens, fill in zip(values[name], (colour, "white"), strict=True):
            x = place(tokens)
            bar = f"<line x1='{x:.1f}' x2='{x:.1f}' y1='{_y(least):.1f}' y2='{_y(most):.1f}' stroke='{colour}'/>"
            dot = f"<circle cx='{x:.1f}' cy='{_y(mean):.1f}' r='5' fill='{fill}' stroke='{colour}' stroke-width='2'>"
            shapes.append(f"{bar}{dot}<title>{name}: {mean:.3f} at {tokens:,.0f}</title></circle>")
    return _svg(shapes)


def _interval(solved: Sequence[bool]) -> tuple[float, float, float]:
    estimate = mean_at_k({str(index): [float(each)] for index, each in enumerate(solved)})
    interval = estimate.over_problems
    return (interval.low, estimate.mean, interval.high) if interval else (estimate.mean,) * 3


def _axes(label: str, ticks: Sequence[tuple[float, str]], place: Callable[[float], float]) -> list[str]:
    shapes = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = _y(share)
        shapes.append(f"<line x1='{LEFT}' x2='{WIDTH - 10}' y1='{y:.1f}' y2='{y:.1f}' stroke='#ddd'/>")
        shapes.append(f"<text x='{LEFT - 6}' y='{y + 4:.1f}' text-anchor='end'>{share:.2f}</text>")
    for value, text in ticks:
        shapes.append(f"<text x='{place(value):.1f}' y='{HEIGHT - BOTTOM + 16}' text-anchor='middle'>{text}</text>")
    shapes.append(f"<text x='{WIDTH / 2}' y='{HEIGHT - 6}' text-anchor='middle'>{label}</text>")
    return shapes


def _ticks(most: int) -> list[float]:
    return [most * share / 4 for share in range(5)]


def _svg(shapes: Sequence[str]) -> str:
    return f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' role='img'>{''.join(shapes)}</svg>"


def _x(share: float) -> float:
    return LEFT + share * (WIDTH - LEFT - 34)


def _y(share: float) -> float:
    return 12 + (1.0 - share) * (HEIGHT - BOTTOM - 12)


def _colour(names: Sequence[str], name: str) -> str:
    return COLOURS[names.index(name) % len(COLOURS)]
