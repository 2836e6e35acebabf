"""Everything that a training run needs to go on bit for bit, as files in one directory.

model.safetensors        weights and buffers, by parameter name
optimizer.safetensors    AdamW's moments, with optimizer.json for its settings
progress.safetensors     tensors of `extra`, with progress.json: step, data cursor, rollouts in flight, random states

Writing the directory whole or not at all, and finding the newest one, is the run store's task.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rorqual.train.state import load_state, read_tensors, save_state, write_tensors


def save_training_state(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer, extra: Any) -> None:
    """Write the files into an existing directory. `extra`: whatever else the recipe must remember, see `train.state`.

    Raises: ValueError for a value in `extra` that cannot be stored; OSError when the disk refuses.
    """
    write_tensors(directory / "model.safetensors", model.state_dict())
    save_state(directory / "optimizer", optimizer.state_dict())
    save_state(directory / "progress", {"random": random_states(), "extra": extra})


def load_training_state(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    """Restore model, optimiser and random states in place; returns `extra`.

    Everything is read and compared before anything changes.
    Raises: ValueError naming the file, and the tensor that is missing, unexpected or of another shape or dtype.
    """
    weights = _read_weights(directory / "model.safetensors", model)
    optimizer_state = load_state(directory / "optimizer")
    progress = load_state(directory / "progress")
    _check_optimizer(directory / "optimizer.safetensors", optimizer, optimizer_state)
    _require_keys(directory / "progress.json", progress, {"random", "extra"})
    _copy_weights(model, weights)
    optimizer.load_state_dict(optimizer_state)
    restore_random_states(progress["random"])
    return progress["extra"]


def load_weights(file: Path, model: nn.Module) -> None:
    """Restore the weights alone: for evaluation, or a frozen reference. Raises: as `load_training_state`."""
    _copy_weights(model, _read_weights(file, model))


def random_states() -> dict[str, Any]:
    """State of every process-wide random generator: Python, numpy, torch on the CPU and on each CUDA device."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """Undo everything that was drawn since `random_states`.

    Raises: ValueError when the number of CUDA devices differs, so that the run could not go on bit for bit.
    """
    num_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if len(states["cuda"]) != num_devices:
        raise ValueError(
            f"the checkpoint holds the random states of {len(states['cuda'])} CUDA devices, this machine has "
            f"{num_devices}; resume on a machine like the first, or start a new stage from the weights."
        )
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if num_devices:
        torch.cuda.set_rng_state_all(states["cuda"])


def _read_weights(file: Path, model: nn.Module) -> dict[str, Tensor]:
    stored, expected = read_tensors(file), model.state_dict()
    for name in sorted(expected.keys() | stored.keys()):
        if name not in stored or name not in expected:
            problem = "is missing" if name in expected else "is not part of the model"
            raise ValueError(f"{file}: tensor {name} {problem}. Check that the model config is that of the checkpoint.")
        _check_alike(file, name, stored[name], expected[name])
    return stored


def _check_optimizer(file: Path, optimizer: torch.optim.Optimizer, state: Any) -> None:
    """Moments must have the shapes of the parameters, in the order in which the optimiser holds them."""
    _require_keys(file.with_suffix(".json"), state, {"state", "param_groups"})
    groups = [len(group["params"]) for group in optimizer.param_groups]
    stored_groups = [len(group["params"]) for group in state["param_groups"]]
    if groups != stored_groups:
        raise ValueError(
            f"{file} is for parameter groups of {stored_groups} tensors, the optimiser has {groups}. Check that the "
            "model and optimizer configs are those of the checkpoint."
        )
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, moments in state["state"].items():
        for name, moment in moments.items():
            if isinstance(moment, Tensor) and moment.dim():
                _check_alike(file, f"{name} of parameter {index}", moment, parameters[index])


def _require_keys(file: Path, state: Any, keys: set[str]) -> None:
    if not isinstance(state, dict) or state.keys() != keys:
        raise ValueError(f"{file} does not hold a training state with {sorted(keys)}; resume from another checkpoint.")


def _check_alike(file: Path, name: str, stored: Tensor, expected: Tensor) -> None:
    if stored.shape != expected.shape or stored.dtype != expected.dtype:
        raise ValueError(
            f"{file}: tensor {name} is {stored.dtype} of shape {tuple(stored.shape)}, the model expects "
            f"{expected.dtype} of shape {tuple(expected.shape)}. Check that the model config is that of the checkpoint."
        )


@torch.no_grad()
def _copy_weights(model: nn.Module, stored: dict[str, Tensor]) -> None:
    for name, tensor in model.state_dict().items():
        tensor.copy_(stored[name])
