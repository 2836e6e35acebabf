"""A Segment while it grows: given tokens and completions are appended, nothing is ever changed.

It holds what was drawn twice, in its columns and as it came from the engine, and compares: a token that is trained on
is one that was drawn, at the place where it was drawn.
"""

from __future__ import annotations

import math
from array import array

from rorqual.records import BreakReason, Completion, KeptTokens, Routes, Segment, Selections


class GrowingSegment:
    """The columns of one Segment while it grows.

    token_ids: all of it so far, what the next completion continues. Tokens that were given behind the last completion
    are no part of the Segment: nothing was drawn after them.
    """

    def __init__(self) -> None:
        self.token_ids = array("i")
        self._sampled = array("b")
        self._logprobs = array("f")
        self._entropies = array("f")
        self._kept_mass = array("f")
        self._kept: KeptTokens | None = KeptTokens(offsets=array("q", [0]), ids=array("i"))
        self._routes: Routes | None = None
        self._selections: Selections | None = None
        self._weight_versions: list[int] = []
        self._drawn: list[tuple[int, array[int]]] = []

    def append_given(self, ids: array[int]) -> None:
        """Tokens that the policy did not draw."""
        self._append(ids, 0, array("f", bytes(4 * len(ids))), array("f", bytes(4 * len(ids))))

    def append_completion(self, completion: Completion) -> None:
        """Tokens that it drew. Raises: ValueError when the columns of the completion differ in length."""
        self._drawn.append((len(self.token_ids), completion.token_ids[:]))
        self._append(completion.token_ids, 1, completion.logprobs, completion.entropies)
        self._check(completion)
        self._kept_mass += completion.kept_mass
        self._kept = _joined(self._kept, completion.kept)
        self._routes, self._selections = completion.routes, completion.selections
        self._weight_versions.append(completion.weight_version)

    def segment(self, parent: int | None = None, break_reason: BreakReason | None = None) -> Segment:
        """The Segment up to its last completion; there must be one.

        Its weight version is the oldest of its completions, its kept mass the mean over sampled tokens.
        Raises: AssertionError when a token that counts as sampled was not drawn where it stands; it never does.
        """
        last, drawn = self._drawn[-1]
        end = last + len(drawn)
        self._check_drawn(end)
        return Segment(
            token_ids=self.token_ids[:end],
            sampled=self._sampled[:end],
            logprobs=self._logprobs[:end],
            entropies=self._entropies[:end],
            weight_version=min(self._weight_versions),
            kept=self._kept,
            kept_mass=math.fsum(self._kept_mass) / len(self._kept_mass),
            routes=self._routes,
            selections=self._selections,
            parent=parent,
            break_reason=break_reason,
        )

    @property
    def has_sampled(self) -> bool:
        return bool(self._drawn)

    def _check_drawn(self, end: int) -> None:
        flags = array("b", bytes(end))
        for start, ids in self._drawn:
            flags[start : start + len(ids)] = array("b", [1]) * len(ids)
            if self.token_ids[start : start + len(ids)] != ids:
                raise AssertionError(f"The tokens at {start} are not the {len(ids)} that were drawn there.")
        if flags != self._sampled[:end]:
            raise AssertionError("Tokens count as sampled that were not drawn, or drawn ones do not.")

    def _append(self, ids: array[int], sampled: int, logprobs: array[float], entropies: array[float]) -> None:
        self.token_ids = self.token_ids + ids
        self._sampled = self._sampled + array("b", [sampled]) * len(ids)
        self._logprobs = self._logprobs + logprobs
        self._entropies = self._entropies + entropies

    def _check(self, completion: Completion) -> None:
        drawn, fed = len(completion.token_ids), len(self.token_ids) - 1
        expected = {"token_ids": max(drawn, 1), "logprobs": drawn, "entropies": drawn, "kept_mass": drawn}
        lengths = {name: len(getattr(completion, name)) for name in expected}
        if completion.kept is not None:
            expected["kept"], lengths["kept"] = drawn, len(completion.kept)
        for name in ("routes", "selections"):
            replayed = getattr(completion, name)
            if replayed is not None:
                expected[name], lengths[name] = fed, len(replayed)
        if lengths != expected:
            raise ValueError(
                f"Completion {completion.request_id} has columns of lengths {lengths}, expected {expected}: "
                "the engine breaks its contract."
            )


def _joined(kept: KeptTokens | None, more: KeptTokens | None) -> KeptTokens | None:
    if kept is None or more is None:
        return None
    shift = kept.offsets[-1]
    return KeptTokens(offsets=kept.offsets + array("q", [shift + o for o in more.offsets[1:]]), ids=kept.ids + more.ids)
