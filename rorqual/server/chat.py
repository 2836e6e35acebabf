"""One chat request: from its messages to a prompt, and from the drawn tokens to its answer, whole or as events."""

from __future__ import annotations

import secrets
import time
from array import array
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec import UNSET

from rorqual.records import Message, ToolSpec
from rorqual.server.backend import event
from rorqual.server.engine_thread import Event, Ticket
from rorqual.server.errors import ApiError, failed, invalid, unsupported
from rorqual.server.forcing import ForcedCall, forced_call
from rorqual.server.policy import ServedPolicy
from rorqual.server.protocol import (
    CallAnswer,
    CallDelta,
    ChatAnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatMessage,
    ChatRequest,
    ChoiceLogprobs,
    FunctionCall,
    NamedTool,
    ObjectFormat,
    SchemaFormat,
    StreamOptions,
    Usage,
)
from rorqual.server.reading import ChatReader, chat_logprobs, usage
from rorqual.server.structured import JsonConstraint
from rorqual.text.encoding import Encoding
from rorqual.text.openai import message_from_openai, tool_from_openai
from rorqual.text.streaming import Delta


@dataclass(frozen=True)
class ChatPlan:
    """What a chat request comes to, before anything is drawn."""

    encoding: Encoding
    messages: tuple[Message, ...]
    tools: tuple[ToolSpec, ...]
    prompt_ids: array[int]
    stop_token_ids: tuple[int, ...]
    constraints: Sequence[JsonConstraint | ForcedCall]


def plan_chat(policy: ServedPolicy, request: ChatRequest) -> ChatPlan:
    """Raises: ApiError for messages that cannot be encoded, and for what is not implemented."""
    encoding = policy.encoding_for(wanted_thinking(request))
    tools = offered_tools(request)
    schema = wanted_schema(request)
    if schema is not None and tools:
        raise unsupported("`response_format` and `tools` together are not implemented. Ask for one.", "response_format")
    try:
        messages = read_messages(request.messages)
        if policy.system and messages[0].role not in ("system", "developer"):
            messages = (Message(role="system", content=policy.system), *messages)
        shown = schema if encoding.format.schema_section else None
        if policy.context is not None:
            messages = policy.context.seen(encoding, messages, tools, shown)
        prompt_ids = encoding.prompt(messages, tools, shown)
    except (ValueError, RecursionError) as error:
        words = "It is nested too deeply." if isinstance(error, RecursionError) else str(error)
        raise invalid(words, param="messages") from error
    if not prompt_ids:
        raise invalid("The messages are encoded as no token at all. Say something.", param="messages")
    constraints = bind(policy, request, encoding, tools, schema)
    return ChatPlan(encoding, messages, tools, prompt_ids, encoding.stop_token_ids, constraints)


def bind(
    policy: ServedPolicy,
    request: ChatRequest,
    encoding: Encoding,
    tools: Sequence[ToolSpec],
    schema: Mapping[str, Any] | None,
) -> Sequence[JsonConstraint | ForcedCall]:
    """A constraint for each choice of a request that binds its answer. Raises: ApiError where that cannot be done."""
    count, choice = request.n or 1, request.tool_choice
    if schema is not None:
        return [policy.compiler.constraint(schema, encoding.config.open_thinking) for _ in range(count)]
    if isinstance(choice, NamedTool) or choice == "required":
        name = choice.function.name if isinstance(choice, NamedTool) else None
        return [forced_call(encoding, tools, name, policy.vocab_size) for _ in range(count)]
    return []


def read_messages(messages: Sequence[ChatMessage]) -> tuple[Message, ...]:
    """Raises: ValueError as `text.openai` does."""
    return tuple(message_from_openai(_without_nothing(message)) for message in messages)


def _without_nothing(message: ChatMessage) -> Mapping[str, Any]:
    return {name: value for name, value in msgspec.to_builtins(message).items() if value is not None}


def wanted_thinking(request: ChatRequest) -> bool | None:
    """Whether the request turns thinking on or off, in one of three dialects. Raises: ApiError where two disagree."""
    wishes = []
    if request.thinking is not None:
        wishes.append(request.thinking.type == "enabled")
    if request.chat_template_kwargs is not None:
        options = request.chat_template_kwargs
        wishes += [each for each in (options.thinking, options.enable_thinking) if each is not None]
    if request.reasoning_effort is not None:
        wishes.append(request.reasoning_effort != "none")
    if len(set(wishes)) > 1:
        raise invalid("The request turns thinking on and off. Say it once.", param="thinking")
    return wishes[0] if wishes else None


def offered_tools(request: ChatRequest) -> tuple[ToolSpec, ...]:
    """The tools that the policy is shown. Raises: ApiError for one that is none."""
    if request.tool_choice == "none":
        return ()
    try:
        return tuple(tool_from_openai(msgspec.to_builtins(tool)) for tool in request.tools or ())
    except ValueError as error:
        raise invalid(str(error), param="tools") from error


def wanted_schema(request: ChatRequest) -> Mapping[str, Any] | None:
    """The schema that the answer must keep."""
    if isinstance(request.response_format, ObjectFormat):
        return {"type": "object"}
    if isinstance(request.response_format, SchemaFormat):
        return request.response_format.json_schema.schema or {}
    return None


class ChatAnswer:
    """Makes the answer to one chat request. Each choice has a reader; choices take turns in a stream."""

    def __init__(self, policy: ServedPolicy, request: ChatRequest, plan: ChatPlan, identity: str) -> None:
        self.id, self._policy, self._plan = identity, policy, plan
        self._options = request.stream_options or StreamOptions()
        self._created = int(time.time())
        stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
        after_results = plan.messages[-1].role == "tool"
        self._readers = [
            ChatReader(
                plan.encoding,
                plan.tools,
                after_results,
                f"call_{secrets.token_hex(6)}_",
                stops,
                one_call=request.parallel_tool_calls is False,
            )
            for _ in range(request.n or 1)
        ]

    async def events(self, ticket: Ticket) -> AsyncIterator[tuple[int, bytes]]:
        """Server-sent events, each with how many tokens it tells of."""
        for index in range(len(self._readers)):
            yield 0, self._chunk([ChatChunkChoice(index=index, delta=ChatDelta(role="assistant", content=""))])
        num_calls = [0] * len(self._readers)
        async for news in ticket.events():
            delta, end = self._read(ticket, news)
            noted = chat_logprobs(self._plan.encoding.tokenizer, news.token_ids, news.alternatives)
            if delta or end or noted:
                said = _chunk_delta(delta, num_calls[news.choice])
                num_calls[news.choice] += len(delta.tool_calls)
                choice = ChatChunkChoice(index=news.choice, delta=said, finish_reason=end, logprobs=noted)
                yield len(news.token_ids), self._chunk([choice])
        if self._options.include_usage:
            yield 0, self._chunk([], self._usage())

    async def whole(self, ticket: Ticket) -> ChatCompletion:
        """The answer at once."""
        thinking, content = [[""] * len(self._readers) for _ in range(2)]
        ends: list[Any] = [None] * len(self._readers)
        noted: list[list[ChoiceLogprobs]] = [[] for _ in self._readers]
        async for news in ticket.events():
            delta, end = self._read(ticket, news)
            thinking[news.choice] += delta.thinking
            content[news.choice] += delta.content
            ends[news.choice] = end or ends[news.choice]
            logprobs = chat_logprobs(self._plan.encoding.tokenizer, news.token_ids, news.alternatives)
            noted[news.choice] += [logprobs] if logprobs else []
        choices = []
        for index, reader in enumerate(self._readers):
            entries = [entry for each in noted[index] for entry in each.content]
            logprobs = ChoiceLogprobs(content=entries) if noted[index] else None
            message = _message(thinking[index], content[index], reader)
            choices.append(ChatChoice(index=index, message=message, finish_reason=ends[index], logprobs=logprobs))
        return ChatCompletion(
            id=self.id, created=self._created, model=self._policy.name, choices=choices, usage=self._usage()
        )

    def _read(self, ticket: Ticket, news: Event) -> tuple[Delta, Any]:
        """What an event adds, and how its choice ended. Raises: ApiError when a schema could not be kept."""
        reader = self._readers[news.choice]
        delta = reader.feed(news.token_ids)
        if reader.stopped:
            ticket.stop(news.choice)
            return delta, reader.stop_reason
        if news.end is None:
            return delta, None
        if self._plan.constraints and self._plan.constraints[news.choice].problem:
            raise _not_kept(self._plan.constraints[news.choice].problem)
        last, end = reader.finish(news.end)
        return Delta(
            thinking=delta.thinking + last.thinking,
            content=delta.content + last.content,
            tool_calls=delta.tool_calls + last.tool_calls,
        ), end

    def _usage(self) -> Usage:
        drawn = sum(reader.num_tokens for reader in self._readers)
        reasoning = sum(reader.num_reasoning_tokens() for reader in self._readers)
        return usage(len(self._plan.prompt_ids), drawn, reasoning)

    def _chunk(self, choices: list[ChatChunkChoice], used: Usage | None = None) -> bytes:
        told = used if self._options.include_usage else UNSET
        return event(ChatChunk(id=self.id, created=self._created, model=self._policy.name, choices=choices, usage=told))


def _chunk_delta(delta: Delta, num_calls: int) -> ChatDelta:
    calls = [
        CallDelta(index=num_calls + place, id=call.id, function=FunctionCall(name=call.name, arguments=call.arguments))
        for place, call in enumerate(delta.tool_calls)
    ]
    return ChatDelta(
        content=delta.content or UNSET,
        reasoning_content=delta.thinking or UNSET,
        reasoning=delta.thinking or UNSET,
        tool_calls=calls or UNSET,
    )


def _message(thinking: str, content: str, reader: ChatReader) -> ChatAnswerMessage:
    calls = [
        CallAnswer(id=call.id, function=FunctionCall(name=call.name, arguments=call.arguments)) for call in reader.calls
    ]
    return ChatAnswerMessage(
        content=None if calls and not content else content,
        reasoning_content=thinking or UNSET,
        reasoning=thinking or UNSET,
        tool_calls=calls or UNSET,
    )


def _not_kept(problem: str) -> ApiError:
    return failed(f"The answer could not keep the schema: {problem.splitlines()[0]}")
