"""Every data set that is accepted: its own answer scores 1, also from the stored payload, and junk does not."""

from __future__ import annotations

import re
import time

import pytest
from reasoning_gym.factory import DATASETS

from rorqual.envs.dialogue import REFUSED, ReasoningGymTasks
from rorqual.records import Task, from_json, to_json
from rorqual.rewards.reference import GUARDS, is_admissible, reference_score

JUNK = ("", " ", "junk text", "@@@", "[", "[[1]]", '{"a": 1}', "1e999", "1e999999999", "9" * 5000, "1/0", "nan", "٣")


@pytest.mark.parametrize("name", sorted(DATASETS.keys() - REFUSED.keys()))
def test_the_reference_scores_one_and_junk_less(name: str) -> None:
    task = ReasoningGymTasks(name).task("train", 0)
    stored = from_json(to_json(task), Task)
    assert stored == task
    reference = stored.payload["entry"]["answer"]
    assert reference_score(task.payload, reference) == reference_score(stored.payload, reference) == 1.0
    numberless = [re.sub(r"\d+(\.\d+)?", word, reference) for word in ("nan", "inf", "-nan")]
    started = time.monotonic()
    for junk in (*JUNK, *numberless):
        assert junk == reference or reference_score(stored.payload, junk) < 1.0, junk
    assert time.monotonic() - started < 5.0, "an answer must not be able to hang the scorer"


def test_every_guarded_data_set_exists() -> None:
    assert DATASETS.keys() >= GUARDS.keys()
    assert GUARDS.keys().isdisjoint(REFUSED)


@pytest.mark.parametrize("name", sorted(GUARDS.keys() - {"puzzle24"}))
def test_guards_let_every_reference_through(name: str) -> None:
    tasks = ReasoningGymTasks(name)
    answers = [tasks.task("train", index).payload["entry"]["answer"] for index in range(20)]
    assert [answer for answer in answers if not is_admissible(name, answer)] == []


@pytest.mark.parametrize("name", sorted(GUARDS))
@pytest.mark.parametrize(
    "attack", ["__import__('os').getpid()", "().__class__", "open('f')", "exec('x')", "A.b", "1_0", "[x for x in y]"]
)
def test_no_code_reaches_a_scorer_that_evaluates(name: str, attack: str) -> None:
    assert not is_admissible(name, attack)


@pytest.mark.parametrize("answer", ["9**9**9", "(9**99)**99**99", "((x**9)**9)**9", "2**100", "x**(1000)", "x" * 400])
def test_no_expression_that_explodes_reaches_sympy(answer: str) -> None:
    assert not is_admissible("simple_integration", answer)
    assert not is_admissible("countdown", answer)


def test_honest_expressions_do() -> None:
    assert is_admissible("simple_integration", "x**4/4 - 3*sin(2*x)/2 + 0.5*exp(-x)*(x + 1)**2 + C")
    assert is_admissible("countdown", "(100 - 4) * 7 / 2")


def test_scoring_from_a_list_and_from_a_tuple_is_the_same() -> None:
    task = ReasoningGymTasks("rearc").task("train", 1)
    wrong = "1 2\n3 4"
    assert reference_score(task.payload, wrong) < 1.0
    assert reference_score(task.payload, task.payload["entry"]["answer"]) == 1.0


def test_options_reach_the_scorer() -> None:
    entry = {"question": "", "answer": "1.0000", "metadata": {}}

    def scored(places: int) -> float:
        options = {"min_num_decimal_places": places, "max_num_decimal_places": places, "precision": 9}
        return reference_score({"dataset": "decimal_arithmetic", "options": options, "entry": entry}, "1.0004")

    assert scored(2) == 1.0
    assert scored(6) < 1.0


def test_a_foreign_payload_is_named() -> None:
    with pytest.raises(ValueError, match=r"no \['dataset', 'entry'\]"):
        reference_score({}, "7")
