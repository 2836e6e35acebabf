"""One thread that steps the engine for all clients: requests come in between two steps, tokens go out after each.

A ticket is what one HTTP request holds of the engine. Its events wait in memory, bounded by the tokens that were asked
for, so a slow reader slows nobody down; closing it withdraws what is unfinished, and the slots are free.
"""

from __future__ import annotations

import asyncio
import threading
import time
from array import array
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, NamedTuple, Protocol

import torch

from rorqual.engines.steering import Constraint, Drawn
from rorqual.records import Alternatives, Completion, GenerateRequest
from rorqual.server.errors import ApiError, failed, invalid, overloaded


class ServingEngine(Protocol):
    """What is needed of an engine; `engines.local.LocalEngine` is one."""

    @property
    def context_window(self) -> int: ...

    @property
    def num_unfinished(self) -> int: ...

    def submit(
        self, requests: Sequence[GenerateRequest], constraints: Mapping[str, Constraint] | None = None
    ) -> None: ...

    def step(self) -> list[Completion]: ...

    def drawn(self, since: Mapping[str, int]) -> dict[str, Drawn]: ...

    def abort(self, request_id: str) -> bool: ...

    def cancel(self) -> None: ...


class Event(NamedTuple):
    """New tokens of one choice; `end` is set on its last."""

    choice: int
    token_ids: array[int]
    alternatives: Alternatives | None
    end: Literal["stop", "length"] | None


@dataclass(eq=False)
class Ticket:
    """What one HTTP request has in the engine: a request for each choice. `begun`: when it was opened."""

    thread: EngineThread
    requests: Sequence[GenerateRequest]
    constraints: Mapping[str, Constraint]
    begun: float = field(default_factory=time.monotonic)
    error: ApiError | None = None
    _events: deque[Event] = field(default_factory=deque)
    _arrived: asyncio.Event = field(default_factory=asyncio.Event)
    _open: set[int] = field(default_factory=set)

    async def events(self) -> AsyncIterator[Event]:
        """Until every choice has ended or was stopped. Raises: ApiError when the engine fails."""
        while self._events or self._open:
            if self.error is not None:
                raise self.error
            if not self._events:
                self._arrived.clear()
                await self._arrived.wait()
                continue
            event = self._events.popleft()
            if event.choice in self._open:
                if event.end is not None:
                    self._open.discard(event.choice)
                yield event

    def stop(self, choice: int) -> None:
        """No more of this choice is wanted; its slot is freed."""
        if choice in self._open:
            self._open.discard(choice)
            self.thread.withdraw(self, [choice])

    def close(self) -> None:
        """No more of any choice is wanted. Closing twice does nothing."""
        unfinished, self._open = sorted(self._open), set()
        self.thread.withdraw(self, unfinished)
        self.thread.leave(self)

    def __enter__(self) -> Ticket:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def opened(self) -> None:
        self._open = set(range(len(self.requests)))

    def push(self, events: Iterable[Event]) -> None:
        self._events.extend(events)
        self._arrived.set()

    def fail(self, error: ApiError) -> None:
        self.error = error
        self._arrived.set()


class EngineThread:
    """Start it inside the event loop that serves; `close` ends it.

    max_requests: engine requests that may be in flight at once, those that wait for a slot included.
    """

    def __init__(self, engine: ServingEngine, max_requests: int) -> None:
        self.engine, self.max_requests = engine, max_requests
        self.num_open = 0
        self.num_steps = 0
        self.failure: str | None = None
        self._tickets: dict[str, tuple[Ticket, int]] = {}
        self._known: dict[str, int] = {}
        self._inbox: list[Callable[[], None]] = []
        self._wake = threading.Condition()
        self._closing = False
        self._tickets_open: set[Ticket] = set()
        self._recent = deque[float](maxlen=64)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._num_threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._run, name="rorqual-engine", daemon=True)

    # -------------------------------------------------------------------------------------------- in the event loop

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def close(self) -> None:
        """End the thread after its step; whoever still waits is told."""
        for ticket in list(self._tickets_open):
            ticket.fail(ApiError(503, "The server is shutting down.", kind="server_error", code="shutting_down"))
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join(timeout=30.0)

    def open(self, requests: Sequence[GenerateRequest], constraints: Mapping[str, Constraint] | None = None) -> Ticket:
        """Queue the requests of one HTTP request, which must be closed again.

        Raises: ApiError: 429 when the queue is full, 500 when the engine has died.
        """
        if self.failure is not None:
            raise failed(f"The engine has stopped: {self.failure}")
        if self.num_open + len(requests) > self.max_requests:
            raise overloaded(self.retry_after())
        ticket = Ticket(self, tuple(requests), dict(constraints or {}))
        ticket.opened()
        self.num_open += len(requests)
        self._tickets_open.add(ticket)
        self._post(lambda: self._submit(ticket))
        return ticket

    def withdraw(self, ticket: Ticket, choices: Sequence[int]) -> None:
        names = [ticket.requests[choice].request_id for choice in choices]
        if names:
            self._post(lambda: self._abort(names))

    def leave(self, ticket: Ticket) -> None:
        if ticket in self._tickets_open:
            self._tickets_open.discard(ticket)
            self.num_open -= len(ticket.requests)
            self._recent.append(time.monotonic() - ticket.begun)

    def retry_after(self) -> int:
        """Whole seconds, between 1 and 60: what recent requests took."""
        mean = sum(self._recent) / len(self._recent) if self._recent else 1.0
        return min(60, max(1, round(mean)))

    def _fail_open(self) -> None:
        for ticket in list(self._tickets_open):
            ticket.fail(failed(f"The engine has stopped: {self.failure}"))

    def _post(self, action: Callable[[], None]) -> None:
        with self._wake:
            self._inbox.append(action)
            self._wake.notify()

    # ------------------------------------------------------------------------------------------ in the engine's thread

    def _run(self) -> None:
        torch.set_num_threads(self._num_threads)
        try:
            while self._turn():
                pass
        finally:
            if not self._closing:
                self.failure = "its thread ended unexpectedly; the log says why."
                self._tell(self._fail_open)

    def _turn(self) -> bool:
        """What was posted, then one step; False when the thread is to end."""
        with self._wake:
            while not self._inbox and not self.engine.num_unfinished and not self._closing:
                self._wake.wait()
            if self._closing:
                return False
            actions, self._inbox = self._inbox, []
        for action in actions:
            action()
        if self.engine.num_unfinished:
            try:
                self._deliver(self.engine.step())
            except (ValueError, RuntimeError, MemoryError) as error:
                self.engine.cancel()
                self._fail_all(failed(f"The engine could not go on: {str(error).splitlines()[0]}"))
            self.num_steps += 1
        return True

    def _submit(self, ticket: Ticket) -> None:
        try:
            self.engine.submit(ticket.requests, ticket.constraints)
        except ValueError as error:
            self._tell(ticket.fail, invalid(str(error)))
            return
        for choice, request in enumerate(ticket.requests):
            self._tickets[request.request_id] = (ticket, choice)
            self._known[request.request_id] = 0

    def _abort(self, names: Sequence[str]) -> None:
        for name in names:
            self.engine.abort(name)
            self._tickets.pop(name, None)
            self._known.pop(name, None)

    def _deliver(self, completions: Sequence[Completion]) -> None:
        """Everything new of this step, in one call to the event loop."""
        news: dict[Ticket, list[Event]] = {}
        for name, drawn in self.engine.drawn(self._known).items():
            if name in self._tickets and len(drawn.token_ids):
                ticket, choice = self._tickets[name]
                self._known[name] += len(drawn.token_ids)
                news.setdefault(ticket, []).append(Event(choice, drawn.token_ids, drawn.alternatives, None))
        for completion in completions:
            if completion.request_id in self._tickets:
                ticket, choice = self._tickets.pop(completion.request_id)
                first = self._known.pop(completion.request_id)
                event = Event(
                    choice,
                    completion.token_ids[first:],
                    _tail(completion.alternatives, first),
                    completion.finish_reason,
                )
                news.setdefault(ticket, []).append(event)
        if news:
            self._tell(_push_all, news)

    def _fail_all(self, error: ApiError) -> None:
        tickets = {ticket for ticket, _ in self._tickets.values()}
        self._tickets.clear()
        self._known.clear()
        for ticket in tickets:
            self._tell(ticket.fail, error)

    def _tell(self, function: Callable[..., None], *arguments: object) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)


def _push_all(news: Mapping[Ticket, list[Event]]) -> None:
    for ticket, events in news.items():
        ticket.push(events)


def _tail(alternatives: Alternatives | None, first: int) -> Alternatives | None:
    if alternatives is None:
        return None
    return Alternatives(
        num=alternatives.num,
        logprobs=alternatives.logprobs[first:],
        ids=alternatives.ids[first * alternatives.num :],
        top_logprobs=alternatives.top_logprobs[first * alternatives.num :],
    )
