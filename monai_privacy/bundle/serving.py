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

"""The configs beside a training's that use its network: where they make it, and which file they load it from."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from monai_privacy.bundle.findings import Finding
from monai_privacy.bundle.reading import BundleConfig, Node, read_bundle, references

__all__ = ["everywhere", "judge_serving", "serving_configs"]

_OTHERS = ("metadata", "logging", "privacy", "multi_gpu", "mgpu")
_LOADED = re.compile(r"torch\.load\(\s*@(\w+(?:(?:#|::)\w+)*)")
_LOADING = re.compile(r"CheckpointLoader\(|torch\.load\(|jit\.load\(")
_FILE = re.compile(r"/(?P<file>[^/'\"\s]+\.(?:pt|pth))(?P<end>['\"]?)$")


def serving_configs(config: BundleConfig) -> list[tuple[Path, BundleConfig, BundleConfig]]:
    """The configs of evaluation and inference beside those of a training: each file, what stands in it, and as it is run."""
    paths = [
        path for path in sorted(config.files[0].parent.iterdir())
        if path.suffix in (".json", ".yaml", ".yml") and not path.stem.startswith(_OTHERS) and path not in config.files
    ]  # fmt: skip
    found = []
    for path in paths:
        try:
            own = _alone(path, config)
            whole = (
                own if _is_whole(own) else _merged(path, [list(config.files), *([one] for one in paths if one != path)])
            )
        except ValueError:
            continue  # no config
        if not whole.trainers() or whole is not own:
            found.append((path, own, whole))
    return found


def _merged(path: Path, before: Sequence[list[Path]]) -> BundleConfig:
    """The file after the first of those that it can follow: a training, or another config of inference."""
    for files in before[:-1]:
        with suppress(ValueError):
            return read_bundle([*files, path])
    return read_bundle([*before[-1], path])


def judge_serving(
    configs: Sequence[tuple[Path, BundleConfig, BundleConfig]],
    config: BundleConfig,
    definition: Node,
    convert: Callable[[Node], Mapping[str, Any]] | None,
    folders: Mapping[str, Any],
) -> list[Finding]:
    """What has to change in the configs of evaluation and inference, so that they use the private network.

    Args:
        configs: see :func:`serving_configs`.
        config: of the training.
        definition: where it makes its network.
        convert: gives the changes that make a network the converted one; None where the network stays as it is.
        folders: config ids of the folders that the training saves networks in, and what stands there.

    Returns:
        Findings whose changes belong after those configs, and a note on each that does not show what it loads.
    """
    return [
        finding
        for path, own, whole in configs
        for finding in _judge(path, own, whole, config, definition, convert, folders)
    ]


def everywhere(changes: Mapping[str, Any], configs: Sequence[BundleConfig]) -> tuple[dict[str, Any], list[Finding]]:
    """One set of changes that can follow any of the configs: MONAI refuses one inside of what a config does not have.

    Args:
        changes: ids and values, each of which some of the configs need.
        configs: as they are run.

    Returns:
        The changes, with the whole of what lies around one where only some configs have it; and notes on what cannot be
        placed, since configs have different things under one id.
    """
    placed: dict[str, Any] = {}
    notes = []
    for place, value in changes.items():
        top, _, within = place.partition("#")
        having = [config for config in configs if config.get(top) is not None]
        if not within or not having:
            placed[place] = value
        elif any(config.get(top) != having[0].get(top) for config in having):
            parent = place.rpartition("#")[0]
            if len(having) == len(configs) and all(config.get(parent) == having[0].get(parent) for config in having):
                placed[place] = value
            else:
                notes.append(
                    Finding("noted", place, "evaluation and inference have different things here, so that no one overlay "
                            "changes it for both: what is loaded may be a network without privacy",
                            "Name the checkpoint of the private training on the command line", network=True)
                )  # fmt: skip
        elif len(having) == len(configs):
            placed[place] = value
        else:
            whole = having[0].with_changes({top: placed.get(top, having[0].get(top))})
            placed[top] = whole.with_changes({place: value}).get(top)
    return placed, notes


def _judge(
    path: Path,
    own: BundleConfig,
    whole: BundleConfig,
    training: BundleConfig,
    definition: Node,
    convert: Callable[[Node], Mapping[str, Any]] | None,
    folders: Mapping[str, Any],
) -> Iterator[Finding]:
    name = path.name
    networks = [node for node in own.nodes() if node.target and node.target == definition.target]
    for node in networks:
        if convert is not None and node.id != definition.id:
            yield Finding("changed", node.id, f"{name} makes the network here, which is converted as in training",
                          changes=convert(node), network=True)  # fmt: skip
    loaded = list(_loaded(own, whole))
    for node in loaded:
        if any(reference in folders and "#" not in reference for reference in references(str(node.value))):
            continue  # the folder itself is another one
        private = _private(node, whole, training, folders)
        if private is None:
            yield Finding("noted", node.id, f"{name} loads {node.value!r} here, which may be a network without privacy",
                          "Name the checkpoint of the private training after it", network=True)  # fmt: skip
        else:
            yield Finding("changed", node.id, f"{name} loads the private network", changes={node.id: private},
                          network=True)  # fmt: skip
    if (whole is own and not (networks and loaded)) or (not loaded and _evaluates(own, whole)) or _loads_unseen(own):
        yield Finding("noted", "", f"{name} does not show which network it uses, or which file it loads: it may be one "
                      "without privacy", "Name the private network's checkpoint after it", network=True)  # fmt: skip


def _loaded(own: BundleConfig, whole: BundleConfig) -> Iterator[Node]:
    """Where it stands which files networks are loaded from."""
    for node in own.nodes():
        if node.target == "CheckpointLoader":
            place = whole.argument(node, "load_path")
            # "$@checkpoint" is what stands there, too.
            yield whole.follow(place.value.removeprefix("$").strip(), place.id) if _is_reference(place.value) else place
    for text in own.texts():
        for match in _LOADED.finditer(text):
            yield whole.follow(f"@{match[1]}")


def _is_reference(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"\$\s*@\w+(?:(?:#|::)\w+)*\s*", value) is not None


def _evaluates(own: BundleConfig, whole: BundleConfig) -> bool:
    """Whether a file runs something that is no training."""
    trainers = {node.id for node in whole.trainers()}
    run = own.get("run")
    statements = [text for text in (run if isinstance(run, list) else [run]) if isinstance(text, str)]
    return any(not trainers & set(references(text)) for text in statements)


def _loads_unseen(own: BundleConfig) -> bool:
    """Whether weights are loaded in a way that does not show here which."""
    return any(_LOADING.search(text) and not _LOADED.search(text) for text in own.texts()) or any(
        str(place).endswith("load_path") for place in own.content
    )


def _private(node: Node, whole: BundleConfig, training: BundleConfig, folders: Mapping[str, Any]) -> str | None:
    """The same file in the folder of private networks; None where it is not known to be one of the training's."""
    if not isinstance(node.value, str) or _FILE.search(node.value) is None or not node.id:
        return None
    try:
        (file,) = whole.evaluated(node.id)
        saved = [str(training.evaluated(place)[0]) for place in folders]
    except Exception:  # whatever the bundle's own code raises
        return None
    if os.path.normpath(os.path.dirname(str(file))) not in map(os.path.normpath, saved):
        return None
    return _FILE.sub(r"/private/\g<file>\g<end>", node.value)


def _alone(path: Path, training: BundleConfig) -> BundleConfig:
    """What one file says; as it stands, where it only changes things inside of those of the training."""
    try:
        return read_bundle([path])
    except ValueError:
        try:
            content = ConfigParser.load_config_file(str(path))
        except Exception as error:  # json and yaml raise kinds of their own
            raise ValueError(f"{path} is no config: {error}") from error
        if not isinstance(content, dict):
            raise
        return BundleConfig((path,), training.root, content)


def _is_whole(config: BundleConfig) -> bool:
    """Whether a config can be used without those of the training before it."""
    return all(config.get(place) is not None for text in config.texts() for place in references(text))
