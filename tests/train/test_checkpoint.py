"""Resume is exact, and a damaged or foreign checkpoint is refused before anything changes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rorqual.train.checkpoint import load_training_state, load_weights, restore_random_states, save_training_state
from rorqual.train.optim import OptimizerConfig, build_optimizer
from rorqual.train.state import read_tensors, write_tensors
from tests.train.fakes import build_decoder
from tests.train.resume_script import train


def test_resume_equals_the_uninterrupted_run(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    expected = train(whole, 0, 6).state_dict()
    train(cut, 0, 1)
    train(cut, 1, 4)
    root = Path(__file__).parents[2]
    arguments = [str(cut), "4", "6", str(tmp_path / "final.safetensors")]
    subprocess.run([sys.executable, "-m", "tests.train.resume_script", *arguments], check=True, cwd=root)
    resumed = read_tensors(tmp_path / "final.safetensors")
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in expected.items())
    for name in ("model", "optimizer", "progress"):
        assert (whole / f"{name}.safetensors").read_bytes() == (cut / f"{name}.safetensors").read_bytes()


def test_weights_alone_can_be_read(tmp_path: Path) -> None:
    trained = train(tmp_path, 0, 2)
    model = build_decoder("mla_moe", torch.float32)
    load_weights(tmp_path / "model.safetensors", model)
    assert all(torch.equal(tensor, trained.state_dict()[name]) for name, tensor in model.state_dict().items())


def _without(name: str) -> Callable[[Path], None]:
    return lambda file: write_tensors(file, {k: v for k, v in read_tensors(file).items() if k != name})


def _reshaped(name: str) -> Callable[[Path], None]:
    return lambda file: write_tensors(file, {k: v[:-1] if k == name else v for k, v in read_tensors(file).items()})


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


MOMENT = "state['state'][2]['exp_avg']"


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("model.safetensors", _truncate, r"model\.safetensors cannot be read"),
        ("model.safetensors", _without("norm.weight"), r"model\.safetensors: tensor norm\.weight is missing"),
        ("model.safetensors", _reshaped("norm.weight"), r"tensor norm\.weight is torch.float32 of shape \(15,\)"),
        ("optimizer.safetensors", _truncate, r"optimizer\.safetensors cannot be read"),
        ("optimizer.safetensors", _without(MOMENT), r"optimizer\.safetensors has no tensor .*exp_avg"),
        ("optimizer.safetensors", _reshaped(MOMENT), r"optimizer\.safetensors: tensor exp_avg of parameter 2 is"),
        ("optimizer.json", _truncate, r"optimizer\.json cannot be read"),
        ("progress.json", Path.unlink, r"progress\.json cannot be read"),
        ("progress.safetensors", Path.unlink, r"progress\.safetensors cannot be read"),
    ],
)
def test_damage_is_named_and_changes_nothing(
    tmp_path: Path, file: str, damage: Callable[[Path], None], message: str
) -> None:
    train(tmp_path, 0, 1)
    damage(tmp_path / file)
    model = build_decoder("mla_moe", torch.float32)
    optimizer = build_optimizer(model, OptimizerConfig())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_before = torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        load_training_state(tmp_path, model, optimizer)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not optimizer.state
    assert torch.equal(random_before, torch.get_rng_state())


def test_a_checkpoint_of_another_model_or_optimizer_is_refused(tmp_path: Path) -> None:
    train(tmp_path, 0, 1)
    other = build_decoder("gqa", torch.float32)
    with pytest.raises(ValueError, match="Check that the model config"):
        load_training_state(tmp_path, other, build_optimizer(other, OptimizerConfig()))
    double = build_decoder("mla_moe")
    with pytest.raises(ValueError, match=r"is torch.float32 .*expects torch.float64"):
        load_training_state(tmp_path, double, build_optimizer(double, OptimizerConfig()))
    model = build_decoder("mla_moe", torch.float32)
    with pytest.raises(ValueError, match="parameter groups"):
        load_training_state(tmp_path, model, torch.optim.AdamW(model.parameters()))


def test_random_states_of_another_machine_are_refused() -> None:
    states = {"cuda": [torch.zeros(1)] * (torch.cuda.device_count() + 1)}
    with pytest.raises(ValueError, match="CUDA devices"):
        restore_random_states(states)


def test_state_that_cannot_be_stored_is_refused_by_place(tmp_path: Path) -> None:
    model = build_decoder("gqa", torch.float32)
    with pytest.raises(ValueError, match=r"state\['extra'\]\['engine'\] is a object"):
        save_training_state(tmp_path, model, build_optimizer(model, OptimizerConfig()), {"engine": object()})
