"""Running the tools that a policy calls: what it wrote becomes results, whatever the tools do.

A call that is the policy's mistake is answered with an error, which it reads like any result. A tool whose
infrastructure fails is called again, a bounded number of times; then its failure is a value that ends the episode.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Literal

from rorqual.contracts import Environment
from rorqual.records import Message, Record, Task, ToolCall, ToolSpec
from rorqual.text.parsing import Parsed

ERROR = "Error: "
"""What a result begins with that reports a mistake of the policy."""

BROKEN_CALLS = ("unclosed_calls", "malformed_call")


class ToolConfig(Record):
    """timeout: seconds that one call may take; a tool that can hang through the policy's fault has a shorter limit of
    its own, and answers. retries: how often a call is made again after its infrastructure failed. backoff: seconds
    before the first of them, twice as long before each further one."""

    timeout: float = 60.0
    retries: int = 2
    backoff: float = 0.5

    def __post_init__(self) -> None:
        """Raises: ValueError naming the field that is out of range."""
        for name, valid in {
            "timeout": self.timeout > 0.0,
            "retries": self.retries >= 0,
            "backoff": self.backoff >= 0.0,
        }.items():
            if not valid:
                raise ValueError(f"ToolConfig.{name} = {getattr(self, name)} is out of range.")


class ToolRequest(Record):
    """Run `calls`, which follow `messages`. `request_id` is unique among the requests of the episode."""

    request_id: str
    messages: tuple[Message, ...]
    calls: tuple[ToolCall, ...]


class ToolResults(Record):
    """One result a call, in the order of the calls; or how the episode ends, and what went wrong."""

    request_id: str
    messages: tuple[Message, ...] = ()
    end: Literal["tool_failed", "environment_failed"] | None = None
    error: str | None = None


def describe(failure: Exception) -> str:
    """`ValueError: what it said`."""
    return f"{type(failure).__name__}: {failure}"


def answer(call: ToolCall, content: str) -> Message:
    """The result of `call`."""
    return Message(role="tool", content=content, tool_call_id=call.id)


def mistake(call: ToolCall, tools: Sequence[ToolSpec]) -> str | None:
    """Why `call` cannot be run, told to the policy; None where it can."""
    names = [tool.name for tool in tools]
    if call.name not in names:
        return f"{ERROR}there is no tool {call.name!r}; there are: {', '.join(names)}."
    try:
        arguments = json.loads(call.arguments)
    except json.JSONDecodeError as failure:
        return f"{ERROR}the arguments of {call.name} are not JSON: {failure}."
    if not isinstance(arguments, dict):
        return f"{ERROR}the arguments of {call.name} are not a JSON object."
    return None


def broken_call(parsed: Parsed) -> str | None:
    """What the policy is told of a call that could not be read; None where there is none."""
    for problem in parsed.problems:
        if problem.kind in BROKEN_CALLS:
            what = "is not closed" if problem.kind == "unclosed_calls" else "is malformed"
            return f"{ERROR}the tool call at character {problem.position} {what} and was not run. Write it again."
    return None


async def run_calls(environment: Environment, task: Task, request: ToolRequest, config: ToolConfig) -> ToolResults:
    """Run all calls of a request at the same time. Never raises, but when it is cancelled; then its calls are too."""
    running = [asyncio.ensure_future(_run(environment, task, request.messages, call, config)) for call in request.calls]
    try:
        contents = await asyncio.gather(*running)
    except OSError as failure:
        return ToolResults(request_id=request.request_id, end="tool_failed", error=describe(failure))
    except Exception as failure:  # noqa: BLE001  an environment may fail in any way; the episode is still reported
        return ToolResults(request_id=request.request_id, end="environment_failed", error=describe(failure))
    finally:
        for each in running:
            each.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    messages = tuple(answer(call, content) for call, content in zip(request.calls, contents, strict=True))
    return ToolResults(request_id=request.request_id, messages=messages)


async def _run(
    environment: Environment, task: Task, messages: Sequence[Message], call: ToolCall, config: ToolConfig
) -> str:
    """Raises: OSError when the infrastructure failed to the last."""
    for attempt in range(config.retries + 1):
        try:
            return await asyncio.wait_for(environment.call(task, messages, call), config.timeout)
        except ValueError as failure:
            return f"{ERROR}{failure}"
        except OSError as failure:
            if attempt == config.retries:
                raise OSError(
                    f"{call.name} failed {attempt + 1} times, the last time with {describe(failure)}"
                ) from failure
        await asyncio.sleep(config.backoff * 2**attempt)
    raise AssertionError("unreachable: the last attempt returns or raises")
