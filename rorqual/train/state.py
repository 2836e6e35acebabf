"""Nested state on disk without pickle: tensors in a safetensors file, everything else as JSON beside it.

What can be stored: None, bool, int, float, str, bytes, tensors, numpy arrays and scalars, `array.array`, the records of
`rorqual.records`, and lists, tuples and dicts of these, however deep. It comes back equal, bit for bit, in these types.
"""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rorqual import records

PLAIN = (bool, int, float, str, type(None))


def save_state(path: Path, state: Any) -> None:
    """Write `path`.safetensors and `path`.json.

    Raises: ValueError naming the place in the state that holds a value of another kind.
    """
    tensors: dict[str, Tensor] = {}
    tree = _encode(state, "state", tensors)
    write_tensors(path.with_suffix(".safetensors"), tensors)
    path.with_suffix(".json").write_text(json.dumps(tree), encoding="utf-8")


def load_state(path: Path) -> Any:
    """What `save_state` wrote.

    Raises: ValueError naming the file, and the tensor where one is missing or unreadable.
    """
    file = path.with_suffix(".json")
    tensors = read_tensors(path.with_suffix(".safetensors"))
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} cannot be read ({error}). {_ADVICE}") from error
    try:
        return _decode(tree, tensors)
    except KeyError as error:
        raise ValueError(
            f"{path.with_suffix('.safetensors')} has no tensor {error}, which {file} names. {_ADVICE}"
        ) from error
    except (TypeError, ValueError, IndexError, AttributeError, msgspec.DecodeError) as error:
        raise ValueError(f"{file} does not hold a saved state ({error}). {_ADVICE}") from error


def write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file of the given tensors; views and tensors that share memory are written out in full."""
    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, file)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a file, on the CPU. Raises: ValueError naming a file that is missing, truncated or corrupt."""
    name = ""
    tensors = {}
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (a safetensors handle is no dict)
                tensors[name] = opened.get_tensor(name)
    except (OSError, SafetensorError) as error:
        where = f"tensor {name} of {file}" if name else f"{file}"
        raise ValueError(f"{where} cannot be read ({error}). {_ADVICE}") from error
    return tensors


_ADVICE = "The checkpoint is incomplete or damaged: resume from an earlier one, or restore it from a copy."


def _encode(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    """A value as JSON: plain values and lists as themselves, all else as {kind: content}. Tensors go to `tensors`."""
    if type(value) in PLAIN:
        return value
    if type(value) is list:
        return [_encode(each, f"{where}[{index}]", tensors) for index, each in enumerate(value)]
    if type(value) is tuple:
        return {"tuple": [_encode(each, f"{where}[{index}]", tensors) for index, each in enumerate(value)]}
    if isinstance(value, dict):
        return {"dict": [[_encode_key(k, where), _encode(v, f"{where}[{k!r}]", tensors)] for k, v in value.items()]}
    if isinstance(value, Tensor):
        return {"tensor": _store(value, where, tensors)}
    if isinstance(value, np.ndarray | np.generic):
        if value.dtype.kind not in "biufcSU":
            raise ValueError(f"{where} is a numpy array of {value.dtype}; only numbers and text can be stored.")
        kind = "numpy" if isinstance(value, np.ndarray) else "numpy_scalar"
        return {kind: [value.dtype.str, list(value.shape), _store(_bytes(value.tobytes()), where, tensors)]}
    if isinstance(value, array):
        return {"array": [value.typecode, _store(_bytes(value.tobytes()), where, tensors)]}
    if isinstance(value, bytes):
        return {"bytes": _store(_bytes(value), where, tensors)}
    if isinstance(value, records.Record) and type(value).__module__ == records.__name__:
        return {"record": [type(value).__name__, records.to_json(value).decode()]}
    raise ValueError(
        f"{where} is a {type(value).__name__}, which cannot be stored; see rorqual.train.state for what can."
    )


def _encode_key(key: Any, where: str) -> Any:
    if type(key) in (str, int, bool):
        return key
    raise ValueError(f"{where} has the key {key!r} of type {type(key).__name__}; keys must be str, int or bool.")


def _store(tensor: Tensor, where: str, tensors: dict[str, Tensor]) -> str:
    tensors[where] = tensor
    return where


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8)


def _decode(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(tree, PLAIN):
        return tree
    if isinstance(tree, list):
        return [_decode(each, tensors) for each in tree]
    ((kind, content),) = tree.items()
    return _DECODERS[kind](content, tensors)


def _decode_array(content: Any, tensors: dict[str, Tensor]) -> array[Any]:
    result = array(content[0])
    result.frombytes(tensors[content[1]].numpy().tobytes())
    return result


def _decode_numpy(content: Any, tensors: dict[str, Tensor]) -> np.ndarray[Any, Any]:
    dtype, shape, name = content
    return np.frombuffer(tensors[name].numpy().tobytes(), dtype=dtype).reshape(shape).copy()


_DECODERS: dict[str, Any] = {
    "tuple": lambda content, tensors: tuple(_decode(each, tensors) for each in content),
    "dict": lambda content, tensors: {key: _decode(value, tensors) for key, value in content},
    "tensor": lambda content, tensors: tensors[content],
    "numpy": _decode_numpy,
    "numpy_scalar": lambda content, tensors: _decode_numpy(content, tensors)[()],
    "array": _decode_array,
    "bytes": lambda content, tensors: tensors[content].numpy().tobytes(),
    "record": lambda content, tensors: records.from_json(content[1], getattr(records, content[0])),
}
