"""Structured output: a JSON schema becomes a mask over the next token, so that what is drawn cannot break it.

The masks are llguidance's (https://github.com/guidance-ai/llguidance). A keyword that it cannot enforce is a refusal,
never a schema that holds in part. A thinking policy thinks freely, and is bound from its `</think>` on.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

from rorqual.server.errors import ApiError, invalid
from rorqual.text.tokenizer import Tokenizer

FORMATTING: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""As Python and DeepSeek write JSON. Free white space would let a weak policy write nothing else for ever."""

LOGIT_ALLOWED = 200
"""What llguidance writes for a token that may come; 0 stands for the others."""


class SchemaCompiler:
    """Makes constraints for one tokenizer. The extra `serve` brings llguidance."""

    def __init__(self, tokenizer: Tokenizer, eos_id: int, vocab_size: int) -> None:
        self._tokenizer, self._eos_id = tokenizer, eos_id
        self._vocab_size = max(vocab_size, tokenizer.vocab_size)
        self._compiled: Any = None
        self._lock = threading.Lock()

    def constraint(self, schema: Mapping[str, Any], thinks: bool) -> JsonConstraint:
        """A fresh constraint for one answer. thinks: the answer begins with thinking.

        Raises: ApiError (400) for a schema that is none, or that cannot be enforced in full, and where the end of the
        thinking cannot be seen because the tokenizer has no token for it.
        """
        from llguidance import LLMatcher

        close_id = None
        if thinks:
            if "think_close" not in self._tokenizer.special_tokens:
                raise invalid(
                    "This model's tokenizer has no </think> token, so a response format needs thinking turned off.",
                    param="response_format",
                )
            close_id = self._tokenizer.special_id("think_close")
        grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=FORMATTING)
        backend = self._backend()
        problem = LLMatcher.validate_grammar(grammar, backend)
        if problem:
            raise ApiError(
                400,
                f"The schema cannot be enforced: {problem.strip().splitlines()[0]}. Leave out what it names.",
                code="unsupported_schema",
                param="response_format",
            )
        return JsonConstraint(LLMatcher(backend, grammar), self._eos_id, self._vocab_size, close_id)

    def _backend(self) -> Any:
        from llguidance import LLTokenizer

        with self._lock:
            if self._compiled is None:
                try:
                    self._compiled = LLTokenizer(
                        self._tokenizer.to_json(), n_vocab=self._vocab_size, eos_token=self._eos_id, slices=[]
                    )
                except ValueError as error:
                    raise invalid(
                        f"This model's tokenizer cannot be constrained: {str(error).splitlines()[0]}.",
                        param="response_format",
                    ) from error
            return self._compiled


class JsonConstraint:
    """Implements `engines.steering.Constraint` for one answer.

    close_id: everything may come up to this token, None where the answer begins at once. problem: why the matcher gave
    up, and empty where it did not; the answer is then ended, and must be refused.
    """

    def __init__(self, matcher: Any, eos_id: int, vocab_size: int, close_id: int | None) -> None:
        self.problem = ""
        self._matcher, self._eos_id, self._vocab_size = matcher, eos_id, vocab_size
        self._close_id = close_id

    def allowed(self) -> np.ndarray | None:
        """Flags of all tokens; only the end of the sentence where nothing else may follow."""
        if self._close_id is not None:
            flags = np.ones(self._vocab_size, dtype=bool)
            flags[self._eos_id] = False  # an answer that ends while it thinks has no JSON in it
            return flags
        if self._matcher.is_error() or self._matcher.is_stopped():
            self.problem = self._matcher.get_error()
            flags = np.zeros(self._vocab_size, dtype=bool)
            flags[self._eos_id] = True
            return flags
        return np.frombuffer(self._matcher.compute_logit_bias(), dtype=np.uint8)[: self._vocab_size] == LOGIT_ALLOWED

    def accept(self, token_id: int) -> None:
        if self._close_id is not None:
            if token_id == self._close_id:
                self._close_id = None
        elif token_id != self._eos_id and not self._matcher.consume_token(token_id):
            self.problem = self._matcher.get_error()
