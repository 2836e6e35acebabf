"""Solvers that work reasoning-gym entries out step by step, in a layout that a tiny transformer can learn.

Each step is local: one operation, written as the question writes it (the same tokens can then be copied), and the new
state at once after it. Numbers of one solution have one width where that is cheap, so that what a step needs stands at
the same distance from it every time. The last step holds the answer.

A solver takes a reasoning-gym entry (`question`, `answer`, `metadata`) and a Scratchpad, writes its steps on the pad
and returns the answer in the data set's own format. It reads the problem, never the gold answer; only `restate` does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random
from typing import Any

from reasoning_gym.arithmetic.leg_counting import ANIMALS

from rorqual.synth.scratchpad import Scratchpad, Slip, Worked, near_numbers, padded

Entry = Mapping[str, Any]
Solver = Callable[[Entry, Scratchpad], str]


def solve(dataset: str, entry: Entry, rng: Random, slips: Mapping[int, Slip] | None = None) -> Worked:
    """Work one entry out with the data set's solver, else with `restate`; `slips` are planted by step number."""
    pad = Scratchpad(rng, slips)
    answer = SOLVERS.get(dataset, restate)(entry, pad)
    return Worked(steps=tuple(pad.steps), answer=answer)


def chain_sum(entry: Entry, pad: Scratchpad) -> str:
    """Running total, term by term, in one chain: ` 04 - 1 = 03 - 7 = -04`."""
    return _running_total(str(entry["metadata"]["expression"]).split(), pad)


def basic_arithmetic(entry: Entry, pad: Scratchpad) -> str:
    """As `chain_sum` for sums and differences of plain numbers; other expressions are restated.

    Options that give such sums: `operators = ["+", "-"]`, `allow_parentheses = false`, `allow_negation = false`.
    """
    tokens = str(entry["metadata"]["expression"]).split()
    flat = all(term.isdigit() for term in tokens[::2]) and set(tokens[1::2]) <= {"+", "-"}
    return _running_total(tokens, pad) if flat else restate(entry, pad)


def _running_total(tokens: list[str], pad: Scratchpad) -> str:
    width = max(2, len(str(sum(abs(int(term)) for term in tokens[::2]))))
    total = pad.number(" ", int(tokens[0]), width=width)
    for operator, term in zip(tokens[1::2], tokens[2::2], strict=True):
        change = int(term) if operator == "+" else -int(term)
        total = pad.number(f" {operator} {term} = ", total + change, width=width)
    return str(total)


def leg_counting(entry: Entry, pad: Scratchpad) -> str:
    """Legs of each kind of animal as the question names it, then the running total: ` 3 spiders = 24 + 00 = 24`."""
    total = 0
    for animal, count in entry["metadata"]["animals"].items():
        kind = f"{animal}{'s' if count > 1 else ''}"
        legs = pad.number(f" {count} {kind} = ", count * ANIMALS[animal], minimum=0, width=2)
        total = pad.number(f" + {padded(total, 2)} = ", total + legs, minimum=0, width=2)
    return str(total)


def products(entry: Entry, pad: Scratchpad) -> str:
    """Long multiplication: one partial product for each digit of the next factor, added up as they come."""
    first, *rest = (int(factor) for factor in str(entry["metadata"]["expression"]).split(" * "))
    product = first
    for factor in rest:
        sign = -1 if factor < 0 else 1
        digits = str(abs(factor))
        total: int | None = None
        for position, digit in enumerate(digits):
            part = sign * int(digit) * 10 ** (len(digits) - 1 - position)
            partial = pad.number(f"\n{product} * {part} = ", product * part)
            total = partial if total is None else pad.number(f"\n{total} + {partial} = ", total + partial)
        product = partial if total is None else total
    return str(product)


def count_bits(entry: Entry, pad: Scratchpad) -> str:
    """Halve until nothing is left, counting the odd numbers: `13 odd 1 half 6`, then `6 even 1 half 3`."""
    number, count = int(entry["metadata"]["number"]), 0
    while number:
        count += number % 2
        parity = "odd" if number % 2 else "even"
        halves = [value for value in near_numbers(number // 2, minimum=0) if value < number]
        number = pad.choice(f"\n{number} {parity} {count} half ", number // 2, halves)
    return str(count)


def gcd(entry: Entry, pad: Scratchpad) -> str:
    """Euclid's algorithm: `78 % 46 = 32`, then `46 % 32 = 14`; several numbers are folded from the left."""
    numbers = [int(number) for number in entry["metadata"]["numbers"]]
    divisor = numbers[0]
    for number in numbers[1:]:
        larger, smaller = max(divisor, number), min(divisor, number)
        while smaller:
            remainders = [value for value in near_numbers(larger % smaller, minimum=0) if value < smaller]
            remainder = pad.choice(f"\n{larger} % {smaller} = ", larger % smaller, remainders)
            larger, smaller = smaller, remainder
        divisor = larger
    return str(divisor)


def letter_counting(entry: Entry, pad: Scratchpad) -> str:
    """Word by word, with the running count: `hundred 1 total 1`."""
    letter, total = str(entry["metadata"]["target_letter"]), 0
    for word in entry["metadata"]["span"]:
        count = str(word).lower().count(letter)
        total = pad.number(f"\n{word} {count} total ", total + count, minimum=0)
    return str(total)


def spell_backward(entry: Entry, pad: Scratchpad) -> str:
    """Spell the word, then read the letters from the back: `s u n`, `back n u s`."""
    letters = " ".join(str(entry["metadata"]["word"]))
    spelled = pad.choice("\n", letters, _misspellings(letters))
    backward = " ".join(reversed(spelled.split(" ")))
    return pad.choice("\nback ", backward, _misspellings(backward)).replace(" ", "")


def number_sorting(entry: Entry, pad: Scratchpad) -> str:
    """Take the next number again and again from those that are left: `next -4 of 7 -4 3`."""
    metadata = entry["metadata"]
    left = [str(number) for number in metadata["original_numbers"]]
    pick = max if metadata["direction"] == "descending" else min
    ordered: list[str] = []
    while left:
        ordered.append(pad.choice(f"\nof {' '.join(left)} next ", pick(left, key=float), left))
        left.remove(ordered[-1])
    return str(ordered)


def restate(entry: Entry, pad: Scratchpad) -> str:
    """For data sets without a solver: the last line of the question, then the gold answer, with no reasoning between.

    It teaches the form of a reasoned answer and nothing else: RL on such a data set starts from a base without skill.
    """
    last_line = str(entry["question"]).strip().splitlines()[-1]
    gold = str(entry["answer"])
    return pad.choice(f"\n{last_line}\nanswer ", gold, wrong_answers(gold))


def wrong_answers(gold: str) -> list[str]:
    """Plausible wrong answers: numbers near an integer; else the text with neighbours swapped, or its end cut off."""
    try:
        return [str(value) for value in near_numbers(int(gold))]
    except ValueError:
        wrong = [value for value in _swaps(list(gold), "") if value != gold]
        return wrong or [gold[:-1] or "nothing"]


def _misspellings(letters: str) -> list[str]:
    """The space-separated letters with two neighbours swapped, or with one left out."""
    items = letters.split(" ")
    dropped = [" ".join(items[:index] + items[index + 1 :]) for index in range(len(items))] if len(items) > 1 else []
    return _swaps(items, " ") + dropped


def _swaps(items: list[str], separator: str) -> list[str]:
    swapped = []
    for index in range(len(items) - 1):
        pair = [items[index + 1], items[index]]
        swapped.append(separator.join(items[:index] + pair + items[index + 2 :]))
    return swapped


SOLVERS: dict[str, Solver] = {
    "chain_sum": chain_sum,
    "basic_arithmetic": basic_arithmetic,
    "leg_counting": leg_counting,
    "products": products,
    "count_bits": count_bits,
    "gcd": gcd,
    "letter_counting": letter_counting,
    "spell_backward": spell_backward,
    "number_sorting": number_sorting,
}
