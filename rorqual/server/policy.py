"""A policy as it is served: its name, its words, and the two modes of thinking."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import msgspec

from rorqual.server.context import ContextPolicy
from rorqual.server.errors import invalid
from rorqual.server.structured import SchemaCompiler
from rorqual.text.encoding import Encoding, EncodingConfig


@dataclass
class ServedPolicy:
    """A policy as it is served. name: what clients call it. encoding: with the thinking mode that holds by default.
    system: stands first in a chat without a system message. context: None leaves every context as it is."""

    name: str
    encoding: Encoding
    context_window: int
    vocab_size: int
    system: str = ""
    context: ContextPolicy | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self._encodings = {self.encoding.config.open_thinking: self.encoding}
        self.compiler = SchemaCompiler(self.encoding.tokenizer, self.encoding.stop_token_ids[0], self.vocab_size)

    def encoding_for(self, thinking: bool | None) -> Encoding:
        """The encoding that thinks or does not; None is the default. Raises: ApiError where there is no such mode."""
        if thinking is None:
            return self.encoding
        if thinking not in self._encodings:
            config: EncodingConfig = msgspec.structs.replace(self.encoding.config, open_thinking=thinking)
            try:
                self._encodings[thinking] = Encoding(self.encoding.tokenizer, config)
            except ValueError as error:
                raise invalid(str(error), param="thinking") from error
        return self._encodings[thinking]
