"""Config: what is read equals what was meant, and every mistake is named where it was made."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rorqual.config import ConfigError, load_config, read_recipe_name, resolved
from rorqual.records import Record


class Expert(Record):
    count: int
    rate: float = 0.5


class Model(Record):
    family: Literal["llama", "qwen"]
    width: int = 8
    expert: Expert | None = None


class Dataset(Record):
    name: str
    weight: float = 1.0
    options: dict[str, int] = {}


class Settings(Record):
    model: Model
    backup: Model = Model(family="qwen", width=99)
    datasets: tuple[Dataset, ...] = (Dataset(name="chain_sum"),)
    rewards: dict[str, float] = msgspec.field(default_factory=lambda: {"accuracy": 1.0, "format": 0.1})
    by_name: dict[str, Dataset] = {}
    betas: tuple[float, float] = (0.9, 0.95)
    label: str | None = None
    seed: int = 0
    learning_rate: float = 1e-3
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"Settings.seed = {self.seed} must not be negative.")


@pytest.fixture
def load(tmp_path: Path):
    def load_text(text: str, *overrides: str) -> Settings:
        path = tmp_path / "run.toml"
        path.write_text(text)
        return load_config(path, Settings, overrides)

    return load_text


MINIMAL = 'recipe = "r1_zero"\n[model]\nfamily = "llama"\n'


def test_without_a_file_the_defaults_are_changed() -> None:
    class Small(Record):
        size: int = 3
        name: str = "a"

    assert load_config(None, Small, ["size=4"]) == Small(size=4)
    with pytest.raises(ConfigError, match="did you mean|size"):
        load_config(None, Small, ["sise=4"])


def test_file_then_overrides_win_over_defaults(load) -> None:
    text = 'seed = 3\nlearning_rate = 1\n[model]\nfamily = "llama"\nexpert = { count = 4 }\n'
    config = load(text, "seed=5", "model.expert.rate=0.25", "datasets.0.weight=2", "datasets.1.name=bf", "betas.1=0.99")
    assert config == Settings(
        model=Model(family="llama", expert=Expert(count=4, rate=0.25)),
        datasets=(Dataset(name="chain_sum", weight=2.0), Dataset(name="bf")),
        betas=(0.9, 0.99),
        seed=5,
        learning_rate=1.0,
    )


def test_table_is_merged_over_the_default_of_its_field(load) -> None:
    assert load(MINIMAL + "[backup]\nfamily = 'llama'").backup == Model(family="llama", width=99)
    assert load(MINIMAL, "backup.family=llama").backup == Model(family="llama", width=99)


def test_dict_and_tuple_of_the_file_replace_the_default(load) -> None:
    config = load(MINIMAL + "[rewards]\nlength = 1\n[[datasets]]\nname = 'a'\n[[datasets]]\nname = 'b'\n")
    assert config.rewards == {"length": 1.0}
    assert [dataset.name for dataset in config.datasets] == ["a", "b"]


def test_override_adds_to_a_dict(load) -> None:
    assert load(MINIMAL, "rewards.format=0.5").rewards == {"accuracy": 1.0, "format": 0.5}
    config = load(MINIMAL, "by_name.x.name=chain_sum", 'by_name."a.b".name=c', "by_name.x.options.digits=3")
    assert config.by_name == {"x": Dataset(name="chain_sum", options={"digits": 3}), "a.b": Dataset(name="c")}


def test_whole_sections_can_be_set(load) -> None:
    assert load(MINIMAL, "model={family='qwen', width=3}").model == Model(family="qwen", width=3)
    assert load(MINIMAL, "datasets=[{name='a'}, {name='b'}]").datasets == (Dataset(name="a"), Dataset(name="b"))


def test_none_switches_an_optional_field_off(load) -> None:
    assert load(MINIMAL + "expert = { count = 4 }", "model.expert=none").model.expert is None
    assert load(MINIMAL, "label=none").label == "none"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.widht=3", ['"model.widht"', "--set model.widht=3", 'did you mean "model.width"']),
        ("modell.width=3", ['"modell"', 'did you mean "model"']),
        ("datasets.0.nmae=x", ['"datasets.0.nmae"', '"datasets.0.name"']),
        ("by_name.x.wieght=1", ['"by_name.x.wieght"', '"by_name.x.weight"']),
        ("model.expert.rat=1", ['"model.expert.rat"', '"model.expert.rate"']),
        ("seed=abc", ['"seed"', "expected int, got str", "--set seed=abc"]),
        ("seed=1.5", ['"seed"', "expected int, got float"]),
        ("learning_rate=fast", ['"learning_rate"', "expected float, got str"]),
        ("shuffle=1", ['"shuffle"', "expected bool, got int"]),
        ("rewards.format=high", ['"rewards.format"', "expected float, got str"]),
        ("datasets.0.weight=x", ['"datasets.0.weight"', "expected float"]),
        ("model.family=gpt", ['"model.family"', "invalid enum value 'gpt'"]),
        ("label=3", ['"label"', "got int", "label='\"3\"'"]),
        ("model.expert.rate=1", ['missing "model.expert.count"', "--set model.expert.rate=1"]),
        ("datasets.5.name=x", ['"datasets"', "from 0 to 1", "appends"]),
        ("datasets.first.name=x", ['"datasets"', "must be a number"]),
        ("seed.x=1", ['"seed" is a single value']),
        ("seed=-1", ["must not be negative", "--set seed=-1"]),
        ("model=[1", ["starts like TOML"]),
        ("seed", ["expected section.key=value"]),
        ("=3", ["expected section.key=value"]),
        ("betas=[1.0]", ['"betas"', "length 2"]),
        ("model=3", ['"model"', "got int"]),
        ("datasets=x", ['"datasets"', "got str"]),
    ],
)
def test_bad_override_is_named(load, override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load(MINIMAL, override)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[modle]\nfamily = 'llama'", ["run.toml", '"modle"', 'did you mean "model"']),
        ("[model]\nfamily = 'llama'\n[model.expert]\ncoutn = 3", ['"model.expert.coutn"', '"model.expert.count"']),
        ("[model]\nwidth = 3", ["run.toml", 'missing "model.family"']),
        ("seed = 1", ['missing "model"']),
        (
            MINIMAL + "[[datasets]]\nname = 'a'\n[[datasets]]\nname = 1",
            ["run.toml", '"datasets.1.name"', "expected str"],
        ),
        (MINIMAL + "[by_name.x]\nname = 'a'\nweight = 'b'", ['"by_name.x.weight"']),
        ("seed = 1\nseed 2", ["run.toml", "not valid TOML", "line 2"]),
    ],
)
def test_bad_file_is_named(load, text: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load(text)
    assert "--set" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_missing_file_and_missing_recipe(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "absent.toml", Settings)
    path = tmp_path / "run.toml"
    path.write_text(MINIMAL)
    assert read_recipe_name(path) == "r1_zero"
    path.write_text("seed = 1")
    with pytest.raises(ConfigError, match="which recipe"):
        read_recipe_name(path)


def test_recipe_is_a_key_like_any_other_where_the_kind_has_it(tmp_path: Path) -> None:
    class Small(Record):
        recipe: str

    path = tmp_path / "run.toml"
    path.write_text('recipe = "x"')
    assert load_config(path, Small).recipe == "x"


@given(seed=st.integers(0, 2**60), rate=st.floats(allow_nan=False), label=st.text(st.characters(codec="ascii")))
def test_any_value_passes_through_an_override(tmp_path_factory, seed: int, rate: float, label: str) -> None:
    path = tmp_path_factory.mktemp("any") / "run.toml"
    path.write_text(MINIMAL)
    quoted = json.dumps(label).replace("\x7f", "\\u007f")
    config = load_config(path, Settings, [f"seed={seed}", f"learning_rate={rate!r}", f"label={quoted}"])
    assert (config.seed, config.learning_rate, config.label) == (seed, rate, label)


def test_resolved_holds_every_setting_and_rebuilds_the_config(load) -> None:
    config = load(MINIMAL, "model.expert.count=2", "datasets.0.options.digits=3")
    table = resolved(config)
    assert table["learning_rate"] == 1e-3
    assert table["model"] == {"family": "llama", "width": 8, "expert": {"count": 2, "rate": 0.5}}
    assert msgspec.convert(json.loads(json.dumps(table)), Settings) == config


def test_config_imports_without_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import rorqual.config"
    subprocess.run([sys.executable, "-c", code], check=True)
