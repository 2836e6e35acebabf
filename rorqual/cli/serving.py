"""The `serve` verb: a policy, or another server, behind an OpenAI-compatible address."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast, get_args

import msgspec
from rich.console import Console

from rorqual.cli.options import check_option
from rorqual.cli.policies import load_policy
from rorqual.engines.local import EngineConfig, LocalEngine
from rorqual.rollout.compaction import Strategy
from rorqual.rollout.context import ContextConfig
from rorqual.server.backend import Backend
from rorqual.server.context import ContextPolicy
from rorqual.server.limits import ServerLimits
from rorqual.server.local import LocalBackend
from rorqual.server.metrics import Metrics
from rorqual.server.policy import ServedPolicy
from rorqual.server.run import ServerConfig, check_extra, listen, make_server
from rorqual.server.upstream import UpstreamBackend
from rorqual.text.encoding import Encoding, EncodingConfig
from rorqual.text.formats import FORMATS
from rorqual.text.retention import Retention
from rorqual.text.tokenizer import Tokenizer

DEFAULT_UPSTREAM_RETENTION: Retention = "since_last_user"
_HINT = " To count tokens for --context, give --tokenizer, --format and --window."


@dataclass(frozen=True)
class ServeCommand:
    """What was typed."""

    policy: Path | None
    upstream: str | None
    upstream_key_env: str | None
    host: str
    port: int
    api_key: str | None
    api_key_file: Path | None
    name: str | None
    form: str | None
    retention: str | None
    thinking: bool | None
    context: str | None
    tokenizer: Path | None
    window: int | None
    slots: int
    max_waiting: int
    max_new_tokens: int
    stage: str | None
    template: bool
    device: str
    config: ServerConfig = field(init=False)

    def __post_init__(self) -> None:
        """What can be said before anything is loaded. Raises: ValueError naming the option."""
        if (self.policy is None) == (self.upstream is None):
            raise ValueError(
                "Give a run or a checkpoint to serve, or --upstream URL to stand in front of one; not both."
            )
        own: dict[str, object] = {"--name": self.name, "--stage": self.stage}
        if self.tokenizer is None:
            own |= {"--format": self.form, "--context": self.context, "--window": self.window}
        own |= {"--template": self.template or None, "--thinking": self.thinking}
        for option, value in own.items():
            if self.upstream is not None and value is not None:
                raise ValueError(f"{option} is about a policy of ours; the server at --upstream decides that.{_HINT}")
        if self.upstream is None and (self.tokenizer is not None or self.window is not None):
            raise ValueError("--tokenizer and --window count the tokens of an --upstream; leave them out.")
        if self.tokenizer is not None and (self.context is None or self.window is None or self.form is None):
            raise ValueError("--tokenizer is there to manage the context: give --context, --window and --format too.")
        if self.context is not None and self.context not in get_args(Strategy):
            raise ValueError(f"--context {self.context!r}: choose {', '.join(get_args(Strategy))}.")
        check_option("--window", self.window, self.window is None or self.window >= 2, "2 or more")
        self.context_policy(self.window or 2)
        if self.upstream is None and self.upstream_key_env is not None:
            raise ValueError("--upstream-key-env names the key of an --upstream; leave it out.")
        if self.retention is not None and self.retention not in get_args(Retention):
            raise ValueError(f"--retention {self.retention!r}: choose {', '.join(get_args(Retention))}.")
        if self.form is not None and self.form not in FORMATS:
            raise ValueError(f"--format {self.form!r}: choose {', '.join(sorted(FORMATS))}.")
        if self.form is not None and self.template:
            raise ValueError("--template takes the place of a format; leave --format out.")
        check_option("--slots", self.slots, self.slots >= 1, "1 or more")
        check_option("--max-waiting", self.max_waiting, self.max_waiting >= 0, "0 or more")
        check_option("--max-new-tokens", self.max_new_tokens, self.max_new_tokens >= 0, "0 or more")
        limits = ServerLimits(max_waiting=self.max_waiting, max_new_tokens=self.max_new_tokens)
        config = ServerConfig(host=self.host, port=self.port, api_key=self._key(), limits=limits)
        object.__setattr__(self, "config", config)

    def context_policy(self, window: int) -> ContextPolicy | None:
        """Raises: ValueError for a strategy that cannot be served."""
        if self.context in (None, "none"):
            return None
        return ContextPolicy(ContextConfig(strategy=cast(Strategy, self.context)), window)

    def _key(self) -> str | None:
        if self.api_key is not None and self.api_key_file is not None:
            raise ValueError("Give --api-key or --api-key-file, not both.")
        if self.api_key_file is None:
            return self.api_key
        try:
            return self.api_key_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--api-key-file {self.api_key_file} cannot be read: {type(error).__name__}.") from error


def serve(command: ServeCommand, console: Console) -> None:
    """Serve until SIGINT or SIGTERM. Raises: ValueError for what cannot be served."""
    check_extra()
    metrics = Metrics()
    backend, what = _upstream(command) if command.upstream is not None else _local(command, metrics)
    with listen(command.config) as place:
        host = f"[{command.host}]" if ":" in command.host else command.host
        port = place.getsockname()[1]
        console.print(f"Serving {what} at http://{host}:{port}/v1; Ctrl-C ends it.", highlight=False, soft_wrap=True)
        make_server(backend, command.config, metrics).run(sockets=[place])


def _upstream(command: ServeCommand) -> tuple[Backend, str]:
    key = None
    if command.upstream_key_env is not None:
        key = os.environ.get(command.upstream_key_env)
        if not key:
            raise ValueError(f"--upstream-key-env: the environment has no variable {command.upstream_key_env}.")
    limits = command.config.limits
    retention: Any = command.retention or DEFAULT_UPSTREAM_RETENTION
    in_flight = command.slots + command.max_waiting
    context = None
    policy = command.context_policy(command.window or 2)
    if policy is not None and command.tokenizer is not None:
        config = EncodingConfig(format=command.form or "chat", retention=retention)
        context = (policy, Encoding(Tokenizer.load(command.tokenizer), config))
    backend = UpstreamBackend(command.upstream or "", key, retention, limits, in_flight, context)
    return backend, f"{command.upstream}"


def _local(command: ServeCommand, metrics: Metrics) -> tuple[Backend, str]:
    policy = load_policy(command.policy or "", command.stage, command.template, command.device)
    changes: dict[str, Any] = {
        "format": command.form,
        "retention": command.retention,
        "open_thinking": command.thinking,
    }
    changes = {name: value for name, value in changes.items() if value is not None}
    config = msgspec.structs.replace(policy.encoding.config, **changes)
    engine = LocalEngine(policy.model, EngineConfig(num_slots=command.slots))
    served = ServedPolicy(
        name=command.name or policy.label,
        encoding=Encoding(policy.encoding.tokenizer, config),
        context_window=engine.context_window,
        vocab_size=policy.model.config.vocab_size,
        system=policy.dialogue.system,
        context=command.context_policy(engine.context_window),
    )
    return LocalBackend(served, engine, command.slots, command.config.limits, metrics), served.name
