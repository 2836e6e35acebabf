"""What `/metrics` tells Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Metrics:
    """Counters of one server, in a registry of their own. The extra `serve` brings prometheus-client."""

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self._registry = CollectorRegistry()
        self._gauge: Callable[..., Any] = Gauge
        self._gauges: dict[str, Any] = {}
        kept: dict[str, Any] = {"registry": self._registry}
        self.requests = Counter("rorqual_requests", "Answered requests.", ["route", "status"], **kept)
        self.abandoned = Counter("rorqual_requests_abandoned", "Requests whose client went away.", **kept)
        self.prompt_tokens = Counter("rorqual_prompt_tokens", "Tokens of prompts.", **kept)
        self.generated_tokens = Counter("rorqual_generated_tokens", "Tokens drawn for clients.", **kept)
        seconds: dict[str, Any] = {"buckets": SECONDS, **kept}
        self.request_seconds = Histogram("rorqual_request_seconds", "From a request to its answer.", **seconds)
        self.first_token_seconds = Histogram(
            "rorqual_first_token_seconds", "To the first token of a stream.", **seconds
        )

    def page(self, load: Mapping[str, float]) -> bytes:
        """All of them as text; `load` is what is in flight now."""
        from prometheus_client import generate_latest

        for name, value in load.items():
            if name not in self._gauges:
                self._gauges[name] = self._gauge(f"rorqual_{name}", "In flight now.", registry=self._registry)
            self._gauges[name].set(value)
        return bytes(generate_latest(self._registry))
