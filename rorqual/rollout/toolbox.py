"""Where tools run beside the engine: one thread with an event loop, which lives while a tool does.

Rollouts start tools here and collect the results between two steps of the engine. An episode without tools starts no
thread.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Iterable, Sequence

from rorqual.contracts import Environment
from rorqual.records import Task
from rorqual.rollout.tools import ToolConfig, ToolRequest, ToolResults, run_calls


class Toolbox:
    """Runs the calls of many episodes at the same time."""

    def __init__(self, config: ToolConfig) -> None:
        self._config = config
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._running: set[str] = set()
        self._on_loop: dict[str, asyncio.Task[None]] = {}
        self._ended: queue.SimpleQueue[ToolResults] = queue.SimpleQueue()

    @property
    def num_running(self) -> int:
        """Requests whose results `finished` has not returned yet."""
        return len(self._running)

    def start(self, environment: Environment, task: Task, request: ToolRequest) -> None:
        """Begin to run the calls of `request`; gives control back at once."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, name="tools", daemon=True)
            self._thread.start()
        self._running.add(request.request_id)
        self._loop.call_soon_threadsafe(self._begin, environment, task, request)

    def finished(self, timeout: float | None) -> list[ToolResults]:
        """The results that have come; waits up to `timeout` seconds for the first one, for ever where it is None.

        The thread ends with the last of the requests.
        """
        found: list[ToolResults] = []
        while self._running:
            try:
                results = self._ended.get(timeout=timeout) if timeout != 0.0 and not found else self._ended.get_nowait()
            except queue.Empty:
                break
            if results.request_id in self._running:  # else it was withdrawn after it had ended
                self._running.remove(results.request_id)
                found.append(results)
        if found and not self._running:
            self.close()
        return found

    def cancel(self, names: Sequence[str]) -> None:
        """Withdraw those of the requests that are running; their calls have ended when it returns."""
        gone = self._running.intersection(names)
        self._running -= gone
        if gone and self._loop is not None:
            asyncio.run_coroutine_threadsafe(self._withdraw(gone), self._loop).result()

    def close(self) -> None:
        """Withdraw every request and end the thread."""
        self.cancel(list(self._running))
        if self._loop is not None and self._thread is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
        self._loop = self._thread = None

    # ------------------------------------------------------------------------------------------------ on the loop

    def _begin(self, environment: Environment, task: Task, request: ToolRequest) -> None:
        name = request.request_id
        self._on_loop[name] = asyncio.get_running_loop().create_task(self._run(environment, task, request))
        self._on_loop[name].add_done_callback(lambda _: self._on_loop.pop(name, None))

    async def _run(self, environment: Environment, task: Task, request: ToolRequest) -> None:
        self._ended.put(await run_calls(environment, task, request, self._config))

    async def _withdraw(self, names: Iterable[str]) -> None:
        tasks = [self._on_loop[name] for name in names if name in self._on_loop]
        for each in tasks:
            each.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
