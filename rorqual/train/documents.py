"""Pre-training documents in a fixed order that can be taken up again at any point."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping
from typing import Any

import torch


class DocumentStream:
    """Batches of documents by index: `source(index)` is document `index`, however often it is asked.

    An endless source (a generator of documents seeded by the index) is read straight through. With `num_documents` the
    corpus is finite, and each epoch reads it in a new order that is fixed by `seed` and the epoch.
    Raises: ValueError for a batch or corpus without documents.
    """

    def __init__(
        self,
        source: Callable[[int], array[int]],
        documents_per_batch: int,
        num_documents: int | None = None,
        seed: int = 0,
    ) -> None:
        if documents_per_batch < 1 or (num_documents is not None and num_documents < 1):
            raise ValueError(
                f"documents_per_batch = {documents_per_batch}, num_documents = {num_documents}; expected at least 1."
            )
        self._source, self._documents_per_batch = source, documents_per_batch
        self._num_documents, self._seed = num_documents, seed
        self._cursor = 0
        self._shuffled: tuple[int, list[int]] = (-1, [])

    @property
    def cursor(self) -> int:
        """Documents read so far, over all epochs."""
        return self._cursor

    def next_batch(self) -> list[array[int]]:
        """The next `documents_per_batch` documents; an epoch may end inside a batch."""
        last = self._cursor + self._documents_per_batch
        batch = [self._source(self._index(position)) for position in range(self._cursor, last)]
        self._cursor = last
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {"cursor": self._cursor, "num_documents": self._num_documents, "seed": self._seed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken. Raises: ValueError when it was taken from another order of documents."""
        for name, mine in (("num_documents", self._num_documents), ("seed", self._seed)):
            if state[name] != mine:
                raise ValueError(f"the data cursor was saved with {name} = {state[name]}, this stream has {mine}.")
        self._cursor = state["cursor"]

    def _index(self, position: int) -> int:
        if self._num_documents is None:
            return position
        epoch, place = divmod(position, self._num_documents)
        if self._shuffled[0] != epoch:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            self._shuffled = (epoch, torch.randperm(self._num_documents, generator=generator).tolist())
        return self._shuffled[1][place]
