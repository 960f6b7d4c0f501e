"""From a YAML file, or plain data, and overrides to a valid `Config`; or every problem at once."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from phalanx.errors import ConfigError, Problem
from phalanx.launcher.config_errors import translate
from phalanx.launcher.config_rules import broken_rules
from phalanx.launcher.schema import Config
from phalanx.launcher.yaml_document import KeyPath, YamlDocument, dotted, parse_yaml, read_yaml

__all__ = ["Config", "load_config"]

_MAX_INDEX = 1024


class UnsoundConfigError(ConfigError):
    """A ConfigError that knows what is sound. sound: the configuration without the keys that were refused."""

    def __init__(self, problems: Sequence[Problem], source: str, sound: Config) -> None:
        super().__init__(problems, source)
        self.sound = sound


def load_config(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """Reads and validates a configuration.

    source: a YAML file's path, or the sections as plain data. overrides: `a.b=c`, the value in YAML's notation, list
    items by number (`parallel.stages.0.tensor=3`); they come after the file, in order. Relative paths of a model, of
    keys or of a template that exist beside the file are made to start from there.

    Raises ConfigError with everything that is wrong with the file and the overrides.
    """
    if isinstance(source, Mapping):
        folder = None
        document = YamlDocument(copy.deepcopy(dict(source)))
    else:
        folder = Path(source).parent
        document = read_yaml(Path(source))
    try:
        return _located(validate(document, overrides), folder)
    except UnsoundConfigError as error:
        error.sound = _located(error.sound, folder)
        raise


def validate(document: YamlDocument, overrides: Sequence[str] = ()) -> Config:
    """The configuration that `document` with `overrides` states. Raises ConfigError with every problem."""
    problems = list(document.problems)
    if not isinstance(document.data, dict):
        message = "a configuration is a mapping of sections"
        problem = Problem(
            "", message, type(document.data).__name__, ", ".join(Config.model_fields), "start with `model: NAME`"
        )
        raise ConfigError([*problems, problem], document.source)
    data = _normalised(document.data)
    overridden: list[KeyPath] = []
    for override in overrides:
        try:
            overridden.append(_apply(data, override))
        except _OverrideError as error:
            problems.append(Problem(f"--set {override}", str(error), allowed="--set section.key=value"))
    data = _normalised(data)

    errors = _schema_errors(data)
    problems += [translate(error, data, document, overridden) for error in errors]
    sound, dropped = _sound_part(data, errors)
    if sound is not None:
        problems += broken_rules(sound, dropped, document, overridden)
    if not problems and sound is not None:
        return sound
    problems.sort(key=lambda problem: problem.line or 0)
    if sound is None or any(path[0] == "model" for path in dropped):
        raise ConfigError(problems, document.source)
    raise UnsoundConfigError(problems, document.source, sound)


def _normalised(data: dict[str, Any]) -> dict[str, Any]:
    """Shorthands spelt out: an empty section is one with its defaults, and a model that is only text is its path."""
    spelt = {key: {} if value is None and key in Config.model_fields else value for key, value in data.items()}
    if isinstance(spelt.get("model"), str):
        spelt["model"] = {"path": spelt["model"]}
    return spelt


class _OverrideError(ValueError):
    pass


def _apply(data: dict[str, Any], override: str) -> KeyPath:
    """Sets one `a.b=c` in `data` and returns the path of what it put there, the containers it had to make included."""
    name, equals, text = override.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise _OverrideError("an override is a dotted key, `=` and a value")
    try:
        value = parse_yaml(text).data if text.strip() else None
    except ConfigError as error:
        raise _OverrideError(f"the value {error.problems[0].message}") from error
    path: list[str | int] = []
    new_from: int | None = None
    container: Any = data
    for position, key in enumerate(keys):
        where: str | int = key
        fresh: Any = [] if position + 1 < len(keys) and keys[position + 1].isdecimal() else {}
        if isinstance(container, list):
            where = _index(key, container, dotted(tuple(path)))
            if where == len(container):
                container.append(fresh)
                new_from = new_from or len(path) + 1
        elif not isinstance(container, dict):
            raise _OverrideError(
                f"{dotted(tuple(path))} holds the single value {container!r}, nothing can be set inside it"
            )
        path.append(where)
        if position + 1 == len(keys):
            container[where] = value
        else:
            if not isinstance(container, list) and container.get(where) is None:
                container[where] = fresh
                new_from = new_from or len(path)
            container = container[where]
    return tuple(path[:new_from])


def _index(key: str, items: list[Any], path: str) -> int:
    if not key.isascii() or not key.isdecimal() or int(key[:9]) > min(len(items), _MAX_INDEX):
        raise _OverrideError(
            f"{path} is a list of {len(items)}; name one of its items by number, from 0, or the next one to add it"
        )
    return int(key)


def _schema_errors(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    try:
        Config.model_validate(data)
    except ValidationError as error:
        errors: list[dict[str, Any]] = [dict(detail) for detail in error.errors(include_url=False)]
        # A list whose items are all wrong is also called too short: only the items are worth telling.
        return [e for e in errors if not (e["type"] == "too_short" and e["input"])]
    return []


def _sound_part(data: Mapping[str, Any], errors: Sequence[Mapping[str, Any]]) -> tuple[Config | None, list[KeyPath]]:
    """The configuration without what the schema refused, and the paths left out of it.

    It lets the rules between fields be tried, and their problems be told, beside those of single fields.
    """
    pruned = _with_text_keys(data)
    dropped = [_drop(pruned, error["loc"]) for error in errors if error["type"] != "invalid_key"]
    model = pruned.setdefault("model", {})
    model.setdefault("path", "unknown")
    try:
        return Config.model_validate(pruned), dropped
    except ValidationError:
        return None, dropped


def _with_text_keys(value: Any) -> Any:
    """A deep copy without the entries whose key is not text."""
    if isinstance(value, Mapping):
        return {key: _with_text_keys(inner) for key, inner in value.items() if isinstance(key, str)}
    if isinstance(value, (list, tuple)):
        return [_with_text_keys(inner) for inner in value]
    return value


def _drop(data: dict[str, Any], path: KeyPath) -> KeyPath:
    """Deletes the last key of `path`, a whole list where it ends in an item of one. Returns the path that is gone."""
    last_key = max(index for index, key in enumerate(path) if isinstance(key, str))
    container: Any = data
    for key in path[:last_key]:
        known = key in container if isinstance(container, dict) else isinstance(key, int) and key < len(container)
        if not known:
            return path
        container = container[key]
    if isinstance(container, dict):
        container.pop(path[last_key], None)
    return path[: last_key + 1]


def _located(config: Config, folder: Path | None) -> Config:
    """`config` with the paths of files that exist beside it, or in the home folder, made whole."""

    def locate(name: str) -> str:
        path = Path(name).expanduser()
        if path.is_absolute() or folder is None or not (folder / path).exists():
            return str(path) if path.is_absolute() else name
        return str((folder / path).resolve())

    serve = config.serve
    files = {key: locate(name) for key in ("api_keys", "chat_template") if (name := getattr(serve, key)) is not None}
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"path": locate(config.model.path)}),
            "serve": serve.model_copy(update=files),
        }
    )
