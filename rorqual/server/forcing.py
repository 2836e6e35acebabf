"""`tool_choice` that forces a call: what the policy draws first is bound to the beginning of a call of an offered tool.

The name is chosen by the policy where several are offered; the arguments are its own, and may break the format.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rorqual.records import ToolSpec
from rorqual.server.errors import unsupported
from rorqual.text.encoding import Encoding


class ForcedCall:
    """Implements `engines.steering.Constraint` for one answer.

    beginnings: token ids of which one must be drawn first. close_id: the end of the thinking before, None without.
    problem: always empty; what was asked for is begun in every answer that is long enough.
    """

    problem = ""

    def __init__(
        self, beginnings: Sequence[Sequence[int]], eos_ids: Sequence[int], size: int, close_id: int | None
    ) -> None:
        self._open = [list(each) for each in beginnings]
        self._eos_ids, self._size, self._close_id = list(eos_ids), size, close_id
        self._place = 0

    def allowed(self) -> np.ndarray | None:
        """Anything but an end while it thinks, then what may continue a beginning, then anything."""
        if self._close_id is not None:
            flags = np.ones(self._size, dtype=bool)
            flags[self._eos_ids] = False
            return flags
        if not self._open:
            return None
        flags = np.zeros(self._size, dtype=bool)
        flags[[each[self._place] for each in self._open]] = True
        return flags

    def accept(self, token_id: int) -> None:
        if self._close_id is not None:
            if token_id == self._close_id:
                self._close_id = None
            return
        self._open = [each for each in self._open if each[self._place] == token_id]
        self._place += 1
        if any(len(each) == self._place for each in self._open):
            self._open = []


def forced_call(encoding: Encoding, tools: Sequence[ToolSpec], name: str | None, size: int) -> ForcedCall:
    """A call of the tool of this name, or of any. size: of the vocabulary.

    Raises: ApiError for a tool that is not offered, and where the end of the thinking cannot be seen.
    """
    names = [tool.name for tool in tools if name in (None, tool.name)]
    tags = encoding.format.calls
    if not names or tags is None:
        what = f"{name!r} is not one of the tools" if name else "There are no tools"
        raise unsupported(f"A call cannot be forced: {what} that are offered.", "tool_choice")
    tokenizer, close_id = encoding.tokenizer, None
    if encoding.config.open_thinking:
        if "think_close" not in tokenizer.special_tokens:
            raise unsupported("A call cannot be forced behind thinking here: turn thinking off.", "tool_choice")
        close_id = tokenizer.special_id("think_close")
    opening, closing = tags.block_open + tags.call_open, tags.arguments
    beginnings = [
        [
            token
            for text, is_format in ((opening, True), (each, False), (closing, True))
            for token in tokenizer.encode(text, allow_special=is_format)
        ]
        for each in names
    ]
    return ForcedCall(beginnings, encoding.stop_token_ids, size, close_id)
