"""A token engine behind a server that returns token ids and log-probs: vLLM, SGLang, or one that speaks as they do.

Prompts go out as token ids, completions come back as token ids; no text is tokenised here. What cannot be had exactly
is refused, not guessed:

    ids, log-probs     each drawn token has its id and its log-prob, or the request fails with a `ReplyError`
    truncation         top-p, top-k and min-p are refused: no such server returns the kept sets or renormalises
    temperature        vLLM's default log-probs are those before the temperature; other than 1 needs
                       `--logprobs-mode processed_logprobs` there, which `tempered_logprobs` declares; SGLang's are
                       tempered unless SGLANG_RETURN_ORIGINAL_LOGPROB is set there, which cannot be seen from here
    greedy             temperature 0 draws from one token: log-prob and entropy 0
    entropies          no server returns them; minus the log-prob of the drawn token is the one-sample estimate,
                       right in the mean

`interface = "vllm"` posts to `/completions` with `return_token_ids`; `"sglang"` posts to the server's own `/generate`.
"""

from __future__ import annotations

import asyncio
import math
import queue
import threading
from array import array
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Literal, cast

from rorqual.engines.http import Endpoint, EndpointConfig, EndpointRefused, EndpointUnavailable, ReplyError
from rorqual.records import Completion, GenerateRequest, Record, from_json, to_json


class HttpEngineConfig(Record):
    """endpoint: the server. context_window: most tokens, prompt and completion together, that it holds.
    tempered_logprobs: whether vLLM was started with `--logprobs-mode processed_logprobs`."""

    endpoint: EndpointConfig
    context_window: int
    interface: Literal["vllm", "sglang"] = "vllm"
    tempered_logprobs: bool = False


class HttpEngine:
    """Implements `contracts.Engine`. A thread of its own keeps the connections alive between steps; `close` ends it.

    A request that fails raises from `step`, once, naming itself; the others go on. That a seed alone fixes what is
    drawn is the server's promise to keep.
    """

    def __init__(self, config: HttpEngineConfig, weight_version: int = 0) -> None:
        """Raises: ValueError as `Endpoint` does."""
        self.config, self.weight_version = config, weight_version
        self.context_window = config.context_window
        self._endpoint = Endpoint(config.endpoint)
        self._flight: dict[str, GenerateRequest] = {}
        self._answering: dict[str, Future[None]] = {}
        self._ended: queue.SimpleQueue[tuple[str, Completion | Exception]] = queue.SimpleQueue()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="http-engine", daemon=True)
        self._thread.start()

    @property
    def num_unfinished(self) -> int:
        """Requests whose completion no `step` has returned yet."""
        return len(self._flight)

    def submit(self, requests: Sequence[GenerateRequest]) -> None:
        """Send requests, as many at a time as the endpoint allows.

        Raises: ValueError, and then none is sent, for an empty prompt, one that fills the window, an id in flight, or
        sampling whose behaviour log-probs the server does not return.
        """
        names = set(self._flight)
        for request in requests:
            self._check(request, names)
            names.add(request.request_id)
        for request in requests:
            self._flight[request.request_id] = request
            self._answering[request.request_id] = asyncio.run_coroutine_threadsafe(self._answer(request), self._loop)

    def step(self) -> list[Completion]:
        """Wait for the next completion and return it; nothing in flight gives nothing.

        Raises: EndpointUnavailable, EndpointRefused or ReplyError of one request, which is then no longer in flight.
        """
        while self._flight:
            name, outcome = self._ended.get()
            if name not in self._flight:
                continue
            del self._flight[name], self._answering[name]
            if isinstance(outcome, Exception):
                raise outcome
            self.weight_version = outcome.weight_version
            return [outcome]
        return []

    def abort(self, request_id: str) -> bool:
        """Withdraw one request; its connection is closed. False when it is not in flight."""
        answering = self._answering.pop(request_id, None)
        self._flight.pop(request_id, None)
        if answering is None:
            return False
        answering.cancel()
        return True

    def cancel(self) -> None:
        """Give up every request; its connection is closed, which tells the server."""
        for answering in self._answering.values():
            answering.cancel()
        self._flight.clear()
        self._answering.clear()
        self._ended = queue.SimpleQueue()

    def close(self) -> None:
        """Cancel, and end the thread."""
        self.cancel()
        asyncio.run_coroutine_threadsafe(self._endpoint.close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def state_dict(self) -> dict[str, Any]:
        """The requests in flight; a fresh engine sends them again, and equal seeds draw equal tokens."""
        requests = [to_json(request).decode() for request in self._flight.values()]
        return {"flight": requests, "weight_version": self.weight_version}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.cancel()
        self.weight_version = int(state["weight_version"])
        self.submit([from_json(request, GenerateRequest) for request in state["flight"]])

    # ----------------------------------------------------------------------------------------------------- phases

    def _check(self, request: GenerateRequest, in_flight: set[str]) -> None:
        name, length, params = request.request_id, len(request.prompt_ids), request.params
        if name in in_flight:
            raise ValueError(f"Request {name!r} is already in flight; give each request an id of its own.")
        if not 0 < length < self.context_window:
            raise ValueError(
                f"Request {name!r} has a prompt of {length} tokens; give it at least one, and fewer than the window of "
                f"{self.context_window}, which holds the answer too."
            )
        if params.truncates:
            raise ValueError(
                f"Request {name!r} truncates (top_p, top_k or min_p), and this server returns no kept sets, so its "
                "log-probs are not those of the draw. Set top_p = 1, top_k = 0, min_p = 0."
            )
        raw = self.config.interface == "vllm" and not self.config.tempered_logprobs
        if raw and params.temperature not in (0.0, 1.0):
            raise ValueError(
                f"Request {name!r} has temperature {params.temperature}, and the server's log-probs are those before "
                "it. Start vLLM with --logprobs-mode processed_logprobs and set tempered_logprobs, or use 1."
            )

    async def _answer(self, request: GenerateRequest) -> None:
        ended = self._ended
        try:
            url, body = self._question(request)
            raw = await self._endpoint.post(url, body)
            ended.put((request.request_id, self._completion(request, raw)))
        except EndpointUnavailable as error:
            ended.put((request.request_id, EndpointUnavailable(f"Request {request.request_id!r}: {error}")))
        except (EndpointRefused, ReplyError) as error:
            ended.put((request.request_id, type(error)(f"Request {request.request_id!r}: {error}")))
        except Exception as error:
            ended.put((request.request_id, error))
            raise

    def _question(self, request: GenerateRequest) -> tuple[str, dict[str, Any]]:
        params, prompt = request.params, request.prompt_ids.tolist()
        room = min(params.max_new_tokens, self.context_window - len(prompt))
        stops = list(params.stop_token_ids)
        sampling = {"temperature": params.temperature, "top_p": 1.0, "stop_token_ids": stops}
        endpoint = self.config.endpoint
        if self.config.interface == "sglang":
            root = endpoint.base_url.rstrip("/").removesuffix("/v1")
            sampling |= {"max_new_tokens": room, "sampling_seed": params.seed}
            return f"{root}/generate", {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True}
        return "/completions", sampling | {
            "model": endpoint.model,
            "prompt": prompt,
            "max_tokens": room,
            "seed": params.seed,
            "logprobs": 1,  # the drawn token, and the likeliest, which is not read
            "return_token_ids": True,
            "ignore_eos": True,  # the request's own stop tokens end it, and no other
        }

    def _completion(self, request: GenerateRequest, raw: Any) -> Completion:
        """Raises: ReplyError for an answer without ids or log-probs, or one that breaks the engine's contract."""
        read = _read_sglang if self.config.interface == "sglang" else _read_vllm
        try:
            ids, logprobs, reason, version = read(raw, request.prompt_ids.tolist())
            tokens, values = array("i", ids), array("f", logprobs)
        except (KeyError, IndexError, TypeError, ValueError, OverflowError, AttributeError) as error:
            kind = f"{type(error).__name__}: " if not isinstance(error, ReplyError) else ""
            raise ReplyError(f"The answer cannot be used: {kind}{error}") from None
        params, stops = request.params, request.params.stop_token_ids
        room = min(params.max_new_tokens, self.context_window - len(request.prompt_ids))
        wrong = {
            f"{len(tokens)} ids and {len(values)} log-probs": len(tokens) != len(values),
            f"{len(tokens)} tokens, expected 1 to {room}": not 1 <= len(tokens) <= room,
            "a log-prob that is above 0 or not finite": not all(math.isfinite(v) and v <= 1e-6 for v in values),
            f"finish reason {reason!r}, expected stop or length": reason not in ("stop", "length"),
            "an id below 0": any(token < 0 for token in tokens),
            "tokens behind a stop token": any(token in stops for token in tokens[:-1]),
            f"stopped at token {tokens[-1] if tokens else None}, which is none of the request's stop tokens {stops}": (
                reason == "stop" and (not tokens or tokens[-1] not in stops)
            ),
        }
        if found := [text for text, is_wrong in wrong.items() if is_wrong]:
            raise ReplyError(f"The answer cannot be used: {'; '.join(found)}.")
        if params.temperature == 0.0:
            values = array("f", [0.0] * len(tokens))
        values = array("f", [min(value, 0.0) for value in values])
        return Completion(
            request_id=request.request_id,
            token_ids=tokens,
            logprobs=values,
            entropies=array("f", [0.0 - value for value in values]),
            kept_mass=array("f", [1.0] * len(tokens)),
            finish_reason=cast(Any, "stop" if tokens[-1] in stops else "length"),
            weight_version=self.weight_version if version is None else version,
        )


Answer = tuple[list[int], list[float], str, int | None]


def _read_vllm(raw: Any, prompt: list[int]) -> Answer:
    choice = raw["choices"][0]
    if choice.get("token_ids") is None:
        raise ReplyError("the server returned no token ids (`token_ids`); a recent vLLM does, a plain API never.")
    if (choice.get("logprobs") or {}).get("token_logprobs") is None:
        raise ReplyError("the server returned no log-probs (`logprobs.token_logprobs`).")
    seen = choice.get("prompt_token_ids")
    if seen is not None and seen != prompt:
        raise ReplyError(f"the server saw another prompt: {len(seen)} tokens, and {len(prompt)} were sent.")
    return choice["token_ids"], choice["logprobs"]["token_logprobs"], choice["finish_reason"], _version(raw)


def _read_sglang(raw: Any, prompt: list[int]) -> Answer:
    meta = raw["meta_info"]
    if meta.get("output_token_logprobs") is None:
        raise ReplyError("the server returned no log-probs (`meta_info.output_token_logprobs`).")
    if meta.get("prompt_tokens", len(prompt)) != len(prompt):
        raise ReplyError(f"the server saw {meta['prompt_tokens']} prompt tokens, and {len(prompt)} were sent.")
    ids = [entry[1] for entry in meta["output_token_logprobs"]]
    if raw.get("output_ids", ids) != ids:
        raise ReplyError("`output_ids` are not the ids that the log-probs name.")
    return ids, [entry[0] for entry in meta["output_token_logprobs"]], meta["finish_reason"]["type"], _version(meta)


def _version(raw: Mapping[str, Any]) -> int | None:
    """The version of the weights where the server names it by a number."""
    said = str(raw.get("weight_version", ""))
    return int(said) if said.isdecimal() else None
