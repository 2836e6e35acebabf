"""Typed configuration: Python defaults, then a TOML file, then `--set section.key=value`.

A config is any `Record` whose fields are plain values, Records, dicts or tuples. Tables of the file are merged over
the default of the field they name; dicts and tuples of the file replace theirs. `--set` reaches inside all of them. The
word "none" stands for None where a field may be None and may not be text. Nothing here knows a recipe.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

import msgspec

from rorqual.records import Record

ConfigType = TypeVar("ConfigType", bound=Record)


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key, where it was set, and what was expected."""


def load_config(path: str | Path | None, kind: type[ConfigType], overrides: Sequence[str] = ()) -> ConfigType:
    """Read a TOML file into `kind`, then apply overrides such as "optimizer.learning_rate=1e-4" or "tasks.0.name=ab".

    Without a file, the overrides change the defaults of `kind`. An override's value is read as TOML; what is not TOML
    is text. An index one past the end of a tuple appends to it.
    The top-level key `recipe` names the recipe and not one of its settings: it is left out unless `kind` has such a
    field. Raises: ConfigError for an unreadable file, an unknown key (with the nearest valid one), a wrong type or a
    missing key.
    """
    source = "the defaults" if path is None else str(path)
    table = {} if path is None else _read_toml(path)
    if "recipe" not in kind.__struct_fields__:
        table.pop("recipe", None)
    tree = _merge(_defaults(kind), table, kind, (), source)
    origins: dict[tuple[str, ...], str] = {}
    for override in overrides:
        keys, value = _parse_override(override)
        tree = _set(tree, keys, value, kind, f"--set {override}")
        origins[keys] = f"--set {override}"
    config: ConfigType = _build(tree, kind, (), _Origins(source, origins))
    return config


def read_recipe_name(path: str | Path) -> str:
    """The recipe that a config file is for: its top-level key `recipe`. Raises: ConfigError when it has none."""
    name = _read_toml(path).get("recipe")
    if not isinstance(name, str):
        raise ConfigError(
            f'{path}: the file does not say which recipe it is for; add a first line such as recipe = "r1_zero".'
        )
    return name


def resolved(config: Record) -> dict[str, Any]:
    """Every setting, defaults included, as plain JSON values: what is saved with a run and compared when it resumes."""
    table: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(config))
    return table


# ------------------------------------------------------------------------------------------------------------ reading


def _read_toml(path: str | Path) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: the file cannot be read: {error}.") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: the file is not valid TOML: {error}.") from error


def _parse_override(override: str) -> tuple[tuple[str, ...], Any]:
    match = re.fullmatch(r"""((?:"[^"]+"|[^."=\s]+)(?:\.(?:"[^"]+"|[^."=\s]+))*)\s*=(.*)""", override, re.DOTALL)
    if match is None:
        raise ConfigError(
            f"--set {override}: expected section.key=value, for example --set optimizer.learning_rate=1e-4."
        )
    keys = tuple(key.strip('"') for key in re.findall(r'"[^"]+"|[^."]+', match[1]))
    return keys, _parse_value(match[2].strip(), override)


def _parse_value(text: str, override: str) -> Any:
    try:
        table = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError as error:
        if text[:1] in {'"', "'", "[", "{"}:
            raise ConfigError(f"--set {override}: the value starts like TOML but is not: {error}.") from error
        return text
    return table["value"] if len(table) == 1 else text


# -------------------------------------------------------------------------------------------------------------- types


def _without_none(hint: Any) -> Any:
    """`X | None` becomes X; anything else is left as it is."""
    if get_origin(hint) in (Union, UnionType):
        members = [member for member in get_args(hint) if member is not NoneType]
        return members[0] if len(members) == 1 else hint
    return hint


def _record_type(hint: Any) -> type[Record] | None:
    plain = _without_none(hint)
    return plain if isinstance(plain, type) and issubclass(plain, msgspec.Struct) else None  # type: ignore[return-value]


def _item_type(hint: Any) -> Any:
    """The type of every item of `tuple[X, ...]`, `list[X]` or `dict[str, X]`; None for anything else."""
    plain = _without_none(hint)
    arguments = get_args(plain)
    if get_origin(plain) is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        return arguments[0]
    if get_origin(plain) is list:
        return arguments[0]
    return arguments[1] if get_origin(plain) is dict else None


def _field_types(kind: type[Record]) -> dict[str, Any]:
    return {field.name: field.type for field in msgspec.structs.fields(kind)}


def _defaults(kind: type[Record]) -> dict[str, Any]:
    """The fields of `kind` that have a default, as plain values."""
    values: dict[str, Any] = {}
    for field in msgspec.structs.fields(kind):
        if field.default is not msgspec.NODEFAULT:
            values[field.name] = msgspec.to_builtins(field.default)
        elif field.default_factory is not msgspec.NODEFAULT:
            values[field.name] = msgspec.to_builtins(field.default_factory())
    return values


# ------------------------------------------------------------------------------------------------- merging and setting


def _merge(base: Any, new: Any, hint: Any, keys: tuple[str, ...], source: str) -> Any:
    """`new` over `base` where both describe one Record; otherwise `new`, whose own Records get their defaults."""
    record = _record_type(hint)
    if record is not None and isinstance(new, dict):
        merged = dict(base) if isinstance(base, dict) else _defaults(record)
        types = _field_types(record)
        for name, value in new.items():
            _check_known(name, types, keys, source)
            merged[name] = _merge(merged.get(name), value, types[name], (*keys, name), source)
        return merged
    item = _item_type(hint)
    if item is not None and isinstance(new, list):
        return [_merge(None, value, item, (*keys, str(i)), source) for i, value in enumerate(new)]
    if item is not None and isinstance(new, dict):
        return {name: _merge(None, value, item, (*keys, name), source) for name, value in new.items()}
    return new


def _set(tree: Any, keys: tuple[str, ...], value: Any, hint: Any, source: str, done: tuple[str, ...] = ()) -> Any:
    """A copy of `tree` with one value replaced. Records that are absent on the way are made from their defaults."""
    if not keys:
        return _merge(tree, value, hint, done, source)
    name, rest, here = keys[0], keys[1:], (*done, keys[0])
    record = _record_type(hint)
    if record is not None:
        types = _field_types(record)
        _check_known(name, types, done, source)
        table = dict(tree) if isinstance(tree, dict) else _defaults(record)
        return {**table, name: _set(table.get(name), rest, value, types[name], source, here)}
    item = _item_type(hint)
    plain = _without_none(hint)
    if get_origin(plain) is dict or plain is dict or isinstance(tree, dict):
        table = dict(tree) if isinstance(tree, dict) else {}
        return {**table, name: _set(table.get(name), rest, value, item or Any, source, here)}
    if item is not None or isinstance(tree, list | tuple):
        items = list(tree) if isinstance(tree, list | tuple) else []
        index = _parse_index(name, len(items), done, source)
        old = items[index] if index < len(items) else None
        items[index : index + 1] = [_set(old, rest, value, item or Any, source, here)]
        return items
    raise ConfigError(
        f'{source}: "{_dotted(done)}" is a single value, so it has no key "{name}"; set "{_dotted(done)}" itself.'
    )


def _parse_index(name: str, length: int, keys: tuple[str, ...], source: str) -> int:
    if not name.isdecimal() or int(name) > length:
        raise ConfigError(
            f'{source}: "{_dotted(keys)}" is a list of {length}, so the next key must be a number from 0 to {length} '
            f'({length} appends); got "{name}".'
        )
    return int(name)


def _check_known(name: str, valid: Iterable[str], keys: tuple[str, ...], source: str) -> None:
    names = list(valid)
    if name in names:
        return
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    section = f"section [{_dotted(keys)}]" if keys else "top level"
    hint = f'did you mean "{_dotted((*keys, near[0]))}"? ' if near else ""
    raise ConfigError(
        f'{source}: unknown key "{_dotted((*keys, name))}"; {hint}the {section} has the keys {", ".join(sorted(names))}'
    )


def _dotted(keys: tuple[str, ...]) -> str:
    return ".".join(f'"{key}"' if "." in key else key for key in keys)


# ------------------------------------------------------------------------------------------------------------ building


class _Origins(msgspec.Struct, frozen=True):
    """Where a value came from: the file, unless an override set it, something around it, or something inside it."""

    file: str
    overrides: dict[tuple[str, ...], str]

    def of(self, keys: tuple[str, ...]) -> str:
        around = [text for path, text in self.overrides.items() if keys[: len(path)] == path]
        inside = [text for path, text in self.overrides.items() if path[: len(keys)] == keys]
        if around:
            return around[-1]
        return f"{self.file} with {inside[-1]}" if inside else self.file


def _build(value: Any, hint: Any, keys: tuple[str, ...], origins: _Origins) -> Any:
    """`value` as `hint`, innermost values first, so that an error names the key that is wrong and not one around it."""
    if value is None or (value == "none" and NoneType in get_args(hint) and str not in get_args(hint)):
        return _convert(None, hint, keys, origins)
    record = _record_type(hint)
    if record is not None and isinstance(value, dict):
        return _build_record(value, record, keys, origins)
    item, container = _item_type(hint), get_origin(_without_none(hint))
    if container is dict and isinstance(value, dict):
        key_type = get_args(_without_none(hint))[0]
        return {
            _convert(name, key_type, keys, origins): _build(entry, item, (*keys, name), origins)
            for name, entry in value.items()
        }
    if item is not None and container in (tuple, list) and isinstance(value, list | tuple):
        return container(_build(entry, item, (*keys, str(i)), origins) for i, entry in enumerate(value))
    return _convert(value, hint, keys, origins)


def _build_record(table: dict[str, Any], record: type[Record], keys: tuple[str, ...], origins: _Origins) -> Record:
    types = _field_types(record)
    missing = [field.name for field in msgspec.structs.fields(record) if field.required and field.name not in table]
    if missing:
        names = ", ".join(f'"{_dotted((*keys, name))}"' for name in missing)
        raise ConfigError(f"{origins.of(keys)}: missing {names}; {record.__name__} has no default for it.")
    values = {name: _build(value, types[name], (*keys, name), origins) for name, value in table.items()}
    try:
        return record(**values)
    except ValueError as error:
        where = f'"{_dotted(keys)}": ' if keys else ""
        raise ConfigError(f"{origins.of(keys)}: {where}{error}") from error


def _convert(value: Any, hint: Any, keys: tuple[str, ...], origins: _Origins) -> Any:
    try:
        return msgspec.convert(value, hint, strict=True)
    except msgspec.ValidationError as error:
        said = str(error)
        reason = said[:1].lower() + said[1:].split(" - at ")[0].replace("`", "")
        hint_quotes = f"; for text write {keys[-1]}='\"{value}\"'" if "expected str" in reason and keys else ""
        raise ConfigError(f'{origins.of(keys)}: "{_dotted(keys)}": {reason}{hint_quotes}.') from error
