"""From a YAML file and overrides to a validated configuration; a mistake is one line."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, overload

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from distal.config.keys import documented_keys
from distal.config.kinds import AnyRoot, CompareConfig, Config, Root, ScoreConfig
from distal.config.sections import NORMALIZE_VALUES
from distal.errors import ConfigError
from distal.storage import is_relative


@overload
def load(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config: ...
@overload
def load(path: str | os.PathLike[str], overrides: Sequence[str], kind: type[AnyRoot]) -> AnyRoot: ...
def load(path: str | os.PathLike[str], overrides: Sequence[str] = (), kind: type[Root] = Config) -> Root:
    """Read the YAML file of a command and apply `key.sub=value` overrides (values are YAML).

    Args:
        kind: what the file is: `Config`, `CompareConfig` or `ScoreConfig`.

    Raises:
        ConfigError: no such file, not YAML, an unknown key, or a value out of its bounds.
    """
    return _validated(kind, _read(Path(path)), overrides).absolute()


@overload
def parse(tree: Mapping[str, Any], overrides: Sequence[str] = ()) -> Config: ...
@overload
def parse(tree: Mapping[str, Any], overrides: Sequence[str], kind: type[AnyRoot]) -> AnyRoot: ...
def parse(tree: Mapping[str, Any], overrides: Sequence[str] = (), kind: type[Root] = Config) -> Root:
    """The same from nested keys and values instead of a file."""
    return _validated(kind, tree, overrides).absolute()


def load_any(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config | ScoreConfig:
    """Load a file of any kind; the sections `checkpoints` and `compare` decide which."""
    tree = _read(Path(path))
    return _validated(_kind(tree), tree, overrides).absolute()


def load_portable(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config | ScoreConfig:
    """A file of any kind, for a process that works in another directory.

    Raises:
        ConfigError: as `load`, and for a relative path, which would name something else there.
    """
    tree = _read(Path(path))
    given = _validated(_kind(tree), tree, overrides)
    config = given.absolute()  # refuses invalid paths first
    for name, place in given.places().items():
        if is_relative(place):
            raise ConfigError(
                f"{name}: {place!r} is relative, and a submitted job works in a scratch folder of "
                f"its own; give the absolute path that every node of the cluster sees "
                f"({name}=/...)"
            )
    return config


def from_record(record: Mapping[str, Any]) -> Config | ScoreConfig:
    """The inverse of `Root.to_record`."""
    return _kind(record).model_validate(record)


def _kind(tree: Mapping[str, Any]) -> type[Config] | type[ScoreConfig]:
    return ScoreConfig if "checkpoints" in tree else CompareConfig if "compare" in tree else Config


def _read(file: Path) -> Mapping[str, Any]:
    try:
        tree = yaml.safe_load(file.read_text())
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise ConfigError(f"{file}: no such file; `distal init {file}` writes one for `distal run`") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{file}: a mapping of keys to values was expected")
    return tree


def _validated(kind: type[AnyRoot], tree: Mapping[str, Any], overrides: Sequence[str]) -> AnyRoot:
    try:
        return kind.of(tree, dict(_parsed(override) for override in overrides))
    except ValidationError as error:
        raise ConfigError(_one_line(error, kind)) from None


def _parsed(override: str) -> tuple[str, Any]:
    name, separator, text = override.partition("=")
    if not separator or not name:
        raise ConfigError(f"{override!r}: an override is written key.sub=value")
    if text.startswith("*"):  # in YAML a pattern such as *.ckpt would be an alias
        return name, text
    try:
        return name, yaml.safe_load(text) if text else None
    except yaml.YAMLError:
        raise ConfigError(f"{override!r}: {text!r} is not a valid YAML value") from None


def _one_line(error: ValidationError, kind: type[Root]) -> str:
    """The first of its errors: key, value, allowed values, remedy."""
    errors = error.errors(include_url=False)
    keys = [name for name, _ in documented_keys(kind)]
    n_others = len({e["loc"][:2] for e in errors}) - 1
    return _message(errors, keys) + (f" (and {n_others} more)" if n_others else "")


def _message(errors: list[ErrorDetails], keys: Sequence[str]) -> str:
    first = errors[0]
    # A union adds the names of its members to a path ("block_size.int"): only keep keys.
    known = {part for name in keys for part in name.split(".")}
    parts = [str(part) for part in first["loc"]]
    name = ".".join(part for i, part in enumerate(parts) if part in known or i == 0 or part.isdigit())
    if first["type"] == "extra_forbidden":
        return _unknown_key(parts, keys)
    if first["type"] == "missing" and parts == ["model", "normalize"]:
        return (
            "model.normalize is missing: these weights were not trained with this pool's "
            f"statistics; give mean and std: model.normalize must be {NORMALIZE_VALUES}"
        )
    if name == "model.normalize":
        return f"{name} must be {NORMALIZE_VALUES}, got {first['input']!r}"
    if first["type"] == "missing":
        return f"{name} is missing; set it in the file or as {name}=..."
    if first["type"] == "value_error":
        text, value = str(first["ctx"]["error"]), first["input"]
        text = f"{name}: {text}" if name else text
        named = not isinstance(value, str) or repr(value) in text
        return text if named else f"{text}, got {value!r}"
    allowed = dict.fromkeys(
        e["msg"].removeprefix("Input should be ").partition(", unable to parse")[0]
        for e in errors
        if e["loc"][:2] == first["loc"][:2]
    )
    return f"{name} must be {' or '.join(allowed)}, got {first['input']!r}"


def _unknown_key(parts: Sequence[str], keys: Sequence[str]) -> str:
    *outer, last = parts
    prefix = "".join(f"{part}." for part in outer)
    siblings = {k[len(prefix) :].partition(".")[0] for k in keys if k.startswith(prefix)}
    known = ", ".join(sorted(prefix + sibling for sibling in siblings))
    near = get_close_matches(last, sorted(siblings), 1)
    hint = "".join(f"; did you mean {prefix}{name}?" for name in near)
    return f"unknown key {prefix}{last}; known keys: {known}{hint}"
