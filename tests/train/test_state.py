"""Nested state: what goes in comes out, and damage is named."""

from __future__ import annotations

import math
import random
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rorqual.records import GenerateRequest, SamplingParams, Task
from rorqual.train.checkpoint import random_states
from rorqual.train.state import load_state, save_state


def same(a: Any, b: Any) -> bool:
    """Equal in value, in type and in dtype; NaN equals NaN."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_raw(a), _raw(b))
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, array):
        return a.typecode == b.typecode and a.tobytes() == b.tobytes()
    return a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b))


def _raw(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
numeric = st.builds(array, st.sampled_from("bihqfd"), st.lists(st.integers(-100, 100)))
keys = st.text() | st.integers()
nested = st.recursive(
    plain | numeric,
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(keys, inner),
    max_leaves=12,
)


@given(state=nested)
def test_any_nested_state_comes_back_equal(state: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("state") / "state"
    save_state(path, state)
    assert same(load_state(path), state)


def test_tensors_arrays_and_records_come_back_equal(tmp_path: Path) -> None:
    shared = torch.randn(4, 6)
    params = SamplingParams(temperature=0.6, top_p=0.9, seed=2**60)
    state = {
        "views": [shared[:2], shared.T, shared],
        "dtypes": [torch.ones(2, dtype=d) for d in (torch.bfloat16, torch.int16, torch.bool, torch.float64)],
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
        "numpy": [np.arange(6, dtype=np.int16).reshape(2, 3), np.float32(0.1), np.zeros((0, 2)), np.array("text")],
        0: GenerateRequest(request_id="r", prompt_ids=array("i", [1, 2]), params=params),
        "task": Task(task_id="t", environment="e", domain="d", messages=(), payload={"deep": [1, {"x": None}]}),
        "random": random_states(),
        "python": random.Random(3).getstate(),
    }
    save_state(tmp_path / "state", state)
    loaded = load_state(tmp_path / "state")
    assert same({**loaded, "views": 0}, {**state, "views": 0})
    assert all(torch.equal(a, b) for a, b in zip(loaded["views"], state["views"], strict=True))


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ({"a": [1, object()]}, r"state\['a'\]\[1\] is a object"),
        ({(1, 2): 3}, "has the key"),
        (np.array([object()]), "numpy array of object"),
    ],
)
def test_refuses_what_cannot_be_stored(tmp_path: Path, value: Any, where: str) -> None:
    with pytest.raises(ValueError, match=where):
        save_state(tmp_path / "state", value)
    assert not list(tmp_path.iterdir())


def test_names_what_is_damaged(tmp_path: Path) -> None:
    save_state(tmp_path / "state", {"a": torch.ones(100), "b": 1})
    tensors, tree = tmp_path / "state.safetensors", tmp_path / "state.json"
    whole, text = tensors.read_bytes(), tree.read_text()
    for damaged in (whole[:-8], whole[:20], b"", b"\xff" * 40):
        tensors.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"state\.safetensors cannot be read"):
            load_state(tmp_path / "state")
    tensors.unlink()
    with pytest.raises(ValueError, match=r"state\.safetensors cannot be read"):
        load_state(tmp_path / "state")
    save_state(tmp_path / "state", {})
    tree.write_text(text)
    with pytest.raises(ValueError, match=r"state\.safetensors has no tensor .*state\['a'\]"):
        load_state(tmp_path / "state")
    for damaged_text in (
        text[:-5],
        "",
        '{"dict": 3}',
        '{"strange": 1}',
        '{"record": ["Nothing", "{}"]}',
        '{"a": 1, "b": 2}',
    ):
        tree.write_text(damaged_text)
        with pytest.raises(ValueError, match=r"state\.json"):
            load_state(tmp_path / "state")
