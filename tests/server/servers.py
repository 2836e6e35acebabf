"""Servers on loopback for tests: a tiny random policy, an engine that says what it is told, and another server."""

from __future__ import annotations

import contextlib
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import openai
import torch

from rorqual.engines.local import EngineConfig, LocalEngine
from rorqual.engines.steering import Constraint, Drawn
from rorqual.models.config import ModelConfig
from rorqual.models.decoder import Decoder
from rorqual.records import Completion, GenerateRequest
from rorqual.server.backend import Backend
from rorqual.server.limits import ServerLimits
from rorqual.server.local import LocalBackend
from rorqual.server.metrics import Metrics
from rorqual.server.policy import ServedPolicy
from rorqual.server.run import ServerConfig, listen, make_server
from rorqual.text.encoding import Encoding
from tests.text.conversations import TOKENIZER, encoding, ids_of

MODEL = ModelConfig(
    family="qwen3",
    vocab_size=TOKENIZER.vocab_size,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    context_window=512,
    qk_norm=True,
    initializer_range=0.3,
)
EOS = "<｜end▁of▁sentence｜>"
DIRECT = encoding(open_thinking=False)
START_SECONDS = 20.0


def tiny_model() -> Decoder:
    """In float64, so that what is drawn cannot depend on who shares the batch."""
    model = Decoder(MODEL).double().eval()
    model.initialize(torch.Generator().manual_seed(0))
    return model


class ScriptedEngine:
    """Says what `script` makes of a request, one token a step for each of `num_slots` requests.

    pause_seconds: how long a step takes. `aborted` and `most_in_flight` are what happened.
    """

    def __init__(
        self, script: Callable[[GenerateRequest], Sequence[int]], num_slots: int = 8, pause_seconds: float = 0.0
    ) -> None:
        self.context_window = 4096
        self.num_slots = num_slots
        self.pause_seconds = pause_seconds
        self.aborted: list[str] = []
        self.submitted: list[GenerateRequest] = []
        self.error: BaseException | None = None
        self._script = script
        self._flight: dict[str, tuple[GenerateRequest, list[int], list[int]]] = {}

    @property
    def num_unfinished(self) -> int:
        return len(self._flight)

    def submit(self, requests: Sequence[GenerateRequest], constraints: Mapping[str, Constraint] | None = None) -> None:
        for request in requests:
            self.submitted.append(request)
            self._flight[request.request_id] = (request, list(self._script(request)), [])

    def step(self) -> list[Completion]:
        time.sleep(self.pause_seconds)
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        ended = []
        for request, said, drawn in list(self._flight.values())[: self.num_slots]:
            drawn.append(said[len(drawn)])
            if len(drawn) in (len(said), request.params.max_new_tokens):
                stopped = drawn[-1] in request.params.stop_token_ids
                ended.append(completion(request, drawn, "stop" if stopped else "length"))
                del self._flight[request.request_id]
        return ended

    def drawn(self, since: Mapping[str, int]) -> dict[str, Drawn]:
        return {
            name: Drawn(array("i", drawn[since.get(name, 0) :]), None) for name, (_, _, drawn) in self._flight.items()
        }

    def abort(self, request_id: str) -> bool:
        self.aborted.append(request_id)
        return self._flight.pop(request_id, None) is not None

    def cancel(self) -> None:
        self._flight.clear()


def completion(request: GenerateRequest, drawn: Sequence[int], reason: Any) -> Completion:
    zeros = array("f", [0.0] * len(drawn))
    return Completion(
        request_id=request.request_id,
        token_ids=array("i", drawn),
        logprobs=zeros,
        entropies=zeros,
        kept_mass=zeros,
        finish_reason=reason,
        weight_version=0,
    )


def saying(text: str, **settings: Any) -> ScriptedEngine:
    """An engine that says `text`, its control tokens spelled, to everybody."""
    ids = ids_of(text)
    return ScriptedEngine(lambda request: ids, **settings)


class Served:
    """A server that runs: where it is, and what is behind it."""

    def __init__(self, url: str, backend: Backend, metrics: Metrics) -> None:
        self.url, self.backend, self.metrics = url, backend, metrics

    def client(self, **settings: Any) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, "timeout": 30, **settings}
        )

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=30)


@contextlib.contextmanager
def serving(backend: Backend, metrics: Metrics | None = None, **settings: Any) -> Iterator[Served]:
    """Run a server over `backend` on a free port of loopback, in a thread that ends with the block."""
    metrics = metrics or getattr(backend, "metrics", None) or Metrics()
    config = ServerConfig(port=0, **settings)
    with listen(config) as place:
        server = make_server(backend, config, metrics)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [place]}, daemon=True)
        thread.start()
        deadline = time.monotonic() + START_SECONDS
        while not server.started and thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert server.started
        try:
            yield Served(f"http://127.0.0.1:{place.getsockname()[1]}", backend, metrics)
        finally:
            server.should_exit = True
            thread.join(START_SECONDS)
            assert not thread.is_alive()


@contextlib.contextmanager
def serving_engine(
    engine: Any,
    served: Encoding = DIRECT,
    num_slots: int = 8,
    system: str = "",
    context: Any = None,
    name: str = "tiny",
    **limits: Any,
) -> Iterator[Served]:
    bounds = ServerLimits(**limits)
    policy = ServedPolicy(
        name=name,
        encoding=served,
        context_window=engine.context_window,
        vocab_size=TOKENIZER.vocab_size,
        system=system,
        context=context,
    )
    backend = LocalBackend(policy, engine, num_slots, bounds, Metrics())
    with serving(backend, limits=bounds) as server:
        yield server


def local_engine(num_slots: int = 8) -> LocalEngine:
    return LocalEngine(tiny_model(), EngineConfig(num_slots=num_slots))


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.01)
