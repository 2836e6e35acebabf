"""Tasks of the library: the same by name everywhere, splits that cannot meet, defective data sets refused."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
from reasoning_gym.factory import DATASETS

from rorqual.config import ConfigError, load_config
from rorqual.envs.dialogue import (
    CHUNK_SIZE,
    REFUSED,
    SPLITS,
    DialogueConfig,
    DialogueEnvironment,
    ReasoningGymConfig,
    ReasoningGymTasks,
    canonical_question,
    canonical_text,
    held_out,
    question_of,
    take_held_out,
)
from rorqual.records import Message, Record, Task, from_json, to_json

SUMS = ReasoningGymTasks("chain_sum", {"min_terms": 2, "max_terms": 2, "max_digits": 1})


def test_a_task_shows_the_question_and_carries_the_entry() -> None:
    task = ReasoningGymTasks("chain_sum").task("test", 5)
    entry = task.payload["entry"]
    assert task.messages == (Message(role="user", content=entry["question"]),)
    assert (task.task_id, task.environment, task.domain) == ("chain_sum/test/5", "dialogue", "mathematics")
    expression = entry["metadata"]["expression"]
    assert expression in entry["question"]
    assert sum(int(term) for term in expression.replace("- ", "-").replace("+ ", "").split()) == int(entry["answer"])


@pytest.mark.parametrize("name", ["chain_sum", "acre", "gsm_symbolic", "word_ladder", "leg_counting"])
def test_a_task_is_the_same_in_any_order_and_in_any_object(name: str) -> None:
    indices = [0, 3, CHUNK_SIZE - 1, CHUNK_SIZE, CHUNK_SIZE + 1]
    first, second = ReasoningGymTasks(name), ReasoningGymTasks(name)
    forward = [first.task("train", index) for index in indices]
    backward = [second.task("train", index) for index in reversed(indices)]
    assert to_json(forward) == to_json(backward[::-1])


def test_the_ranges_of_seeds_are_disjoint_and_wide() -> None:
    for one, other in itertools.combinations(SPLITS.values(), 2):
        assert max(one.start, other.start) >= min(one.stop, other.stop)
    assert all(seeds.start >= 0 and seeds.stop <= 2**32 for seeds in SPLITS.values())
    assert all(len(seeds) % CHUNK_SIZE == len(seeds) % 1000 for seeds in SPLITS.values())


@pytest.mark.parametrize("name", ["countdown", "leg_counting", "knights_knaves"])
def test_item_i_of_a_split_is_the_librarys_item_of_seed_start_plus_i(name: str) -> None:
    for split, seeds in SPLITS.items():
        for index in (0, 1, CHUNK_SIZE + 2):
            dataset, config = DATASETS[name]
            entry = dataset(config(seed=seeds.start + index, size=1))[0]
            assert question_of(ReasoningGymTasks(name).task(split, index)) == entry["question"]


def test_the_ends_of_a_split_are_its_ends() -> None:
    for split, seeds in SPLITS.items():
        assert SUMS.task(split, len(seeds) - 1).task_id == f"chain_sum/{split}/{len(seeds) - 1}"
        for index in (-1, len(seeds)):
            with pytest.raises(ValueError, match="outside split"):
                SUMS.task(split, index)
    with pytest.raises(ValueError, match="train, validation, test"):
        SUMS.task("dev", 0)


def test_held_out_drops_questions_that_were_trained_on_and_repeats() -> None:
    trained = {question_of(SUMS.task("train", index)) for index in range(60)}
    plain = [question_of(task) for task in itertools.islice(SUMS.tasks("test"), 60)]
    assert trained.intersection(plain), "one-digit sums must collide, or this test shows nothing"
    kept = [question_of(task) for task in held_out(itertools.islice(SUMS.tasks("test"), 60), trained)]
    assert trained.isdisjoint(kept)
    assert len(set(kept)) == len(kept)
    seen = {canonical_text(question) for question in trained}
    assert {canonical_text(question) for question in kept} == {canonical_text(text) for text in plain} - seen


def test_sums_of_the_same_terms_are_one_problem() -> None:
    asked = "State the final answer to the following arithmetic problem: {} ="
    same = ["4 + 3 - 5", "3 - 5 + 4", "4 - 5 + 3"]
    assert {canonical_text(asked.format(each)) for each in same} == {"-5 +3 +4"}
    assert {canonical_text(f"Calculate {each}.") for each in ["-5 + 4 - -3", *same]} == {"-5 +3 +4"}
    assert canonical_text(asked.format("4 - 0")) == canonical_text(asked.format("0 + 4"))
    assert canonical_text(asked.format("4 - 3")) != canonical_text(asked.format("3 - 4"))
    for other in ("Calculate 4 + 3 * 5.", "Calculate ( 4 + 3 ) - 5.", "Tom has 4 + 3 apples.", "-5 +3 +4"):
        assert canonical_text(other) == other


@pytest.mark.parametrize("options", [{}, {"allow_parentheses": False, "operators": ["+", "-"]}])
@pytest.mark.parametrize("name", ["chain_sum", "basic_arithmetic"])
def test_the_terms_of_a_canonical_sum_add_up_to_the_answer(name: str, options: dict[str, object]) -> None:
    num_sums = 0
    for task in itertools.islice(ReasoningGymTasks(name, options if name != "chain_sum" else {}).tasks("train"), 200):
        canonical = canonical_question(task)
        if canonical != question_of(task):
            num_sums += 1
            assert sum(int(term) for term in canonical.split()) == int(task.payload["entry"]["answer"])
    assert num_sums > (150 if name == "chain_sum" or options else 10)


def test_a_held_out_sum_is_new_whatever_the_order_of_its_terms() -> None:
    task = next(task for task in SUMS.tasks("test") if "4 + 1" in question_of(task))
    first, _, second = task.payload["entry"]["metadata"]["expression"].split()
    turned = question_of(task).replace(f"{first} + {second}", f"{second} + {first}")
    assert turned != question_of(task)
    assert list(held_out([task], [turned])) == []
    assert list(held_out([task], [])) == [task]


def test_a_small_question_space_is_an_error_and_no_endless_search() -> None:
    assert len(take_held_out(SUMS.tasks("test"), [], 20)) == 20
    with pytest.raises(
        ValueError, match=r"chain_sum with options .* distinct held-out problems among its first 21000 tasks where"
    ):
        take_held_out(SUMS.tasks("test"), [], 200)
    trained = [question_of(task) for task in itertools.islice(SUMS.tasks("train"), 3000)]
    with pytest.raises(ValueError, match="gave 0 distinct held-out"):
        take_held_out(SUMS.tasks("test"), trained, 1)


def test_tasks_begin_where_they_are_told() -> None:
    assert [task.task_id for task in itertools.islice(SUMS.tasks("train", 7), 2)] == [
        "chain_sum/train/7",
        "chain_sum/train/8",
    ]


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_defective_data_sets_are_refused_with_the_reason(name: str) -> None:
    with pytest.raises(ValueError, match="refused") as error:
        ReasoningGymTasks(name)
    assert REFUSED[name] in str(error.value)
    assert name in DATASETS, "a name that the library dropped should leave the list"


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="nearest: chain_sum"):
        ReasoningGymTasks("chainsum")


def test_bad_options_are_named() -> None:
    with pytest.raises(ValueError, match=r"'chain_sum' has no options max_term; it has .*max_terms, min_digits"):
        ReasoningGymTasks("chain_sum", {"max_term": 3})
    with pytest.raises(ValueError, match="refuses the options"):
        ReasoningGymTasks("chain_sum", {"min_terms": 9, "max_terms": 3})
    with pytest.raises(ValueError, match=r"\['seed'\].*set by the split"):
        ReasoningGymTasks("chain_sum", {"seed": 3})


def test_options_of_another_data_set_say_how_to_clear_them(tmp_path: Path) -> None:
    class Config(Record):
        tasks: tuple[ReasoningGymConfig, ...]

    file = tmp_path / "config.toml"
    file.write_text('[[tasks]]\nname = "chain_sum"\noptions = { min_terms = 2, max_terms = 3 }\n')
    other = ["tasks.0.name=gcd"]
    with pytest.raises(ConfigError, match=r'"tasks.0": .*no options min_terms, max_terms; .*min_value') as error:
        load_config(file, Config, other)
    (advice,) = re.findall(r"--set '(tasks.*?)'", str(error.value))
    cleared = load_config(file, Config, [*other, advice])
    whole = load_config(file, Config, ['tasks=[{name="gcd"}]'])
    assert cleared == whole == Config(tasks=(ReasoningGymConfig(name="gcd"),))
    assert ReasoningGymTasks.from_config(whole.tasks[0]).task("test", 0).payload["options"] == {}


@pytest.mark.parametrize(("name", "domain"), [("gcd", "mathematics"), ("bf", "programming"), ("maze", "logic")])
def test_the_domain_follows_the_category_unless_it_is_given(name: str, domain: str) -> None:
    assert ReasoningGymTasks(name).domain == domain
    config = ReasoningGymConfig(name=name, domain="puzzles")
    assert ReasoningGymTasks.from_config(config).task("train", 0).domain == "puzzles"


def test_options_reach_the_task_and_travel_with_it() -> None:
    task = SUMS.task("train", 0)
    assert task.payload["options"] == {"min_terms": 2, "max_terms": 2, "max_digits": 1}
    assert from_json(to_json(task), Task) == task


def test_the_environment_shows_the_question_and_ends_after_one_response() -> None:
    task = SUMS.task("train", 0)
    environment = DialogueEnvironment(DialogueConfig(system="Be brief.", suffix=" Think first."))
    shown = environment.start(task)
    assert shown == (
        Message(role="system", content="Be brief."),
        Message(role="user", content=question_of(task) + " Think first."),
    )
    assert DialogueEnvironment().start(task) == task.messages
    said = Message(role="assistant", thinking="4+3=7", content=" <answer>7</answer>")
    assert environment.respond(task, [*shown, said]) == ()
    evidence = environment.evidence(task, [*shown, said], [], "stop")
    assert (evidence.response, evidence.thinking, evidence.answer) == (
        "<think>4+3=7</think> <answer>7</answer>",
        "4+3=7",
        "7",
    )
    nothing = environment.evidence(task, shown, [], "prompt_too_long")
    assert (nothing.response, nothing.answer, nothing.end) == ("", None, "prompt_too_long")


def test_an_example_in_the_prompt_is_no_evidence() -> None:
    example = (Message(role="user", content="1 + 1 ="), Message(role="assistant", content="\\boxed{2}"))
    task = Task(task_id="t", environment="dialogue", domain="x", messages=(*example, Message(role="user", content="?")))
    environment = DialogueEnvironment()
    assert environment.evidence(task, environment.start(task), [], "prompt_too_long").answer is None


def test_a_task_without_a_question_is_refused() -> None:
    with pytest.raises(ValueError, match="does not end with a user message"):
        DialogueEnvironment().start(Task(task_id="t", environment="dialogue", domain="x", messages=()))
