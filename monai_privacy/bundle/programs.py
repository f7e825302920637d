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
"""What a bundle runs besides its trainer: statements of its own, other trainings, measurements."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from monai_privacy.bundle.findings import Finding
from monai_privacy.bundle.reading import BundleConfig, Node, references

__all__ = ["judge_programs", "unknown_statements"]

_PROGRAMS = ("initialize", "run", "finalize")
# What configs of MONAI's model zoo run; none of it looks at an image.
_HARMLESS = re.compile(
    r"\$\s*(import |from \w[\w.]* import |monai\.utils\.set_determinism\(|os\.makedirs\(|print\(|logging\.|warnings\."
    r"|setattr\(torch\.backends\.|torch\.backends\.|torch\.cuda\.(set_device|empty_cache)\(|torch\.set_float32"
    r"|dist\.(init|destroy)_process_group\(|torch\.distributed\.(init|destroy)_process_group\(|gc\.collect\()"
)
_PATH = re.compile(r"\$\s*sys\.path\.(append|insert)\([^()]*\)")
_OPEN = re.compile(r"\$\s*open\([^()]*\)")
_CLOSE = re.compile(r"\$\s*@([\w#:]+)\.close\(\)")
_FREEZE = re.compile(r"\$\s*monai\.networks\.utils\.freeze_layers\([^()]*\)")
_RUN = re.compile(r"\$\s*@([\w#:]+)\.run\(\)")
_ATTACH = re.compile(r"\$\s*(@[\w#:]+\.attach\(@[\w#:]+\)|\[handler\.attach\(@[\w#:]+\) for handler in @[\w#:]+\])")
_REFERENCE = re.compile(r"\$?\s*@([\w#:]+)")
_TRAINS = re.compile(r"\w*Trainer\(|create_supervised_trainer|\.backward\(")


def judge_programs(config: BundleConfig, trainer: Node) -> Iterator[Finding]:
    """Everything that a config runs or makes, besides the trainer, by which patients could leave it."""
    loader = config.argument(trainer, "train_data_loader")
    dataset = config.argument(loader, "dataset")
    patients = {place for place in (loader.id, dataset.id, f"{dataset.id}#data") if place}
    for where, statement in _statements(config):
        if _is_harmless(config, trainer, statement):
            continue
        if patients & set(references(statement)):
            yield Finding("refused", where, f"{statement!r} looks at training patients outside of the trainer, where "
                          "nothing is clipped, noised or accounted",
                          "Take it out of the config, or of a private run")  # fmt: skip
        else:
            yield Finding("noted", where, f"{statement!r} is not known here: the claim assumes that it neither looks "
                          "at training patients nor changes the training; the report says so")  # fmt: skip
    for where, text in _expressions(config.content):
        if _TRAINS.search(text):
            yield Finding("refused", where, f"{text[:100]!r} trains by an expression, beside the trainer or in its place",
                          "Make the one trainer by _target_: SupervisedTrainer")  # fmt: skip
    for node in config.evaluators():
        measured = config.argument(node, "val_data_loader")
        own = config.argument(measured, "dataset")
        same = {measured.id, own.id} & patients or (
            own.value is not None and own.argument("data") == dataset.argument("data")
        )
        if same:
            yield Finding("refused", node.id, "it measures training patients, and its metrics have no noise",
                          "Give it other patients, split by patient, or take it out")  # fmt: skip


def unknown_statements(config: BundleConfig, trainer: Node) -> list[str]:
    """What the claim assumes about statements that are not known here, in words for the report."""
    return [
        f"the bundle's {where} ({statement}) neither looks at training patients nor changes the training"
        for where, statement in _statements(config)
        if not _is_harmless(config, trainer, statement)
    ]


def _statements(config: BundleConfig) -> Iterator[tuple[str, str]]:
    for name in _PROGRAMS:
        value = config.get(name)
        for number, statement in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(statement, str):
                yield f"{name}#{number}", statement
            elif isinstance(statement, Mapping):
                yield f"{name}#{number}", f"component {statement.get('_target_')}"


def _is_harmless(config: BundleConfig, trainer: Node, statement: str) -> bool:
    if run := _RUN.fullmatch(statement.strip()):
        node = config.follow(f"@{run[1]}")
        return node.id == trainer.id or node.target.endswith("Evaluator")
    if _ATTACH.fullmatch(statement.strip()) or _FREEZE.fullmatch(statement.strip()):
        return True
    if closed := _CLOSE.fullmatch(statement.strip()):
        return _OPEN.fullmatch(str(config.get(closed[1])).strip()) is not None
    if reference := _REFERENCE.fullmatch(statement.strip()):
        target = str(config.follow(f"@{reference[1]}").argument("_target_") or "")
        return target.startswith("monai_privacy.")
    loader = config.argument(trainer, "train_data_loader")
    dataset = config.argument(loader, "dataset")
    parts = {trainer.id, loader.id, dataset.id, f"{dataset.id}#data", config.argument(dataset, "data").id}
    parts |= {config.argument(trainer, name).id for name in ("network", "optimizer")}
    known = _HARMLESS.match(statement.strip()) or _PATH.fullmatch(statement.strip())
    return known is not None and not parts & set(references(statement))


def _expressions(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _expressions(item, f"{place}#{key}" if place else str(key))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _expressions(item, f"{place}#{number}")
    elif isinstance(value, str) and value.startswith("$"):
        yield place, value
