"""From float8 e4m3 and a scale back to float32, as a loop for one core; the torch twin is in `models/index_keys.py`.

Torch converts float8 number by number on a CPU; a table of all 256 of them is several times faster.

Shapes: N keys, C dimensions, B = C + 4 bytes of a key.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rorqual.ops.cpu.compiled import array, compiled
from rorqual.ops.cpu.workers import spread

NUMBERS = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
"""The number of each byte."""

KEYS_PER_TASK = 8192


def unpack_fp8(stored_NB: Tensor) -> Tensor:
    """Keys [N, C] in float32 of contiguous bytes [N, C + 4], the last four of which are the scale."""
    out_NC = torch.empty(len(stored_NB), stored_NB.shape[1] - 4)

    def work(start: int) -> None:
        keys = slice(start, start + KEYS_PER_TASK)
        _unpack(array(stored_NB[keys]), NUMBERS, array(out_NC[keys]))

    spread(work, range(0, len(stored_NB), KEYS_PER_TASK))
    return out_NC


@compiled
def _unpack(stored_NB: np.ndarray, numbers: np.ndarray, out_NC: np.ndarray) -> None:
    width = out_NC.shape[1]
    for n in range(len(out_NC)):
        scale = stored_NB[n, width:].copy().view(np.float32)[0]
        for c in range(width):
            out_NC[n, c] = numbers[stored_NB[n, c]] * scale
