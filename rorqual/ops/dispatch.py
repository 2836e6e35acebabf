"""Which implementation of sparse attention runs: the one that is named, else the one that fits where the tensors are.

Every implementation is a module with the same functions, and each is compared with the twins (`dsa.py`, `nsa.py`):
tiled (plain torch, any device, any float dtype), compiled (loops for a CPU, the extra `cpu`) and triton (CUDA, the
extra `gpu`; in Triton's interpreter also a CPU). No environment variable has a say.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from typing import Final, Literal, Protocol, cast, get_args

import torch
from torch import Tensor

from rorqual.ops.cpu.compiled import available
from rorqual.ops.dsa import IndexerOutput
from rorqual.ops.dsa_tiled import MainAttention
from rorqual.ops.nsa import BlockSizes, Branches

Kernels = Literal["auto", "tiled", "compiled", "triton"]
"""auto: triton on CUDA, compiled on a CPU in float32, tiled elsewhere and where the extra is missing."""

DSA: Final[Mapping[str, str]] = {
    "tiled": "rorqual.ops.dsa_tiled",
    "compiled": "rorqual.ops.cpu.dsa",
    "triton": "rorqual.ops.gpu.dsa",
}

NSA: Final[Mapping[str, str]] = {
    "tiled": "rorqual.ops.nsa_tiled",
    "compiled": "rorqual.ops.cpu.nsa",
    "triton": "rorqual.ops.gpu.nsa",
}

NEEDS: Final[Mapping[str, tuple[str, str]]] = {"compiled": ("numba", "cpu"), "triton": ("triton", "gpu")}
"""The package that an implementation is written in, and the extra that brings it."""

TRITON_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)


class DSAKernels(Protocol):
    """Signatures and shapes: `dsa_tiled.py`."""

    def select_keys(self, index: IndexerOutput, last_RQ: Tensor, key_valid_RK: Tensor | None, top_k: int) -> Tensor: ...

    def sparse_attention(
        self, q_RQHE: Tensor, k_RKGE: Tensor, v_RKGV: Tensor, selected_RQS: Tensor, scale: float
    ) -> Tensor: ...

    def indexer_kl(
        self, main: MainAttention, index: IndexerOutput, row_weight_RQ: Tensor, selected_RQS: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def attention_recall(self, main: MainAttention, index: IndexerOutput, top_k: int) -> Tensor: ...


class NSAKernels(Protocol):
    """Signature and shapes: `nsa.py`."""

    def native_sparse_attention(
        self,
        q_RQHE: Tensor,
        branches: Branches,
        gates_RQH3: Tensor,
        position_RQ: Tensor,
        sizes: BlockSizes,
        scale: float,
    ) -> Tensor: ...


def dsa_kernels(x: Tensor, kernels: Kernels = "auto") -> DSAKernels:
    """The implementation for `x`. Raises: ValueError for an unknown name, and one whose extra is missing."""
    return cast(DSAKernels, importlib.import_module(DSA[chosen(x, kernels, DSA)]))


def nsa_kernels(x: Tensor, kernels: Kernels = "auto") -> NSAKernels:
    """The implementation for `x`. Raises: ValueError for an unknown name, and one whose extra is missing."""
    return cast(NSAKernels, importlib.import_module(NSA[chosen(x, kernels, NSA)]))


def chosen(x: Tensor, kernels: Kernels, among: Mapping[str, str]) -> str:
    """The name of the implementation. Raises: ValueError for an unknown name, and one whose extra is missing."""
    if kernels not in get_args(Kernels):
        raise ValueError(f"kernels = {kernels!r}; expected one of {', '.join(get_args(Kernels))}.")
    if kernels == "auto":
        fitting = _fitting(x)
        return fitting if fitting in among else "tiled"
    if kernels not in among:
        raise ValueError(f"kernels = {kernels!r} has no form of this operation; there is {', '.join(among)}.")
    if kernels in NEEDS and not _installed(kernels):
        package, extra = NEEDS[kernels]
        raise ValueError(
            f'kernels = {kernels!r} needs {package}, which is not installed: pip install "rorqual[{extra}]", or '
            "kernels = 'auto'."
        )
    return kernels


def _fitting(x: Tensor) -> str:
    if x.device.type == "cuda" and x.dtype in TRITON_DTYPES and _installed("triton"):
        return "triton"
    if x.device.type == "cpu" and x.dtype == torch.float32 and _installed("compiled"):
        return "compiled"
    return "tiled"


def _installed(kernels: str) -> bool:
    if kernels == "compiled":
        return available()
    return importlib.util.find_spec(NEEDS[kernels][0]) is not None
