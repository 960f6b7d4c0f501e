"""A YAML file as plain data, with the line of every value in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from phalanx.errors import ConfigError, Problem

KeyPath = tuple[str | int, ...]

MAX_FILE_BYTES = 2**20
_MAX_NODES = 20_000
_MAX_DEPTH = 16


@dataclass(frozen=True, slots=True)
class YamlDocument:
    """data: what the file says. lines: line, from 1, of the key or list item at each path. problems: keys given
    twice, which YAML itself lets pass. source: what to call the file.
    """

    data: Any
    lines: Mapping[KeyPath, int] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
    source: str = "configuration"

    def line(self, path: KeyPath) -> int | None:
        """Line of the value at `path`, or of the nearest value around it."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.lines:
                return self.lines[path[:length]]
        return None


def read_yaml(path: Path) -> YamlDocument:
    """Reads a YAML file of at most 1 MiB. Raises ConfigError where it cannot be read or is not YAML."""
    source = str(path)
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError([Problem("", f"cannot be read: {error.strerror}")], source) from error
    if len(raw) > MAX_FILE_BYTES:
        allowed = f"at most {MAX_FILE_BYTES} bytes"
        raise ConfigError([Problem("", "the file is too large for a configuration", allowed=allowed)], source)
    try:
        return parse_yaml(raw.decode("utf-8"), source)
    except UnicodeDecodeError as error:
        raise ConfigError([Problem("", f"is not UTF-8 text (byte {error.start})")], source) from error


def parse_yaml(text: str, source: str = "configuration") -> YamlDocument:
    """Parses one YAML document, safely: plain data only. Raises ConfigError where it is not YAML."""
    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return YamlDocument({}, source=source)
            walk = _Walk()
            walk.visit(node, ())
            data = loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = " ".join(part for part in (error.context, error.problem) if part)
        line = None if mark is None else mark.line + 1
        raise ConfigError([Problem("", f"is not valid YAML: {what}", line=line)], source) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: an impossible date, an endless number
        raise ConfigError([Problem("", f"is not valid YAML: {error}")], source) from error
    return YamlDocument(data, walk.lines, tuple(walk.problems), source)


class _Walk:
    """Notes lines, finds keys given twice, which YAML lets pass, and ends on documents that unfold without end."""

    def __init__(self) -> None:
        self.lines: dict[KeyPath, int] = {}
        self.problems: list[Problem] = []
        self._num_nodes = 0

    def visit(self, node: yaml.Node, path: KeyPath) -> None:
        self._num_nodes += 1
        if len(path) > _MAX_DEPTH or self._num_nodes > _MAX_NODES:
            limit = f"{_MAX_NODES} values, {_MAX_DEPTH} deep"
            raise yaml.MarkedYAMLError(
                problem=f"more than a configuration can hold ({limit})", problem_mark=node.start_mark
            )
        for key, line, child in self._children(node, path):
            self.lines[(*path, key)] = line
            self.visit(child, (*path, key))

    def _children(self, node: yaml.Node, path: KeyPath) -> Iterator[tuple[str | int, int, yaml.Node]]:
        if isinstance(node, yaml.SequenceNode):
            for index, child in enumerate(node.value):
                yield index, child.start_mark.line + 1, child
        if not isinstance(node, yaml.MappingNode):
            return
        first_lines: dict[str, int] = {}
        for key_node, child in node.value:
            line = key_node.start_mark.line + 1
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                continue  # refused when the data is made
            key = str(key_node.value)
            if key in first_lines:
                message = f"the key is given twice, first on line {first_lines[key]}"
                self.problems.append(Problem(dotted((*path, key)), message, suggestion="keep one of them", line=line))
                continue
            first_lines[key] = line
            yield key, line, child


def dotted(path: KeyPath) -> str:
    """`path` as it is written after `--set`."""
    return ".".join(map(str, path))
