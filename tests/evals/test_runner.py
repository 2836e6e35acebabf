"""Evaluation: every sample is kept, an interrupted one goes on, and missing samples are loud."""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from rorqual.envs.dialogue import DialogueEnvironment
from rorqual.evals.benchmarks import BENCHMARKS, Benchmark, benchmark, load_tasks
from rorqual.evals.runner import PROTOCOLS, R1_PROTOCOL, EvalSummary, Player, Protocol, evaluate, metric_values
from rorqual.records import Completion, Evidence, GenerateRequest, KeptTokens, Record, SamplingParams
from rorqual.rewards.rules import load_rewards, score
from rorqual.store.files import StoreError
from rorqual.store.run import Run
from rorqual.text.encoding import Encoding
from rorqual.text.tokenizer import train_tokenizer


class Settings(Record):
    seed: int = 0


class Answerer:
    """An engine that writes one of four responses, by the seed of the request; two requests end at each step."""

    RESPONSES = (
        "<think>a</think><answer>7</answer>",
        "<think>wait a</think><answer>8</answer>",
        "no idea",
        "<think>on and on",
    )

    def __init__(self, encoding: Encoding, weight_version: int = 3, context_window: int = 512) -> None:
        self.weight_version = weight_version
        self.context_window = context_window
        self.num_drawn = 0
        self._texts = [encoding.tokenizer.encode(text, allow_special=True) for text in self.RESPONSES]
        self._flight: list[GenerateRequest] = []

    @property
    def num_unfinished(self) -> int:
        return len(self._flight)

    def submit(self, requests: Sequence[GenerateRequest]) -> None:
        self._flight += requests

    def step(self) -> list[Completion]:
        ended, self._flight = self._flight[:2], self._flight[2:]
        return [self._complete(request) for request in ended]

    def _complete(self, request: GenerateRequest) -> Completion:
        self.num_drawn += 1
        choice = request.params.seed % 4
        ids = self._texts[choice] + array("i", [] if choice == 3 else [request.params.stop_token_ids[0]])
        zeros = array("f", [0.0] * len(ids))
        return Completion(
            request_id=request.request_id,
            token_ids=ids,
            logprobs=zeros,
            entropies=zeros,
            kept_mass=zeros,
            finish_reason="length" if choice == 3 else "stop",
            weight_version=self.weight_version,
            kept=KeptTokens(offsets=array("q", range(len(ids) + 1)), ids=ids),
        )

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@pytest.fixture(scope="module")
def encoding() -> Encoding:
    return Encoding(train_tokenizer(["What is 4 + 3? wait, that is all"] * 9, 300))


TASKS = load_tasks(Benchmark(dataset="chain_sum", options={"max_terms": 2, "max_digits": 1}, num_problems=6))
REWARDS = load_rewards(BENCHMARKS["chain_sum"].rewards)
PROTOCOL = Protocol(name="test", num_samples=5, sampling=SamplingParams(max_new_tokens=64), pass_at=(1, 2, 64))


def player(encoding: Encoding, **options: Any) -> Player:
    return Player("base", Answerer(encoding, **options), {"dialogue": DialogueEnvironment()}, encoding, REWARDS)


def open_run(path: Path) -> Run:
    return Run.open(path, Settings(), {})


def test_summary_agrees_with_the_stored_samples(tmp_path: Path, encoding: Encoding) -> None:
    seen = []
    with open_run(tmp_path / "run") as run:
        tell = lambda done, wanted: seen.append((done, wanted))  # noqa: E731
        summary = evaluate(run, "base", TASKS, player(encoding), PROTOCOL, on_sample=tell)
        rows = run.read_eval("base")
        assert msgspec.convert(run.eval_summaries()["base"], EvalSummary) == summary
    assert seen == [(done, 30) for done in range(1, 31)]
    assert [row.trajectory.task_id for row in rows] == [task.task_id for task in TASKS for _ in range(5)]
    assert (summary.samples_requested, summary.samples_obtained, summary.missing) == (30, 30, {})
    texts = [row.trajectory.evidence.response for row in rows]
    assert len(set(texts)) == 4
    assert summary.truncation_rate == pytest.approx(sum("on and on" in text for text in texts) / 30)
    assert summary.parse_failure_rate == pytest.approx(sum("<answer>" not in text for text in texts) / 30)
    assert summary.well_formed_rate == pytest.approx(1.0 - summary.parse_failure_rate)
    assert summary.corrects_itself_rate == pytest.approx(sum("wait" in text for text in texts) / 30)
    answers = {task.task_id: task.payload["entry"]["answer"] for task in TASKS}
    correct = [row.trajectory.evidence.answer == answers[row.trajectory.task_id] for row in rows]
    assert summary.mean == pytest.approx(sum(correct) / 30)
    assert summary.pass_at.keys() == {"1", "2"}
    assert summary.pass_at["1"] == pytest.approx(summary.mean)


def test_interrupted_evaluation_goes_on_sample_by_sample(tmp_path: Path, encoding: Encoding) -> None:
    with open_run(tmp_path / "whole") as run:
        expected = evaluate(run, "base", TASKS, player(encoding), PROTOCOL)
        expected_rows = run.read_eval("base")

    def stop_at_eleven(done: int, wanted: int) -> None:
        if done == 11:
            raise KeyboardInterrupt

    with open_run(tmp_path / "cut") as run, pytest.raises(KeyboardInterrupt):
        evaluate(run, "base", TASKS, player(encoding), PROTOCOL, on_sample=stop_at_eleven)
    second = player(encoding)
    with open_run(tmp_path / "cut") as run:
        assert len(run.read_eval("base")) == 11
        assert evaluate(run, "base", TASKS, second, PROTOCOL) == expected
        assert run.read_eval("base") == expected_rows
        assert evaluate(run, "base", TASKS, second, PROTOCOL) == expected
    assert second.engine.num_drawn == 19


def test_samples_of_something_else_are_not_mixed_in(tmp_path: Path, encoding: Encoding) -> None:
    with open_run(tmp_path / "run") as run:
        evaluate(run, "base", TASKS, player(encoding), PROTOCOL)
        with pytest.raises(StoreError, match=r"weight_version: 3 then, 4 now"):
            evaluate(run, "base", TASKS, player(encoding, weight_version=4), PROTOCOL)
        other = dataclasses.replace(player(encoding), fingerprint="b")
        with pytest.raises(StoreError, match=r"weights_sha256: '' then, 'b' now"):
            evaluate(run, "base", TASKS, other, PROTOCOL)
        with pytest.raises(StoreError, match=r"num_tasks: 6 then, 5 now"):
            evaluate(run, "base", TASKS[:5], player(encoding), PROTOCOL)
        hotter = msgspec.structs.replace(PROTOCOL, sampling=SamplingParams(temperature=2.0, max_new_tokens=64))
        with pytest.raises(StoreError, match=r"protocol\.sampling\.temperature: 1\.0 then, 2\.0 now"):
            evaluate(run, "base", TASKS, player(encoding), hotter)


def test_missing_samples_are_loud_and_not_counted_as_wrong(tmp_path: Path, encoding: Encoding) -> None:
    class Flaky(DialogueEnvironment):
        def evidence(self, task, messages, segments, end):
            if task.task_id == TASKS[0].task_id and "wait" not in str(messages):
                raise ConnectionError("gone")
            return super().evidence(task, messages, segments, end)

    def picky(task, evidence):
        if task.task_id == TASKS[1].task_id:
            raise KeyError("no answer")
        return 1.0

    rewards = {"accuracy": (picky, 1.0)}
    flaky = Player("base", Answerer(encoding), {"dialogue": Flaky()}, encoding, rewards)
    told = r"of 30 samples were obtained.* The first, of chain_sum/test/\d+: ConnectionError: gone"
    with open_run(tmp_path / "run") as run, pytest.warns(UserWarning, match=told):
        summary = evaluate(run, "base", TASKS, flaky, PROTOCOL)
        rows = run.read_eval("base")
    failed = sum(row.trajectory.end == "environment_failed" for row in rows)
    assert failed > 0
    assert summary.missing == {"environment_failed": failed, "reward_failed: accuracy": 5}
    assert summary.samples_obtained == 25 - failed
    assert summary.mean == 1.0
    assert sum(len(samples) for samples in metric_values(rows, "accuracy").values()) == 25 - failed


@pytest.mark.parametrize("share_failed", ["some", "all"])
def test_a_repaired_reward_judges_what_is_stored(tmp_path: Path, encoding: Encoding, share_failed: str) -> None:
    first = {task.task_id for task in (TASKS[:2] if share_failed == "some" else TASKS)}

    def broken(task, evidence):
        if task.task_id in first:
            raise ZeroDivisionError("by nothing")
        return REWARDS["accuracy"][0](task, evidence)

    with open_run(tmp_path / "whole") as run:
        expected = evaluate(run, "base", TASKS, player(encoding), PROTOCOL)
        expected_rows = run.read_eval("base")
    hurt = dataclasses.replace(player(encoding), rewards={**REWARDS, "accuracy": (broken, 1.0)})
    told = r"The first, of chain_sum/test/\d+: accuracy: ZeroDivisionError: by nothing"
    with open_run(tmp_path / "run") as run:
        if share_failed == "all":
            with pytest.raises(ValueError, match=told):
                evaluate(run, "base", TASKS, hurt, PROTOCOL)
        else:
            with pytest.warns(UserWarning, match=told):
                assert evaluate(run, "base", TASKS, hurt, PROTOCOL).samples_obtained == 20
        again = player(encoding)
        assert evaluate(run, "base", TASKS, again, PROTOCOL) == expected
        assert again.engine.num_drawn == 0
        assert run.read_eval("base") == expected_rows
        assert msgspec.convert(run.eval_summaries()["base"], EvalSummary) == expected


def test_bad_requests_are_refused(tmp_path: Path, encoding: Encoding) -> None:
    with open_run(tmp_path / "run") as run:
        with pytest.raises(ValueError, match="no tasks"):
            evaluate(run, "base", [], player(encoding), PROTOCOL)
        with pytest.raises(ValueError, match="given twice"):
            evaluate(run, "base", [TASKS[0], TASKS[0]], player(encoding), PROTOCOL)
        with pytest.raises(ValueError, match="none of its 30 samples: .* the prompt of turn 0 has"):
            evaluate(run, "base", TASKS, player(encoding, context_window=1), PROTOCOL)
        lost = msgspec.structs.replace(PROTOCOL, metric="elegance")
        with pytest.raises(ValueError, match="there is no 'elegance'"):
            evaluate(run, "other", TASKS, player(encoding), lost)


def test_presets_hold_the_published_settings() -> None:
    sampling = R1_PROTOCOL.sampling
    assert (R1_PROTOCOL.num_samples, sampling.temperature, sampling.top_p) == (64, 0.6, 0.95)
    assert sampling.max_new_tokens == 32768
    v32 = PROTOCOLS["v32"]
    assert (v32.sampling.temperature, v32.sampling.top_p, v32.context_window) == (1.0, 1.0, 131072)
    assert (PROTOCOLS["greedy"].num_samples, PROTOCOLS["greedy"].sampling.temperature) == (1, 0.0)


def test_benchmark_questions_are_distinct_and_held_out() -> None:
    tasks = load_tasks(Benchmark(dataset="gcd", num_problems=30))
    questions = [task.messages[-1].content for task in tasks]
    assert len(set(questions)) == 30
    again = load_tasks(Benchmark(dataset="gcd", num_problems=30), exclude_questions=questions[:10])
    assert set(questions[:10]).isdisjoint(task.messages[-1].content for task in again)
    assert benchmark("zebra_puzzles") == Benchmark(dataset="zebra_puzzles")
    tiny = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    with pytest.raises(ValueError, match="chain_sum .*distinct held-out problems .* where 200 were wanted"):
        load_tasks(Benchmark(dataset="chain_sum", options=tiny, num_problems=200))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_scores_a_right_and_a_wrong_answer(name: str) -> None:
    for task in load_tasks(msgspec.structs.replace(BENCHMARKS[name], num_problems=3)):
        right = Evidence(response="", thinking=None, answer="", num_sampled_tokens=1, end="stop")
        right = msgspec.structs.replace(right, answer=str(task.payload["entry"]["answer"]))
        wrong = msgspec.structs.replace(right, answer="nothing of the kind")
        assert score(task, right, REWARDS).parts["accuracy"] == 1.0
        assert score(task, wrong, REWARDS).parts["accuracy"] == 0.0
