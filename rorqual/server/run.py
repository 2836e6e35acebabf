"""Serving until it is told to stop: the socket, uvicorn, and what must hold before it listens."""

from __future__ import annotations

import ipaddress
import socket
from importlib.util import find_spec
from typing import Any

from rorqual.records import Record
from rorqual.server.app import Door, build_app
from rorqual.server.backend import Backend
from rorqual.server.limits import ServerLimits
from rorqual.server.metrics import Metrics

PACKAGES = ("starlette", "uvicorn", "httpx", "prometheus_client", "llguidance")
BACKLOG = 512
SHUTDOWN_SECONDS = 5


class ServerConfig(Record):
    """Where to listen and who may ask. `api_key` is needed for any host but loopback."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    limits: ServerLimits = ServerLimits()

    def __post_init__(self) -> None:
        """Raises: ValueError naming the option that is amiss."""
        if not 0 <= self.port <= 65535:
            raise ValueError(f"--port {self.port} is out of range; it must be 0 to 65535, where 0 takes a free one.")
        if self.api_key is not None and (not self.api_key.strip() or not self.api_key.isascii()):
            raise ValueError("The API key is empty or not ASCII; give one that a header can hold.")
        if self.api_key is None and not is_loopback(self.host):
            raise ValueError(
                f"--host {self.host} can be reached from other machines, so it needs --api-key-file or --api-key."
            )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_extra() -> None:
    """Raises: ValueError when a package of the extra `serve` is missing."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ValueError(f'Serving needs {", ".join(missing)}. Install the extra: pip install "rorqual[serve]".')


def make_server(backend: Backend, config: ServerConfig, metrics: Metrics) -> Any:
    """A uvicorn server that has not started: `run()` serves until SIGINT or SIGTERM, then ends within seconds."""
    import uvicorn

    door = Door(config.api_key, local_only=is_loopback(config.host) and config.api_key is None)
    app = build_app(backend, config.limits, metrics, door)
    return uvicorn.Server(
        uvicorn.Config(
            app,
            host=config.host,
            port=config.port,
            log_level="warning",
            access_log=False,
            server_header=False,
            backlog=BACKLOG,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=SHUTDOWN_SECONDS,
            lifespan="on",
            ws="none",
        )
    )


def listen(config: ServerConfig) -> socket.socket:
    """The socket, bound. Its connections send at once: a token must not wait for the reader's acknowledgement of the
    one before, which takes 40 ms. Raises: ValueError when the address cannot be had."""
    try:
        family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        place = socket.create_server((config.host, config.port), family=family, backlog=BACKLOG)
        place.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return place
    except OSError as error:
        raise ValueError(
            f"Cannot listen on {config.host}:{config.port} ({error.strerror or error}). Choose another --port or "
            "--host."
        ) from error
