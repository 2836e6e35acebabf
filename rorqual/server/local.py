"""A policy of ours behind the routes: what all of its endpoints share, and plain completions.

Every request stands for itself: its messages are encoded anew, by the policy's format and rule for past thinking, and
what it shares with an earlier one is found in the engine's cache.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from array import array
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from typing import Any

import msgspec

from rorqual.engines.steering import Constraint
from rorqual.records import GenerateRequest, SamplingParams
from rorqual.server.backend import DONE, Reply, error_event, event
from rorqual.server.chat import ChatAnswer, plan_chat
from rorqual.server.engine_thread import EngineThread, ServingEngine, Ticket
from rorqual.server.errors import ApiError, invalid, unsupported
from rorqual.server.limits import ServerLimits
from rorqual.server.metrics import Metrics
from rorqual.server.policy import ServedPolicy
from rorqual.server.protocol import (
    ChatRequest,
    CompletionRequest,
    ModelCard,
    ModelList,
    StreamOptions,
    TextChoice,
    TextCompletion,
    read_body,
)
from rorqual.server.reading import TextReader, text_logprobs, usage


class LocalBackend:
    """Implements `backend.Backend` with one engine thread."""

    def __init__(
        self, policy: ServedPolicy, engine: ServingEngine, num_slots: int, limits: ServerLimits, metrics: Metrics
    ) -> None:
        self.policy, self.limits, self.metrics = policy, limits, metrics
        self.num_slots = num_slots
        self.thread = EngineThread(engine, num_slots + limits.max_waiting)

    async def start(self) -> None:
        self.thread.start()

    async def close(self) -> None:
        await asyncio.to_thread(self.thread.close)

    def failure(self) -> str | None:
        return self.thread.failure

    def load(self) -> Mapping[str, float]:
        return {"requests_in_engine": self.thread.num_open, "slots": self.num_slots}

    async def models(self) -> Reply:
        card = ModelCard(id=self.policy.name, created=self.policy.created, max_model_len=self.policy.context_window)
        return Reply(msgspec.json.encode(ModelList(data=[card])))

    # ---------------------------------------------------------------------------------------------------------- chat

    async def chat(self, body: bytes) -> Reply:
        request = read_body(body, ChatRequest)
        self._check(request)
        if len(request.messages) > self.limits.max_messages:
            raise invalid(f"{len(request.messages)} messages; at most {self.limits.max_messages}.", param="messages")
        plan = await asyncio.to_thread(plan_chat, self.policy, request)
        params = self._params(
            request, len(plan.prompt_ids), request.max_completion_tokens or request.max_tokens, plan.stop_token_ids
        )
        count = None if not request.logprobs else request.top_logprobs or 0
        answer = ChatAnswer(self.policy, request, plan, f"chatcmpl-{secrets.token_hex(12)}")
        prompts = [plan.prompt_ids] * (request.n or 1)
        ticket = self._open(answer.id, prompts, params, count, plan.constraints)
        if request.stream:
            return Reply(self._stream(ticket, answer.events(ticket)), release=ticket.close)
        with ticket:
            whole = await answer.whole(ticket)
            self._count(ticket, whole.usage.completion_tokens)
            return Reply(msgspec.json.encode(whole))

    # --------------------------------------------------------------------------------------------------- completions

    async def complete(self, body: bytes) -> Reply:
        request = read_body(body, CompletionRequest)
        self._check(request)
        for name in ("echo", "suffix"):
            if getattr(request, name):
                raise unsupported(f"`{name}` is not implemented. Leave it out.", name)
        if request.best_of not in (None, request.n or 1):
            raise unsupported("`best_of` is not implemented. Ask for `n` and choose.", "best_of")
        prompts = await asyncio.to_thread(self._prompts, request)
        stop_ids = self.policy.encoding.stop_token_ids
        longest = max(map(len, prompts))
        params = self._params(request, longest, request.max_tokens or 16, stop_ids)
        prompts = [prompt for prompt in prompts for _ in range(request.n or 1)]
        if len(prompts) > self.limits.max_choices:
            raise invalid(f"{len(prompts)} choices; at most {self.limits.max_choices}.", param="n")
        answer = TextAnswer(self.policy, request, f"cmpl-{secrets.token_hex(12)}", prompts)
        ticket = self._open(answer.id, prompts, params, request.logprobs, [])
        if request.stream:
            return Reply(self._stream(ticket, answer.events(ticket)), release=ticket.close)
        with ticket:
            whole = await answer.whole(ticket)
            self._count(ticket, sum(reader.num_tokens for reader in answer.readers))
            return Reply(msgspec.json.encode(whole))

    def _prompts(self, request: CompletionRequest) -> list[array[int]]:
        given: list[Any] = request.prompt if isinstance(request.prompt, list) else [request.prompt]
        if all(isinstance(each, int) for each in given):
            given = [given]
        if any(isinstance(each, int) for each in given):
            raise invalid("`prompt` mixes token ids and prompts. Give one kind.", param="prompt")
        tokenizer = self.policy.encoding.tokenizer
        bos = [tokenizer.special_id("bos")] if "bos" in tokenizer.special_tokens else []
        prompts = []
        for prompt in given:
            try:
                ids = array("i", [*bos, *tokenizer.encode(prompt)]) if isinstance(prompt, str) else array("i", prompt)
            except ValueError as error:
                raise invalid(str(error), param="prompt") from error
            if not ids:
                raise invalid("A prompt is empty. Give at least one token.", param="prompt")
            if max(ids) >= self.policy.vocab_size:
                raise invalid(f"Token {max(ids)}; the vocabulary has {self.policy.vocab_size}.", param="prompt")
            prompts.append(ids)
        return prompts

    # --------------------------------------------------------------------------------------------------------- shared

    def _check(self, request: ChatRequest | CompletionRequest) -> None:
        if request.model and request.model != self.policy.name:
            raise ApiError(
                404,
                f"There is no model {request.model[:200]!r} here; this server has {self.policy.name!r}.",
                code="model_not_found",
                param="model",
            )
        for name in ("frequency_penalty", "presence_penalty", "logit_bias"):
            if getattr(request, name):
                raise unsupported(f"`{name}` is not implemented. Leave it out.", name)
        if (request.n or 1) > self.limits.max_choices:
            raise invalid(f"n = {request.n}; at most {self.limits.max_choices}.", param="n")

    def _params(
        self,
        request: ChatRequest | CompletionRequest,
        num_prompt: int,
        asked: int | None,
        stop_token_ids: Sequence[int],
    ) -> SamplingParams:
        room = self.policy.context_window - num_prompt
        if room < 1:
            raise invalid(
                f"The prompt has {num_prompt} tokens, and the window of {self.policy.context_window} must hold the "
                "answer too. Shorten it.",
                param="messages" if isinstance(request, ChatRequest) else "prompt",
                code="context_length_exceeded",
            )
        most = self.limits.max_new_tokens or room
        if asked is not None and self.limits.max_new_tokens and asked > most:
            raise invalid(f"{asked} new tokens; at most {most} here.", param="max_tokens")
        temperature = 1.0 if request.temperature is None else request.temperature
        seed = request.seed if request.seed is not None else secrets.randbits(62)
        try:
            return SamplingParams(
                temperature=temperature,
                top_p=1.0 if request.top_p is None else max(request.top_p, 1e-9),
                top_k=max(request.top_k or 0, 0),
                min_p=request.min_p or 0.0,
                max_new_tokens=min(asked or most, most, room),
                stop_token_ids=tuple(stop_token_ids),
                seed=seed,
            )
        except ValueError as error:
            raise invalid(str(error)) from error

    def _open(
        self,
        name: str,
        prompts: Sequence[array[int]],
        params: SamplingParams,
        num_alternatives: int | None,
        constraints: Sequence[Constraint],
    ) -> Ticket:
        """A request for each prompt; choice i draws with the seed plus i. Raises: ApiError where the queue is full."""
        if len(prompts) > self.thread.max_requests:
            raise invalid(f"{len(prompts)} choices; this server holds {self.thread.max_requests} at once.", param="n")
        requests = [
            GenerateRequest(
                request_id=f"{name}.{index}",
                prompt_ids=prompt,
                params=msgspec.structs.replace(params, seed=params.seed + index),
                num_alternatives=num_alternatives,
            )
            for index, prompt in enumerate(prompts)
        ]
        bound = {request.request_id: each for request, each in zip(requests, constraints, strict=False)}
        ticket = self.thread.open(requests, bound)
        self.metrics.prompt_tokens.inc(sum(map(len, prompts)))
        return ticket

    async def _stream(self, ticket: Ticket, events: AsyncIterator[tuple[int, bytes]]) -> AsyncGenerator[bytes, None]:
        """Events and `[DONE]`; each comes with how many tokens it tells of."""
        count = 0
        with ticket:
            try:
                async for num_tokens, data in events:
                    if num_tokens and not count:
                        self.metrics.first_token_seconds.observe(time.monotonic() - ticket.begun)
                    count += num_tokens
                    yield data
            except ApiError as error:
                yield error_event(error)
                return
            finally:
                self.metrics.generated_tokens.inc(count)
            yield DONE

    def _count(self, ticket: Ticket, num_tokens: int) -> None:
        self.metrics.generated_tokens.inc(num_tokens)


class TextAnswer:
    """Makes the answer to one request of `/v1/completions`, whole or as events."""

    def __init__(
        self, policy: ServedPolicy, request: CompletionRequest, identity: str, prompts: Sequence[array[int]]
    ) -> None:
        self.id, self._policy, self._request = identity, policy, request
        self._created = int(time.time())
        encoding = policy.encoding
        stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
        self.readers = [TextReader(encoding.tokenizer, encoding.stop_token_ids, stops) for _ in prompts]
        self._num_prompt = sum(map(len, prompts[:: request.n or 1]))
        self._offsets = [0] * len(prompts)

    async def events(self, ticket: Ticket) -> AsyncIterator[tuple[int, bytes]]:
        options = self._request.stream_options or StreamOptions()
        async for choice, num_tokens in self._choices(ticket):
            yield num_tokens, event(self._answer([choice], None if options.include_usage else msgspec.UNSET))
        if options.include_usage:
            yield 0, event(self._answer([], self._usage()))

    async def whole(self, ticket: Ticket) -> TextCompletion:
        parts: list[list[TextChoice]] = [[] for _ in self.readers]
        async for choice, _ in self._choices(ticket):
            parts[choice.index].append(choice)
        return self._answer([_joined(each) for each in parts], self._usage())

    async def _choices(self, ticket: Ticket) -> AsyncIterator[tuple[TextChoice, int]]:
        async for news in ticket.events():
            reader = self.readers[news.choice]
            text = reader.feed(news.token_ids)
            end = news.end
            if end is not None:
                text += reader.finish()
            if reader.stopped:
                end = "stop"
                ticket.stop(news.choice)
            noted = text_logprobs(
                self._policy.encoding.tokenizer, news.token_ids, news.alternatives, self._offsets[news.choice]
            )
            self._offsets[news.choice] += sum(map(len, noted.tokens)) if noted else 0
            if text or end or noted:
                yield (
                    TextChoice(index=news.choice, text=text, finish_reason=end, logprobs=noted),
                    len(news.token_ids),
                )

    def _usage(self) -> Any:
        return usage(self._num_prompt, sum(reader.num_tokens for reader in self.readers), 0)

    def _answer(self, choices: list[TextChoice], used: Any) -> TextCompletion:
        return TextCompletion(id=self.id, created=self._created, model=self._policy.name, choices=choices, usage=used)


def _joined(parts: Sequence[TextChoice]) -> TextChoice:
    noted = [part.logprobs for part in parts if part.logprobs is not None]
    logprobs = None
    if noted:
        logprobs = msgspec.structs.replace(
            noted[0],
            **{name: [x for each in noted for x in getattr(each, name)] for name in noted[0].__struct_fields__},
        )
    return msgspec.structs.replace(parts[-1], text="".join(part.text for part in parts), logprobs=logprobs)
