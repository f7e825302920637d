# Copyright (c) monai_privacy contributors
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Read the configs of a bundle that somebody else wrote: what is where in it, whatever its layout."""

from __future__ import annotations

import copy
import pydoc
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monai.bundle import ComponentLocator, ConfigParser
from monai.engines import SupervisedTrainer
from monai.engines.trainer import Trainer

__all__ = ["BundleConfig", "Node", "read_bundle"]

_SUFFIXES = (".json", ".yaml", ".yml")
_SEPARATOR = "#"
_REFERENCE = re.compile(r"@(\w+(?:(?:#|::)\w+)*)")
_WRAPPERS = ("DistributedDataParallel", "DataParallel")


@dataclass(frozen=True)
class Node:
    """A place in a config.

    Args:
        id: its path, parts joined by #; empty where it has none.
        value: what stands there.
    """

    id: str
    value: Any

    @property
    def target(self) -> str:
        """The short name of its class; empty where it is no component."""
        target = self.value.get("_target_") if isinstance(self.value, Mapping) else None
        return target.rsplit(".", 1)[-1] if isinstance(target, str) else ""

    def argument(self, name: str) -> Any:
        """An argument of the component, None where it has none."""
        return self.value.get(name) if isinstance(self.value, Mapping) else None


@dataclass(frozen=True, eq=False)
class BundleConfig:
    """The merged config files of a training.

    Args:
        files: in the order in which they were merged.
        root: the bundle's folder, from which its commands run.
        content: the merged config, macros and relative ids resolved, nothing evaluated.
    """

    files: tuple[Path, ...]
    root: Path
    content: dict[str, Any]

    def get(self, place: str) -> Any:
        """What stands at an id, None where there is nothing."""
        value: Any = self.content
        for part in place.replace("::", _SEPARATOR).split(_SEPARATOR):
            try:
                value = value[int(part)] if isinstance(value, list) else value[part]
            except (KeyError, IndexError, TypeError, ValueError):
                return None
        return value

    def with_changes(self, changes: Mapping[str, Any]) -> BundleConfig:
        """A copy in which other values stand at these ids, whose parents must be there."""
        content = copy.deepcopy(self.content)
        for where, value in changes.items():
            *parents, last = where.split(_SEPARATOR)
            place: Any = content
            for part in parents:
                place = place[int(part)] if isinstance(place, list) else place[part]
            place[int(last) if isinstance(place, list) else last] = value
        return BundleConfig(self.files, self.root, content)

    def follow(self, value: Any, place: str = "") -> Node:
        """The node that a value stands for, through references ("@train#dataset")."""
        seen = set()
        while isinstance(value, str) and (match := _REFERENCE.fullmatch(value)) and value not in seen:
            seen.add(value)
            place = _normal(match[1])
            value = self.get(place)
        return Node(place, value)

    def argument(self, node: Node, name: str) -> Node:
        """The node that an argument of a component stands for."""
        return self.follow(node.argument(name), f"{node.id}{_SEPARATOR}{name}" if node.id else "")

    def components(self, value: Any, place: str = "") -> list[Node]:
        """The components of a list, of an expression over lists, or of a Compose."""
        node = self.follow(value, place)
        if isinstance(node.value, list):
            return [
                one for number, item in enumerate(node.value) for one in self.components(item, f"{node.id}#{number}")
            ]
        if isinstance(node.value, str) and node.value.startswith("$"):
            return [one for reference in references(node.value) for one in self.components(f"@{reference}")]
        if not isinstance(node.value, Mapping):
            return []
        inner = node.value.get("transforms") if node.target == "Compose" else None
        return [node] if inner is None else self.components(inner, f"{node.id}#transforms")

    def network_definition(self, value: Any, place: str = "") -> Node:
        """Where a network is made, through wrappers and expressions such as "$@network_def.to(@device)"."""
        node = self.follow(value, place)
        if node.target in _WRAPPERS:
            return self.network_definition(node.argument("module"), f"{node.id}#module")
        if isinstance(node.value, str) and node.value.startswith("$"):
            for reference in references(node.value):
                inner = self.network_definition(f"@{reference}")
                if isinstance(inner.value, Mapping) and inner.target:
                    return inner
        return node

    def trainers(self) -> list[Node]:
        """Every component that is a trainer, or whose name says so."""
        return [node for node in _walk(self.content) if self._is_trainer(node)]

    def evaluators(self) -> list[Node]:
        """Every component whose name says that it measures."""
        return [node for node in _walk(self.content) if node.target.endswith("Evaluator")]

    def nodes(self) -> list[Node]:
        """Every component."""
        return list(_walk(self.content))

    def texts(self) -> Iterator[str]:
        """Every text, expressions and references among them."""
        waiting: list[Any] = [self.content]
        while waiting:
            value = waiting.pop()
            if isinstance(value, str):
                yield value
            elif isinstance(value, Mapping):
                waiting += value.values()
            elif isinstance(value, list):
                waiting += value

    def located(self, node: Node) -> Any:
        """The class or function of a component, None where it cannot be found."""
        target = node.value.get("_target_") if isinstance(node.value, Mapping) else None
        if not isinstance(target, str):
            return None
        with self.importable():
            try:
                if "." in target:
                    return pydoc.locate(target)
                modules = ComponentLocator().get_component_module_name(target)
                # Of several of that name MONAI takes the first.
                module = modules[0] if isinstance(modules, list) else modules
                return None if module is None else pydoc.locate(f"{module}.{target}")
            except Exception:  # a script of the bundle that does not import
                return None

    def evaluated(self, *places: str) -> list[Any]:
        """Make what stands at these ids, with everything that they refer to.

        Raises:
            Whatever the components raise.
        """
        parser = ConfigParser(copy.deepcopy(self.content))
        with self.importable():
            parser.parse(reset=True)
            return [parser.get_parsed_content(place) for place in places]

    @contextmanager
    def importable(self) -> Iterator[None]:
        """Scripts of the bundle can be imported meanwhile, as they can while it runs."""
        sys.path.insert(0, str(self.root))
        try:
            yield
        finally:
            sys.path.remove(str(self.root))

    def _is_trainer(self, node: Node) -> bool:
        if not node.target.lower().endswith("trainer"):
            found = self.located(node) if "." in str(node.value.get("_target_")) else None
            return isinstance(found, type) and issubclass(found, Trainer)
        return True


def read_bundle(paths: Sequence[Path], overrides: Mapping[str, Any] | None = None) -> BundleConfig:
    """Read a bundle's folder, or its config files in the order in which they are merged.

    Args:
        paths: one folder with ``configs/train.json`` (or yaml, or one other config that has a trainer), or config files.
        overrides: values for config ids, as on the command line.

    Raises:
        FileNotFoundError: where a path does not exist.
        ValueError: where there is no config of a training, or it cannot be read.
    """
    files = _training_files(paths[0]) if len(paths) == 1 and paths[0].is_dir() else list(paths)
    for path in files:
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist. Name a bundle's folder, or its config files.")
    folder = files[0].resolve().parent
    parser = ConfigParser()
    try:
        parser.read_config([str(path) for path in files])
        parser.update(dict(overrides or {}))
        parser.resolve_macro_and_relative_ids()
    except Exception as error:  # json, yaml and MONAI raise kinds of their own
        raise ValueError(
            f"{', '.join(str(path) for path in files)} cannot be read as configs "
            f"({' '.join(str(error).split()) or type(error).__name__}). Correct the file, or name others."
        ) from error
    content = parser.config
    if not isinstance(content, dict):
        raise ValueError(
            f"{files[0]} is no config of a bundle: it holds a {type(content).__name__}, not ids and values."
        )
    return BundleConfig(tuple(files), folder.parent if folder.name == "configs" else folder, copy.deepcopy(content))


def references(expression: str) -> list[str]:
    """Ids that an expression refers to, in their order."""
    return [_normal(match) for match in _REFERENCE.findall(expression)]


def is_supervised(found: Any) -> bool:
    """Whether a class is MONAI's SupervisedTrainer, and not a subclass with steps of its own."""
    return found is SupervisedTrainer


def _normal(place: str) -> str:
    return place.replace("::", _SEPARATOR)


def _training_files(folder: Path) -> list[Path]:
    places = [folder / "configs", folder]
    for place in places:
        for suffix in _SUFFIXES:
            if (place / f"train{suffix}").is_file():
                return [place / f"train{suffix}"]
    found = [
        path for place in places if place.is_dir() for path in sorted(place.iterdir())
        if path.suffix in _SUFFIXES and path.name != "metadata.json" and _has_trainer(path)
    ]  # fmt: skip
    if len(found) == 1:
        return found
    names = ", ".join(path.name for path in found)
    raise ValueError(
        f"{folder} has no configs/train.json or train.yaml, and "
        + (f"{len(found)} configs with a trainer ({names}): name the files." if found else "no config with a trainer.")
    )


def _has_trainer(path: Path) -> bool:
    try:
        return bool(read_bundle([path]).trainers())
    except ValueError:
        return False


def _walk(value: Any, place: str = "") -> Iterator[Node]:
    if isinstance(value, Mapping):
        if "_target_" in value:
            yield Node(place, value)
        for key, item in value.items():
            yield from _walk(item, f"{place}{_SEPARATOR}{key}" if place else str(key))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _walk(item, f"{place}{_SEPARATOR}{number}")
