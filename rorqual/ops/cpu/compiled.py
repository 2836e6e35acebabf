"""Loops compiled for the CPU by numba (the extra `cpu`), and when they serve.

On a CPU, a small model's time goes into the calls of torch, not into its arithmetic: a loop that does in one pass what
torch does in ten is several times faster. A kernel is written for one core, in float32, on contiguous numpy arrays,
and stands beside a plain torch twin, which serves everywhere else. NaN is never lost on the way through one.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

try:
    import numba

    NUMBA: ModuleType | None = numba
except ImportError:
    NUMBA = None

Function = TypeVar("Function", bound=Callable[..., object])

ONE_CORE_ELEMENTS = 1 << 17
"""Larger tensors go to torch where it may use several cores."""

FAST_MATH = {"reassoc", "contract", "arcp", "nsz"}
"""What a vectorised sum needs. NaN and infinity keep their meaning."""


def _cache_directory() -> Path | None:
    """A folder of its own for each state of this package's sources. numba itself looks only at the file of the function
    that is called, and would go on with the old code of those that it calls in other files.

    Beside the sources, else in the user's cache, else in a folder that this process alone uses. None without numba.
    """
    if NUMBA is None:
        return None
    package = Path(__file__).parent
    sources = b"".join(path.read_bytes() for path in sorted(package.glob("*.py")))
    name = f"kernels-{hashlib.sha256(sources).hexdigest()[:16]}"
    if NUMBA.config.CACHE_DIR:
        return Path(NUMBA.config.CACHE_DIR) / name
    user = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    for base in (package / "__pycache__", Path(user) / "rorqual"):
        try:
            (base / name).mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(base / name, os.W_OK):
            return base / name
    return Path(tempfile.mkdtemp(prefix="rorqual-kernels-"))


_CACHE = _cache_directory()


def compiled(function: Function) -> Function:
    """Compile `function` at its first call, and keep the result on disk; unchanged where numba is missing.

    A compiled function that it calls becomes part of it. Linked, it would exist twice, optimised once and twice, and
    which of the two runs would depend on whether this process compiled or loaded it: they round differently.
    """
    if NUMBA is None:
        return function
    assert _CACHE is not None
    options = {"cache": True, "nogil": True, "forceinline": True, "error_model": "numpy"}
    configured = NUMBA.config.CACHE_DIR
    NUMBA.config.CACHE_DIR = str(_CACHE)
    try:
        result: Any = NUMBA.njit(fastmath=FAST_MATH, **options)(function)
    finally:
        NUMBA.config.CACHE_DIR = configured
    _forgive_damage(result)
    return result


def _forgive_damage(dispatcher: Any) -> None:
    """Let a kernel whose file on disk cannot be read be compiled anew, whatever numba says of the file."""
    cache = dispatcher._cache
    load = cache.load_overload

    def load_or_forget(*args: Any) -> Any:
        try:
            return load(*args)
        except Exception as error:  # noqa: BLE001 (whatever a damaged file makes numba, pickle or LLVM raise)
            warnings.warn(f"{cache.cache_path} holds a damaged kernel ({error!r}); it is made anew.", stacklevel=2)
            cache.flush()
            return None

    cache.load_overload = load_or_forget


def inlined(function: Function) -> Function:
    """The same, for a small function of no loop that is called in the innermost ones."""
    if NUMBA is None:
        return function
    result: Any = NUMBA.njit(inline="always", fastmath=FAST_MATH, error_model="numpy")(function)
    return result


def available() -> bool:
    """Whether there is a compiler."""
    return NUMBA is not None and not NUMBA.config.DISABLE_JIT


def serves(x: Tensor) -> bool:
    """Whether kernels may be given `x`."""
    return (
        available()
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and (x.numel() <= ONE_CORE_ELEMENTS or torch.get_num_threads() == 1)
    )


def array(x: Tensor) -> np.ndarray:
    """The numbers of `x`, shared where they are contiguous, without its history of gradients."""
    if x.requires_grad:
        x = x.detach()
    result: np.ndarray = (x if x.is_contiguous() else x.contiguous()).numpy()
    return result


@inlined
def exp(x: np.float32) -> np.float32:
    """e^x in float32 to 2e-7 relative, 0 where x is below -87; x must not exceed 88. A form that compilers vectorise:
    2^n times a polynomial on [-ln 2 / 2, ln 2 / 2] (Cephes expf)."""
    low = np.float32(-87.0)
    held = low if x < low else x
    n = np.floor(held * np.float32(1.44269504) + np.float32(0.5))
    r = held - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    power = np.int32((np.int32(n) + np.int32(127)) << np.int32(23))
    result = (p * r * r + r + np.float32(1.0)) * power.view(np.float32)
    return np.float32(0.0) if x < low else result
