"""The encoding that the rollout tests share."""

from __future__ import annotations

import pytest

from rorqual.text.encoding import Encoding
from rorqual.text.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def encoding() -> Encoding:
    return Encoding(train_tokenizer(["what is 4 + 3?", "and 7? that is all"] * 9, 300))
