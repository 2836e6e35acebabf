"""Buffers that keep their precision when the model around them is cast."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class ExactBuffers(nn.Module):
    """A module whose own buffers follow `.to(device)` but not `.to(dtype)`, `.half()`, `.bfloat16()` or `.double()`.

    Rounding a rotary frequency to bfloat16 shifts every far position, and a balancing step of 1e-3 vanishes in a
    bfloat16 bias.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ExactBuffers:
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, kept in before.items():
            moved = getattr(self, name)
            if moved.dtype != kept.dtype:
                setattr(self, name, kept.to(moved.device))
        return self
