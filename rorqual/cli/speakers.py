"""Who answers in `rorqual chat`: a policy that runs here, or a model behind an OpenAI-compatible endpoint.

Both keep all that was said in `messages`, drop past thinking by the same rule, and run the tools that are called. An
answer that is stopped stays as far as it came.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Sequence
from typing import Protocol

import msgspec

from rorqual.cli.calculator import TOOLS, run_tool
from rorqual.cli.policies import Policy
from rorqual.contracts import ChatReply, ChatUsage
from rorqual.engines.http import EndpointConfig, HttpChatModel
from rorqual.engines.local import LocalEngine
from rorqual.envs.dialogue import DialogueEnvironment
from rorqual.records import Completion, GenerateRequest, Message, SamplingParams, Task, ToolCall, ToolSpec
from rorqual.text.conversation import Conversation
from rorqual.text.encoding import Encoding
from rorqual.text.retention import kept_thinking
from rorqual.text.streaming import Delta, join_deltas

MAX_ROUNDS = 8
"""Most times that one question may call tools."""


class WindowFullError(ValueError):
    """A prompt that leaves no room for an answer."""


class Interrupted(Exception):
    """The answer was stopped by the person at the keyboard."""


class Listener:
    """Is told what happens while an answer comes; this one is deaf."""

    def delta(self, delta: Delta) -> None:
        """More of the answer."""

    def result(self, call: ToolCall, text: str) -> None:
        """What a tool gave."""


class Talker(Protocol):
    """What the conversation loop asks of a speaker."""

    label: str
    single_turn: bool
    tools: tuple[ToolSpec, ...]
    messages: list[Message]

    def answer(self, question: str, listener: Listener) -> Message: ...

    def set_thinking(self, on: bool) -> None: ...

    def context(self) -> list[str]: ...


class Speaker:
    """A policy in one conversation, asked as its run asked it: the same system message first, the same suffix.

    A policy of one turn starts anew with every question, and so does a conversation that has filled the window.
    """

    def __init__(
        self,
        policy: Policy,
        temperature: float,
        top_p: float,
        max_new_tokens: int,
        seed: int,
        tools: Sequence[str] = (),
    ) -> None:
        """Raises: ValueError for a sampling setting out of range, or tools in a format that has none."""
        self.label = policy.label
        self.single_turn = policy.single_turn or bool(policy.encoding.config.template)
        self.tools = named_tools(tools)
        self.messages: list[Message] = []
        self._encoding = policy.encoding
        if self.tools and self._encoding.format.calls is None:
            raise ValueError(
                f"The format {self._encoding.format.name!r} has no tool calls; leave --tool out, or give --format."
            )
        self._environment = DialogueEnvironment(policy.dialogue)
        self._engine = LocalEngine(policy.model)
        self._max_new_tokens = max_new_tokens
        self._temperature, self._top_p, self._seed = temperature, top_p, seed
        self._turns = 0
        self._conversation: Conversation | None = None
        self._params(1)

    def answer(self, question: str, listener: Listener | None = None) -> Message:
        """What the policy says next, after the tools it called.

        Raises: WindowFullError, and the next question then starts a new conversation; Interrupted.
        """
        listener = listener or Listener()
        task = Task(
            task_id="chat", environment="dialogue", domain="", messages=(Message(role="user", content=question),)
        )
        messages = self._environment.start(task)
        if self.single_turn:
            self.messages, self._conversation = [], None
        arriving = messages[-1:] if self.messages else messages
        if self._conversation is None:
            self._conversation = Conversation(self._encoding, (*self.messages, *arriving), self.tools)
        else:
            self._conversation.append(arriving)
        self.messages += arriving
        for _ in range(MAX_ROUNDS):
            message = self._turn(self._conversation, listener)
            self.messages.append(message)
            if not message.tool_calls:
                return message
            results = tuple(_result(call, listener) for call in message.tool_calls)
            self._conversation.append(results)
            self.messages += results
        self._conversation = None
        return stopped(self.messages, Delta())

    def set_thinking(self, on: bool) -> None:
        """Raises: ValueError for a format without a thinking mode."""
        config = msgspec.structs.replace(self._encoding.config, open_thinking=on)
        self._encoding = Encoding(self._encoding.tokenizer, config)
        self._conversation = None

    def context(self) -> list[str]:
        """Facts, one a line, then the text that the model sees."""
        window = self._engine.context_window
        retention = self._encoding.config.retention or self._encoding.format.retention
        about = f"format {self._encoding.format.name} · retention {retention}"
        if self._conversation is None:
            if not self.messages:
                return [f"0 of {window} tokens · {about}"]
            rendered = self._encoding.render(self.messages, self.tools)
            return [f"{len(rendered.token_ids)} of {window} tokens · to be rendered anew · {about}", rendered.text]
        ids = self._conversation.prompt_ids
        segments = len(self._conversation.segments())
        used = f"{len(ids)} of {window} tokens ({len(ids) / window:.0%}) · segments {segments}"
        return [f"{used} · {about}", self._encoding.tokenizer.decode(ids)]

    def _turn(self, conversation: Conversation, listener: Listener) -> Message:
        prompt = conversation.prompt_ids
        room = self._engine.context_window - len(prompt)
        if room < 1:
            self._conversation, self.messages = None, []
            raise WindowFullError(
                f"With this question the conversation fills the window of {self._engine.context_window} tokens; ask a "
                "shorter one, or start a new conversation."
            )
        request = GenerateRequest(request_id=str(self._turns), prompt_ids=prompt, params=self._params(room))
        self._turns += 1
        stream, given, deltas = conversation.stream(), 0, list[Delta]()
        name = request.request_id
        done: list[Completion] = []
        self._engine.submit([request])
        try:
            while not done:
                done = self._engine.step()
                drawn = self._engine.drawn({name: given}).get(name)
                new = done[0].token_ids[given:] if done else drawn.token_ids if drawn else array("i")
                deltas.append(stream.feed(new.tolist()))
                listener.delta(deltas[-1])
                given += len(new)
        except KeyboardInterrupt:
            self._engine.cancel()
            self._conversation = None
            deltas.append(stream.finish()[0])
            listener.delta(deltas[-1])
            stopped(self.messages, join_deltas(deltas))
            raise Interrupted from None
        listener.delta(stream.finish()[0])
        return conversation.append_sampled(done[0]).message

    def _params(self, room: int) -> SamplingParams:
        return SamplingParams(
            temperature=self._temperature,
            top_p=self._top_p,
            max_new_tokens=min(self._max_new_tokens, room),
            stop_token_ids=self._encoding.stop_token_ids,
            seed=self._seed + self._turns,
        )


class EndpointSpeaker:
    """A model behind an endpoint, in one conversation. Past thinking stays until the next user message."""

    def __init__(self, config: EndpointConfig, params: SamplingParams, tools: Sequence[str] = ()) -> None:
        """Raises: ValueError as `Endpoint` does."""
        self.label = f"{config.model} at {config.base_url}"
        self.single_turn = False
        self.tools = named_tools(tools)
        self.messages: list[Message] = []
        self._config, self._params = config, params
        self._thinking: bool | None = None
        self._usage: ChatUsage | None = None
        HttpChatModel(config)

    def answer(self, question: str, listener: Listener | None = None) -> Message:
        """What the model says next. Raises: the errors of `engines.http`, Interrupted."""
        listener = listener or Listener()
        self.messages.append(Message(role="user", content=question))
        before = len(self.messages)
        try:
            for _ in range(MAX_ROUNDS):
                message = self._turn(listener)
                self.messages.append(message)
                if not message.tool_calls:
                    return message
                self.messages += [_result(call, listener) for call in message.tool_calls]
        except (ConnectionError, ValueError):
            del self.messages[before - 1 :]
            raise
        return stopped(self.messages, Delta())

    def set_thinking(self, on: bool) -> None:
        self._thinking = on

    def context(self) -> list[str]:
        """Facts, one a line, then the messages that the model sees."""
        used = "no usage known"
        if self._usage is not None:
            used = f"{self._usage.prompt_tokens} + {self._usage.completion_tokens} tokens in the last call"
        lines = [f"{used} · retention since_last_user · {len(self.messages)} messages"]
        for message in self._seen():
            thought = f" [thinking, {len(message.thinking)} characters]" if message.thinking else ""
            calls = "".join(f" [calls {call.name} {call.arguments}]" for call in message.tool_calls)
            lines.append(f"{message.role}:{thought}{calls} {message.content}".rstrip())
        return lines

    def _seen(self) -> list[Message]:
        kept = kept_thinking("since_last_user", self.messages)
        return [
            message if keep else msgspec.structs.replace(message, thinking="")
            for message, keep in zip(self.messages, kept, strict=False)
        ]

    def _turn(self, listener: Listener) -> Message:
        deltas: list[Delta] = []

        async def ask() -> ChatReply:
            model = HttpChatModel(self._config)
            model.thinking = self._thinking
            try:
                async for each in model.stream(self._seen(), self.tools, self._params):
                    if isinstance(each, ChatReply):
                        return each
                    deltas.append(each)
                    listener.delta(each)
            finally:
                await model.close()
            raise AssertionError("unreachable: a stream ends with its reply, or raises")

        try:
            reply = asyncio.run(ask())
        except KeyboardInterrupt:
            stopped(self.messages, join_deltas(deltas))
            raise Interrupted from None
        self._usage = reply.usage
        return reply.message


def named_tools(names: Sequence[str]) -> tuple[ToolSpec, ...]:
    """Raises: ValueError for a name that no tool has."""
    if unknown := [name for name in names if name not in TOOLS]:
        raise ValueError(f"--tool {unknown[0]}: there is no such tool; there is {', '.join(TOOLS)}.")
    return tuple(TOOLS[name] for name in names)


def stopped(messages: list[Message], said: Delta) -> Message:
    """Appends what was said before the answer stopped, without its calls; a question without any answer goes."""
    message = Message(role="assistant", content=said.content, thinking=said.thinking)
    if said.content or said.thinking or messages[-1].role == "tool":
        messages.append(message)
    elif messages and messages[-1].role == "user":
        messages.pop()
    return message


def _result(call: ToolCall, listener: Listener) -> Message:
    text = run_tool(call)
    listener.result(call, text)
    return Message(role="tool", content=text, tool_call_id=call.id)
