"""G episodes of each task over one engine: the rollout loop, which can be killed anywhere and goes on bit for bit.

A generator cannot be saved, but what it was sent can: the state of a live episode is the completions and the tool
results that it has received. Resuming sends them to a fresh episode, which therefore stands where the lost one stood;
only tools that were running are run again.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rorqual.contracts import Engine, Environment
from rorqual.records import Completion, GenerateRequest, Record, Task, Trajectory, from_json, to_json
from rorqual.rollout.episode import Asked, Episode, EpisodeConfig, EpisodeKey, Interruption, Sent, run_episode
from rorqual.rollout.toolbox import Toolbox
from rorqual.rollout.tools import ToolResults
from rorqual.text.encoding import Encoding


class Group(Record):
    """The finished episodes of one task, in the order of their sample index."""

    group_id: str
    task: Task
    trajectories: tuple[Trajectory, ...]


class EpisodeState(Record):
    """One episode as it is saved: the completions and results it received, and its trajectory once it has ended."""

    completions: tuple[Completion, ...] = ()
    results: tuple[ToolResults, ...] = ()
    trajectory: Trajectory | None = None


class GroupState(Record):
    """One unfinished group as it is saved."""

    task: Task
    step: int
    episodes: tuple[EpisodeState, ...]


class Rollouts:
    """Plays `group_size` episodes of every task that is added, all over one engine.

    What a group becomes depends on its task, step, tools and the run's seed, never on what else is in flight; a
    `time_limit` excepted, which counts from when an episode is added or resumed.
    """

    def __init__(
        self,
        engine: Engine,
        environments: Mapping[str, Environment],
        encoding: Encoding,
        config: EpisodeConfig,
        group_size: int,
        run_seed: int,
    ) -> None:
        """Raises: ValueError when `group_size` is below 1 or the window is larger than the engine's."""
        if group_size < 1:
            raise ValueError(f"group_size = {group_size} must be at least 1.")
        if config.context_window > engine.context_window:
            raise ValueError(
                f"EpisodeConfig.context_window = {config.context_window} exceeds the engine's {engine.context_window}."
            )
        self._engine = engine
        self._environments = environments
        self._encoding = encoding
        self._config = config
        self._group_size = group_size
        self._run_seed = run_seed
        self._groups: dict[str, _LiveGroup] = {}
        self._waiting: dict[str, _LiveEpisode] = {}
        self._toolbox = Toolbox(config.tools)
        self.clock: Callable[[], float] = time.monotonic

    def add(self, tasks: Sequence[Task], step: int) -> None:
        """Start the episodes of `tasks`; `step` tells apart the visits to the same task.

        Raises: ValueError for a task that is already in flight in this step, or whose environment is unknown.
        """
        for task in tasks:
            group = self._start(task, step)
            self._submit([(episode, episode.advance(None)) for episode in group.episodes])

    def step(self) -> list[Group]:
        """Advance the engine once, and hand over what tools have answered; where only tools are at work, wait for one.

        Returns the groups that are finished, in the order in which they were added.
        """
        num_asked = len(self._waiting) - self._toolbox.num_running
        if num_asked and not self._engine.num_unfinished:
            raise ValueError(f"The engine has nothing in flight, but {num_asked} episodes wait for it.")
        if self._waiting:
            self._interrupt_late()
        if self._waiting:
            asked = self._engine.num_unfinished > 0
            answers: list[Completion | ToolResults] = list(self._engine.step()) if asked else []
            answers += self._toolbox.finished(0.0 if asked else self._seconds_left())
            received = {answer.request_id: answer for answer in answers}
            sent = [(self._waiting.pop(name), received.pop(name)) for name in list(self._waiting) if name in received]
            if received:
                raise ValueError(f"The engine returned completions that nobody asked for: {sorted(received)}.")
            self._submit([(episode, episode.advance(answer)) for episode, answer in sent])
        return self._finished()

    def cancel(self) -> list[Group]:
        """End every episode that is in flight, with what it has so far; its requests and tools are withdrawn.

        Nothing runs on when it returns. Returns all groups that were in flight, in the order of addition.
        """
        self._interrupt(list(self._waiting), Interruption(end="cancelled", error="the rollouts were cancelled"))
        self._toolbox.close()
        return self._finished()

    def _finished(self) -> list[Group]:
        return [self._groups.pop(group.group_id).finished() for group in list(self._groups.values()) if group.is_done]

    def run(self, tasks: Sequence[Task], step: int) -> list[Group]:
        """Add `tasks`, play everything in flight to its end, and return the groups in the order of addition."""
        self.add(tasks, step)
        order = list(self._groups)
        finished: dict[str, Group] = {}
        while self._groups:
            finished.update({group.group_id: group for group in self.step()})
        return [finished[group_id] for group_id in order]

    @property
    def num_unfinished(self) -> int:
        """Groups in flight."""
        return len(self._groups)

    def state_dict(self) -> dict[str, Any]:
        """Everything in flight: the engine's state, and the groups as JSON text."""
        groups = [group.state() for group in self._groups.values()]
        waiting = {request_id: _digest(episode.request) for request_id, episode in self._waiting.items()}
        return {"engine": self._engine.state_dict(), "groups": to_json(groups).decode(), "waiting": waiting}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` stood. The environments answer the earlier turns of live episodes again.

        Raises: ValueError when this object is in use, or the environments answer differently from before.
        """
        if self._groups:
            raise ValueError("load_state_dict needs fresh Rollouts; these have groups in flight.")
        self._engine.load_state_dict(state["engine"])
        for saved in from_json(state["groups"], list[GroupState]):
            self._restore(saved)
        resumed = {request_id: _digest(episode.request) for request_id, episode in self._waiting.items()}
        if resumed != state["waiting"]:
            raise ValueError(
                "The resumed episodes do not ask what the saved ones asked: the environment, the encoding or the seed "
                "has changed. Resume with the code and the config of the run."
            )
        self._waiting = {request_id: self._waiting[request_id] for request_id in state["waiting"]}

    def _start(self, task: Task, step: int) -> _LiveGroup:
        if task.environment not in self._environments:
            have = ", ".join(self._environments)
            raise ValueError(f"Task {task.task_id} needs environment {task.environment!r}; there are: {have}.")
        environment = self._environments[task.environment]
        group = _LiveGroup(task, step)
        for index in range(self._group_size):
            key = EpisodeKey(run_seed=self._run_seed, step=step, task_id=task.task_id, sample_index=index)
            group.group_id = key.group_id
            play = run_episode(task, key, environment, self._encoding, self._config)
            group.episodes.append(_LiveEpisode(play, task, environment, self.clock()))
        if group.group_id in self._groups:
            raise ValueError(f"Group {group.group_id} is already in flight. Give another step to visit a task again.")
        self._groups[group.group_id] = group
        return group

    def _restore(self, saved: GroupState) -> None:
        if len(saved.episodes) != self._group_size:
            raise ValueError(
                f"The saved groups have {len(saved.episodes)} episodes, these Rollouts {self._group_size}."
            )
        for episode, before in zip(self._start(saved.task, saved.step).episodes, saved.episodes, strict=True):
            if before.trajectory is not None:
                episode.trajectory = before.trajectory
                continue
            request = episode.advance(None)
            answers: list[Completion | ToolResults] = [*before.completions, *before.results]
            received = {each.request_id: each for each in answers}
            while request is not None and request.request_id in received:
                request = episode.advance(received.pop(request.request_id))
            if received:
                raise ValueError(f"Replay of {', '.join(received)} went another way: the environment has changed.")
            if request is None:
                raise ValueError(f"Replay ended an episode of {saved.task.task_id} early: the environment has changed.")
            self._waiting[request.request_id] = episode
            if not isinstance(request, GenerateRequest):
                self._toolbox.start(episode.environment, episode.task, request)

    def _submit(self, episodes_and_requests: Iterable[tuple[_LiveEpisode, Asked | None]]) -> None:
        requests = []
        for episode, request in episodes_and_requests:
            if request is None:
                continue
            self._waiting[request.request_id] = episode
            if isinstance(request, GenerateRequest):
                requests.append(request)
            else:
                self._toolbox.start(episode.environment, episode.task, request)
        if requests:
            self._engine.submit(requests)

    def _interrupt_late(self) -> None:
        """End the episodes whose time is up."""
        limit = self._config.time_limit
        if limit is not None:
            now = self.clock()
            late = [name for name, episode in self._waiting.items() if now - episode.started >= limit]
            self._interrupt(late, Interruption(end="time_limit", error=f"it has taken {limit} seconds"))

    def _interrupt(self, names: Sequence[str], interruption: Interruption) -> None:
        self._toolbox.cancel(names)
        for name in names:
            episode = self._waiting.pop(name)
            if isinstance(episode.request, GenerateRequest):
                self._engine.abort(name)
            episode.advance(interruption)

    def _seconds_left(self) -> float | None:
        """Until the next episode is late; None: no episode ever is."""
        limit = self._config.time_limit
        if limit is None:
            return None
        return max(limit + min(episode.started for episode in self._waiting.values()) - self.clock(), 0.0)


class _LiveEpisode:
    """A generator with the completions and results it was sent."""

    def __init__(self, play: Episode, task: Task, environment: Environment, started: float) -> None:
        self._play = play
        self.task, self.environment, self.started = task, environment, started
        self.request: Asked | None = None
        self._completions: list[Completion] = []
        self._results: list[ToolResults] = []
        self.trajectory: Trajectory | None = None

    def advance(self, sent: Sent | None) -> Asked | None:
        """Start (None) or go on; gives the next request, or None once there is a trajectory."""
        if isinstance(sent, Completion):
            self._completions.append(sent)
        elif isinstance(sent, ToolResults):
            self._results.append(sent)
        try:
            self.request = next(self._play) if sent is None else self._play.send(sent)
        except StopIteration as stop:
            self.request, self.trajectory = None, stop.value
        return self.request

    def state(self) -> EpisodeState:
        if self.trajectory is not None:
            return EpisodeState(trajectory=self.trajectory)
        return EpisodeState(completions=tuple(self._completions), results=tuple(self._results))


class _LiveGroup:
    """The episodes of one task that are in flight or wait for their siblings."""

    def __init__(self, task: Task, step: int) -> None:
        self.task = task
        self.step = step
        self.group_id = ""
        self.episodes: list[_LiveEpisode] = []

    @property
    def is_done(self) -> bool:
        return all(episode.trajectory is not None for episode in self.episodes)

    def finished(self) -> Group:
        trajectories = tuple(episode.trajectory for episode in self.episodes if episode.trajectory is not None)
        return Group(group_id=self.group_id, task=self.task, trajectories=trajectories)

    def state(self) -> GroupState:
        return GroupState(task=self.task, step=self.step, episodes=tuple(e.state() for e in self.episodes))


def _digest(request: Asked | None) -> str:
    """What a request asks, in short: equal digests mean that an episode was replayed to the same place."""
    return hashlib.sha256(to_json(request)).hexdigest()
