"""An episode: its segment is exactly what was shown and drawn, and every way to end is a Trajectory."""

from __future__ import annotations

from array import array

import msgspec
import pytest

from rorqual.records import Completion, Message, SamplingParams, Trajectory
from rorqual.rollout.episode import EpisodeConfig, EpisodeKey, run_episode
from rorqual.text.encoding import Encoding, EncodingConfig
from tests.rollout.fakes import FakeEngine, Interviewer, make_task

KEY = EpisodeKey(run_seed=5, step=1, task_id="sum/train/1", sample_index=2)


def play(
    encoding: Encoding, environment: Interviewer, config: EpisodeConfig, said: list[str], question: str = "4 + 3 ="
) -> tuple[Trajectory, list[Completion]]:
    """The episode in which the policy says `said`, one text a turn, and the completions that it was sent."""
    end = encoding.tokenizer.special_id("eos")
    script = {KEY.request_id(turn): [*encoding.tokenizer.encode(text), end] for turn, text in enumerate(said)}
    engine = FakeEngine(encoding.tokenizer.vocab_size, script=script)
    episode = run_episode(make_task(question=question), KEY, environment, encoding, config)
    received: list[Completion] = []
    try:
        request = next(episode)
        while True:
            engine.submit([request])
            completions = engine.step()
            while not completions:
                completions = engine.step()
            received += completions
            request = episode.send(completions[0])
    except StopIteration as stop:
        return stop.value, received


def config(**changes: int) -> EpisodeConfig:
    settings = {"context_window": 200, "max_turns": 3} | changes
    return EpisodeConfig(sampling=SamplingParams(max_new_tokens=settings.pop("max_new_tokens", 40)), **settings)


def test_three_turns_make_one_growing_segment(encoding: Encoding) -> None:
    trajectory, received = play(encoding, Interviewer(2), config(), ["seven", "and", "done"])
    (segment,) = trajectory.segments
    shown = [
        encoding.prompt([Message(role="user", content="4 + 3 =")]),
        encoding.follow_up([Message(role="user", content="and 5?")], received[0].token_ids[-1]),
        encoding.follow_up([Message(role="user", content="and 3?")], received[1].token_ids[-1]),
    ]
    ids, sampled, logprobs, entropies = array("i"), array("b"), array("f"), array("f")
    for prompt, completion in zip(shown, received, strict=True):
        ids += prompt + completion.token_ids
        sampled.extend([0] * len(prompt) + [1] * len(completion.token_ids))
        logprobs += array("f", [0.0] * len(prompt)) + completion.logprobs
        entropies += array("f", [0.0] * len(prompt)) + completion.entropies
    assert (segment.token_ids, segment.sampled) == (ids, sampled)
    assert (segment.logprobs, segment.entropies) == (logprobs, entropies)
    assert trajectory.end == trajectory.evidence.end == "stop"
    assert [message.content for message in trajectory.messages[1::2]] == ["seven", "and", "done"]


def test_kept_sets_follow_the_sampled_tokens_and_routes_cover_all_but_the_last(encoding: Encoding) -> None:
    trajectory, received = play(encoding, Interviewer(1), config(), ["seven", "done"])
    (segment,) = trajectory.segments
    drawn = [token for token, flag in zip(segment.token_ids, segment.sampled, strict=True) if flag]
    assert segment.kept is not None
    assert len(segment.kept) == segment.num_sampled == len(drawn)
    bounds = zip(segment.kept.offsets, segment.kept.offsets[1:], strict=False)
    assert [list(segment.kept.ids[start:end]) for start, end in bounds] == [[token, token + 1] for token in drawn]
    assert segment.kept_mass == pytest.approx(0.9)
    assert segment.routes == received[-1].routes
    assert segment.routes is not None
    assert len(segment.routes) == len(segment.token_ids) - 1
    assert segment.weight_version == 3


def test_a_turn_limit_leaves_no_shown_token_after_the_last_drawn_one(encoding: Encoding) -> None:
    trajectory, _ = play(encoding, Interviewer(9), config(max_turns=2), ["a", "b"])
    assert trajectory.end == "turn_limit"
    assert trajectory.segments[0].sampled[-1] == 1
    assert trajectory.messages[-1].role == "user"


def test_a_completion_that_met_its_limit_ends_the_episode(encoding: Encoding) -> None:
    trajectory, received = play(encoding, Interviewer(9), config(max_new_tokens=2), ["a long answer"])
    assert trajectory.end == trajectory.evidence.end == "length"
    assert trajectory.segments[0].num_sampled == len(received[0].token_ids) == 2


def test_a_prompt_as_long_as_the_window_samples_nothing(encoding: Encoding) -> None:
    length = len(encoding.prompt(make_task().messages))
    trajectory, _ = play(encoding, Interviewer(), config(context_window=length), ["a"])
    assert (trajectory.end, trajectory.segments) == ("prompt_too_long", ())
    assert trajectory.error is not None
    assert str(length) in trajectory.error
    fits, _ = play(encoding, Interviewer(), config(context_window=length + 1), ["a"])
    assert (fits.end, fits.segments[0].num_sampled) == ("length", 1)


def test_a_later_turn_that_does_not_fit_ends_with_length(encoding: Encoding) -> None:
    window = len(encoding.prompt(make_task().messages)) + 3
    trajectory, _ = play(encoding, Interviewer(3), config(context_window=window), ["a"])
    assert trajectory.end == "length"
    assert trajectory.segments[0].num_sampled == 2


@pytest.mark.parametrize("place", ["start", "respond", "evidence"])
def test_a_failing_environment_is_reported_and_nothing_drawn_is_lost(encoding: Encoding, place: str) -> None:
    trajectory, _ = play(encoding, Interviewer(1, fail_at=place), config(), ["one", "two"])
    num_turns = {"start": 0, "respond": 1, "evidence": 2}[place]
    assert trajectory.end == trajectory.evidence.end == "environment_failed"
    assert trajectory.error == f"ConnectionError: no {place} today"
    assert sum(segment.num_sampled for segment in trajectory.segments) == trajectory.evidence.num_sampled_tokens
    assert [m.content for m in trajectory.messages if m.role == "assistant"] == ["one", "two"][:num_turns]


def test_messages_that_cannot_be_encoded_are_the_environments_fault(encoding: Encoding) -> None:
    task = msgspec.structs.replace(make_task(), messages=(Message(role="assistant", content="I begin"),))
    episode = run_episode(task, KEY, Interviewer(fail_at="evidence"), encoding, config())
    with pytest.raises(StopIteration) as stop:
        next(episode)
    assert stop.value.value.end == "environment_failed"
    assert "must end with a user message" in stop.value.value.error


def test_the_request_carries_seed_stop_tokens_and_what_room_is_left(encoding: Encoding) -> None:
    episode = run_episode(make_task(), KEY, Interviewer(), encoding, config(max_new_tokens=500))
    request = next(episode)
    assert request.request_id == "1/sum/train/1#2.0"
    assert request.params.max_new_tokens == 200 - len(request.prompt_ids)
    assert request.params.stop_token_ids == encoding.stop_token_ids
    assert request.params.seed == KEY.seed(0) == 5674661352877308762


def test_seeds_differ_in_every_part_of_the_key() -> None:
    keys = [KEY, *(msgspec.structs.replace(KEY, **{name: 9}) for name in ("run_seed", "step", "sample_index"))]
    keys.append(msgspec.structs.replace(KEY, task_id="sum/train/11"))
    seeds = [key.seed(turn) for key in keys for turn in range(3)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_broken_completion_is_an_error_not_a_trajectory(encoding: Encoding) -> None:
    episode = run_episode(make_task(), KEY, Interviewer(), encoding, config())
    next(episode)
    broken = Completion(
        request_id=KEY.request_id(0),
        token_ids=array("i", [5, 1]),
        logprobs=array("f", [-0.1]),
        entropies=array("f", [0.1, 0.1]),
        kept_mass=array("f", [1.0, 1.0]),
        finish_reason="stop",
        weight_version=0,
    )
    with pytest.raises(ValueError, match="contract"):
        episode.send(broken)


def test_opened_thinking_is_part_of_the_prompt_and_of_the_message(encoding: Encoding) -> None:
    opened = Encoding(encoding.tokenizer, EncodingConfig(open_thinking=True))
    trajectory, _ = play(opened, Interviewer(), config(), ["4+3=7</think> <answer>7</answer>"])
    assert trajectory.messages[-1] == Message(role="assistant", thinking="4+3=7", content=" <answer>7</answer>")
    assert trajectory.segments[0].token_ids[trajectory.segments[0].prompt_length - 1] == 5
