"""Every solver against the library's own scorer: right without slips, wrong when a slip runs on to the answer."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
import reasoning_gym

from rorqual.synth.solvers import SOLVERS, restate, solve, wrong_answers

OPTIONS: dict[str, dict[str, Any]] = {
    "chain_sum": {"min_terms": 1, "max_terms": 6, "max_digits": 3, "allow_negation": True},
    "basic_arithmetic": {"max_digits": 2, "operators": ["+", "-"], "allow_parentheses": False},
    "leg_counting": {"min_animals": 1, "max_animals": 5},
    "products": {"min_terms": 1, "max_terms": 3, "max_digits": 3, "allow_negation": True},
    "count_bits": {"max_n": 100_000},
    "gcd": {"max_numbers": 4},
    "letter_counting": {"min_words": 1, "max_words": 6},
    "spell_backward": {},
    "number_sorting": {"min_numbers": 2, "max_numbers": 6},
}
NUM_ITEMS = 300


def make(dataset: str) -> Any:
    return reasoning_gym.create_dataset(dataset, seed=7, size=NUM_ITEMS, **OPTIONS.get(dataset, {}))


def test_the_options_cover_every_solver() -> None:
    assert set(OPTIONS) == set(SOLVERS)


def test_an_expression_that_is_no_plain_sum_is_restated() -> None:
    items = reasoning_gym.create_dataset("basic_arithmetic", seed=7, size=NUM_ITEMS)
    kinds = set()
    for entry in items:
        worked = solve("basic_arithmetic", entry, Random(0))
        assert items.score_answer(worked.answer, entry) == 1.0
        kinds.add(worked.text.startswith("\n"))
    assert kinds == {True, False}


@pytest.mark.parametrize("dataset", SOLVERS)
def test_a_solution_without_slips_is_right_and_never_reads_the_gold_answer(dataset: str) -> None:
    items = make(dataset)
    for entry in items:
        blind = {key: value for key, value in entry.items() if key != "answer"}
        worked = solve(dataset, blind, Random(0))
        assert items.score_answer(worked.answer, entry) == 1.0, entry["question"]
        assert all(step.slip is None for step in worked.steps)


@pytest.mark.parametrize("dataset", SOLVERS)
def test_a_corrected_slip_anywhere_leaves_the_answer_right(dataset: str) -> None:
    items = make(dataset)
    for number, entry in enumerate(items):
        num_steps = len(solve(dataset, entry, Random(0)).steps)
        if num_steps == 0:
            continue
        worked = solve(dataset, entry, Random(number), {number % num_steps: "corrected"})
        assert items.score_answer(worked.answer, entry) == 1.0
        assert len(worked.steps) == num_steps


@pytest.mark.parametrize(
    "dataset", ["chain_sum", "basic_arithmetic", "leg_counting", "letter_counting", "spell_backward"]
)
def test_a_kept_slip_in_the_first_step_always_reaches_the_answer(dataset: str) -> None:
    items = make(dataset)
    num_slips = 0
    for entry in items:
        worked = solve(dataset, entry, Random(1), {0: "kept"})
        if any(step.slip == "kept" for step in worked.steps):
            num_slips += 1
            assert items.score_answer(worked.answer, entry) < 1.0, (entry["question"], worked)
    assert num_slips > NUM_ITEMS // 2


@pytest.mark.parametrize("dataset", ["products", "count_bits", "gcd", "number_sorting"])
def test_a_kept_slip_usually_makes_the_answer_wrong(dataset: str) -> None:
    items = make(dataset)
    slipped = [(entry, solve(dataset, entry, Random(1), {1: "kept"})) for entry in items]
    scores = [
        items.score_answer(worked.answer, entry)
        for entry, worked in slipped
        if any(step.slip == "kept" for step in worked.steps)
    ]
    assert len(scores) > NUM_ITEMS // 2
    assert sum(score < 1.0 for score in scores) > 0.4 * len(scores)


def test_a_wrong_state_is_what_the_next_step_goes_on_from() -> None:
    entry = {"metadata": {"expression": "4 - 1 - 7"}}
    assert solve("chain_sum", entry, Random(0)).text == " 04 - 1 = 03 - 7 = -04"
    slipped = solve("chain_sum", entry, Random(0), {1: "kept"})
    wrong = int(slipped.text.split()[4])
    assert wrong != 3
    assert int(slipped.text.split()[-1]) == wrong - 7 == int(slipped.answer)


def test_worked_examples_of_the_other_layouts() -> None:
    animals = {"metadata": {"animals": {"spider": 3, "chicken": 4}}}
    assert solve("leg_counting", animals, Random(0)).text == " 3 spiders = 24 + 00 = 24 4 chickens = 08 + 24 = 32"
    assert (
        solve("gcd", {"metadata": {"numbers": [46, 78]}}, Random(0)).text
        == "\n78 % 46 = 32\n46 % 32 = 14\n32 % 14 = 4\n14 % 4 = 2\n4 % 2 = 0"
    )
    assert (
        solve("products", {"metadata": {"expression": "27 * 43"}}, Random(0)).text
        == "\n27 * 40 = 1080\n27 * 3 = 81\n1080 + 81 = 1161"
    )
    assert solve("spell_backward", {"metadata": {"word": "sun"}}, Random(0)).text == "\ns u n\nback n u s"


@pytest.mark.parametrize("dataset", ["lcm", "caesar_cipher", "fraction_simplification", "syllogism", "rotate_matrix"])
def test_a_data_set_without_a_solver_is_restated(dataset: str) -> None:
    items = make(dataset)
    assert dataset not in SOLVERS
    for entry in (items[index] for index in range(20)):
        worked = solve(dataset, entry, Random(0))
        assert worked == solve(dataset, entry, Random(0))
        assert worked.answer == entry["answer"]
        assert worked.text.endswith(f"answer {entry['answer']}")
        assert items.score_answer(worked.answer, entry) == 1.0
    assert restate.__doc__ is not None


@pytest.mark.parametrize("gold", ["7", "-12", "0", "sun", "aaa", "x", "", "3/4", "['1', '2']"])
def test_wrong_answers_differ_from_the_gold_answer(gold: str) -> None:
    wrong = wrong_answers(gold)
    assert wrong
    assert gold not in wrong
