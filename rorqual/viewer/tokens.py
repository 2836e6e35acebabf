"""Token id -> the text that the page shows for it."""

from __future__ import annotations

from collections.abc import Iterable

import tokenizers

from rorqual.store.run import Run


class TokenTexts:
    """Texts of single tokens, and which of them were asked for. Without a tokenizer a token is shown as its number."""

    def __init__(self, tokenizer: tokenizers.Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}

    @classmethod
    def of_run(cls, run: Run) -> TokenTexts:
        """With the tokenizer that the run keeps, if it keeps one."""
        path = run.path / "tokenizer" / "tokenizer.json"
        return cls(tokenizers.Tokenizer.from_file(str(path)) if path.exists() else None)

    def add(self, ids: Iterable[int]) -> None:
        """Note that these tokens are shown."""
        for token_id in set(ids) - self._texts.keys():
            self._texts[token_id] = self._text(token_id)

    def used(self) -> dict[str, str]:
        """Texts of all tokens noted, by id."""
        return {str(token_id): text for token_id, text in sorted(self._texts.items())}

    def _text(self, token_id: int) -> str:
        if self._tokenizer is None:
            return f"⟨{token_id}⟩"
        text: str = self._tokenizer.decode([token_id], skip_special_tokens=False)
        if text and "\ufffd" not in text:
            return text
        return self._tokenizer.id_to_token(token_id) or f"⟨{token_id}⟩"
