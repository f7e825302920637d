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
"""The overlay that makes a bundle's training private: config ids and values, made from what was found in it."""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from monai.data import Dataset

from monai_privacy.bundle.findings import Finding, PrivacyRequest
from monai_privacy.bundle.judging import conversion, judge_data, judge_handlers, judge_network, judge_trainer
from monai_privacy.bundle.programs import judge_programs, unknown_statements
from monai_privacy.bundle.reading import BundleConfig, Node
from monai_privacy.bundle.serving import everywhere, judge_serving, serving_configs
from monai_privacy.data import units_of
from monai_privacy.engines import DPSupervisedTrainer

__all__ = ["BundlePlan", "plan_bundle", "require_private", "write_overlays"]

_ROOT = "privacy"
_BATCH_SHARE = 0.25
_USUAL_DELTA = 1e-5


@dataclass(frozen=True)
class BundlePlan:
    """What was found in a bundle, and the overlays that follow from it.

    Args:
        findings: one for each thing that was looked at.
        training: config ids and values to be merged after the training's configs.
        network: those to be merged after the configs of evaluation, inference and export; empty where the network stays.
    """

    findings: tuple[Finding, ...]
    training: dict[str, Any]
    network: dict[str, Any]

    @property
    def obstacles(self) -> tuple[Finding, ...]:
        """What keeps the bundle from being private by the overlay alone."""
        return tuple(finding for finding in self.findings if finding.verdict in ("asked", "refused"))


def plan_bundle(config: BundleConfig, request: PrivacyRequest) -> BundlePlan:
    """Judge a bundle and make its overlays; nothing is trained, and no image is read.

    The network is made, and the records of the training dataset are, where their files are there.

    Raises:
        ValueError: where there is no trainer, or several.
    """
    trainers = [node for node in config.trainers() if node.value.get("_disabled_") is not True]
    if len(trainers) != 1:
        names = ", ".join(node.id for node in trainers)
        raise ValueError(
            f"{', '.join(path.name for path in config.files)} has {len(trainers)} trainers"
            f"{f' ({names})' if names else ''}, and exactly one can be made private. Name the configs of one training."
        )
    trainer = trainers[0]
    if config.located(trainer) is DPSupervisedTrainer:
        found = (judge_trainer(config, trainer), judge_data(config, trainer, request), judge_handlers(config, trainer))
        return BundlePlan(tuple(one for part in (*found, judge_programs(config, trainer)) for one in part), {}, {})
    findings = [
        *judge_trainer(config, trainer),
        *judge_network(config, trainer, request),
        *judge_data(config, trainer, request),
        *judge_handlers(config, trainer),
        *judge_programs(config, trainer),
        *_judge_seeds(config),
    ]
    patients, num_patients = _judge_patients(config, trainer, request)
    findings += patients
    folder = _judge_folder(config, trainer)
    findings += folder
    converted = any(finding.network for finding in findings)
    configs = serving_configs(config)
    serving = judge_serving(
        configs,
        config,
        config.network_definition(trainer.argument("network"), f"{trainer.id}#network"),
        (lambda node: conversion(node, request)) if converted else None,
        _saving_folders(config, trainer),
    )
    epochs, bad_epochs = _epochs(config, trainer)
    findings += bad_epochs
    network = {
        place: value for finding in (*serving, *findings) if finding.network for place, value in finding.changes.items()
    }
    training: dict[str, Any] = {}
    if num_patients is not None and epochs is not None:
        training |= _numbers(config, trainer, request, num_patients)
        assumed = unknown_statements(config, trainer)
        training |= {f"{trainer.id}#assumptions": assumed} if assumed else {}
    # Least deep first: a whole dataset must be replaced before something inside it is.
    changes = {place: value for finding in findings for place, value in finding.changes.items()}
    training |= dict(sorted(changes.items(), key=lambda item: item[0].count("#")))
    network, unplaced = everywhere(network, [whole for _, _, whole in configs] or [config])
    serving = [one for one in serving if not set(one.changes) & {note.where for note in unplaced}]
    network |= {place: value for finding in folder for place, value in finding.changes.items() if "#" not in place}
    return BundlePlan((*findings, *serving, *unplaced), training, network)


def require_private(plan: BundlePlan) -> None:
    """Raise ValueError where something keeps a bundle from being private."""
    if plan.obstacles:
        raise ValueError(
            "the bundle cannot be made private by an overlay alone: "
            + " ".join(f"{one.where or 'the bundle'}: {one.what}. {one.remedy}." for one in plan.obstacles)
        )


def write_overlays(plan: BundlePlan, config: BundleConfig, folder: Path) -> list[Path]:
    """Write ``privacy`` and, where the network changes or lies elsewhere, ``privacy_network``, in the bundle's own format.

    Raises:
        ValueError: where something keeps the bundle from being private.
    """
    require_private(plan)
    suffix = config.files[0].suffix
    written = []
    for name, pairs in (("privacy", plan.training), ("privacy_network", plan.network)):
        path = folder / f"{name}{suffix}"
        if not pairs:
            # Of an earlier call, about another network; never what this plan was made from.
            if plan.training and path.resolve() not in {file.resolve() for file in config.files}:
                path.unlink(missing_ok=True)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(_text(pairs, suffix), encoding="utf-8")
            written.append(path)
    return written


def _text(pairs: Mapping[str, Any], suffix: str) -> str:
    if suffix == ".json":
        return json.dumps(pairs, indent=4) + "\n"
    return str(yaml.safe_dump(dict(pairs), sort_keys=False, allow_unicode=True, width=120))


# ------------------------------------------------------------------ numbers


def _numbers(config: BundleConfig, trainer: Node, request: PrivacyRequest, num_patients: int) -> dict[str, Any]:
    """Everything under ``privacy``, and the trainer's arguments that refer to it."""
    delta = request.delta
    if delta is None:
        delta = _USUAL_DELTA if num_patients <= 10_000 else 10.0 ** -(math.ceil(math.log10(num_patients)) + 1)
    size = request.expected_batch_size or max(1, round(_BATCH_SHARE * num_patients))
    if size > num_patients:
        raise ValueError(
            f"expected_batch_size is {size}, but there are {num_patients} {request.unit}s: give a smaller one, a quarter of "
            "them for a start."
        )
    # Beside the patients' data, and never where a run from another folder would begin a new one.
    beside = "$@dataset_dir + '/ledger.jsonl'" if config.get("dataset_dir") is not None else None
    ledger = request.ledger or beside or str((config.root / "ledger.jsonl").resolve())
    # At the top, where --epsilon sets them: MONAI would take that option without a word if nothing referred to it.
    numbers = {
        "epsilon": request.epsilon, "delta": delta, "expected_batch_size": size, "max_grad_norm": request.max_grad_norm
    }  # fmt: skip
    top = {name: value for name, value in numbers.items() if name not in config.content}
    privacy = {
        **numbers,
        **{name: f"@{name}" for name in top},
        "unit": request.unit,
        "num_patients": num_patients,
        "ledger_file": ledger,
        "plan": {
            "_target_": "monai_privacy.plan.calibrated_plan",
            "epsilon": f"@{_ROOT}#epsilon",
            "num_patients": f"@{_ROOT}#num_patients",
            "expected_batch_size": f"@{_ROOT}#expected_batch_size",
            "epochs": f"@{trainer.id}#max_epochs",
            "delta": f"@{_ROOT}#delta",
            "max_grad_norm": f"@{_ROOT}#max_grad_norm",
            "unit": f"@{_ROOT}#unit",
        },
        "ledger": {
            "_target_": "monai_privacy.PrivacyLedger",
            "path": f"@{_ROOT}#ledger_file",
            "budget": {
                "_target_": "monai_privacy.PrivacyBudget",
                "epsilon": f"@{_ROOT}#epsilon",
                "delta": f"@{_ROOT}#delta",
            },
        },
        "handlers": [
            {"_target_": "monai_privacy.PrivacyAccountingHandler"},
            {"_target_": "monai_privacy.PrivacyReportHandler", "output_dir": _report_folder(config, trainer)},
        ],
    }
    arguments = {"plan": f"@{_ROOT}#plan", "ledger": f"@{_ROOT}#ledger"}
    if request.patient_key != "patient_id":
        arguments["patient_key"] = request.patient_key
    # Attached, not added to the list of handlers: multi-GPU overlays slice that list by position.
    attach = f"$[handler.attach(@{trainer.id}) for handler in @{_ROOT}#handlers]"
    start = config.get("initialize")
    begin = {"+initialize": [attach]} if start is None or isinstance(start, list) else {"initialize": [start, attach]}
    return top | {_ROOT: privacy} | {f"{trainer.id}#{name}": value for name, value in arguments.items()} | begin


def _epochs(config: BundleConfig, trainer: Node) -> tuple[int | None, list[Finding]]:
    value = config.argument(trainer, "max_epochs").value
    if isinstance(value, int) and value > 0:
        return value, []
    try:
        (value,) = config.evaluated(f"{trainer.id}#max_epochs")
        return int(value), []
    except Exception:
        where = f"{trainer.id}#max_epochs"
        return None, [Finding("asked", where, "the number of epochs, from which noise is calibrated, cannot be read",
                              "Give max_epochs as a number")]  # fmt: skip


# ------------------------------------------------------------------ patients


def _validated(config: BundleConfig, trainer: Node) -> Iterator[Node]:
    """The datasets that the training's own validation measures, where they stand in the config."""
    for handler in config.components(trainer.argument("train_handlers"), f"{trainer.id}#train_handlers"):
        if handler.target == "ValidationHandler":
            loader = config.argument(config.argument(handler, "validator"), "val_data_loader")
            dataset = config.argument(loader, "dataset")
            if dataset.id and dataset.argument("data") is not None:
                yield dataset


def _validated_units(config: BundleConfig, trainer: Node, request: PrivacyRequest) -> set[str]:
    """Patients whom the training's own validation measures, as far as their records can be read here."""
    found: set[str] = set()
    for dataset in _validated(config, trainer):
        with suppress(Exception):  # whatever the bundle's own code raises; the trainer looks again
            (records,) = config.evaluated(f"{dataset.id}#data")
            found |= set(units_of(Dataset(list(records)), unit=request.unit, patient_key=request.patient_key))
    return found


def _judge_patients(config: BundleConfig, trainer: Node, request: PrivacyRequest) -> tuple[list[Finding], int | None]:
    """Who is protected, and how many of them there are."""
    dataset = config.argument(config.argument(trainer, "train_data_loader"), "dataset")
    changes: dict[str, Any] = {}
    where = f"{dataset.id}#data"
    if request.patient_table is not None or request.patient_pattern is not None:
        named: dict[str, Any] = {"records": copy.deepcopy(dataset.argument("data")), "image_key": request.image_key}
        if request.patient_table is not None:
            # Whole: the training is begun in another folder.
            named["table"] = str(request.patient_table.resolve())
        else:
            named["pattern"] = request.patient_pattern
        named |= {} if request.patient_key == "patient_id" else {"patient_key": request.patient_key}
        changes[where] = {"_target_": "monai_privacy.data.with_patient_ids", **named}
        # Validation patients too: otherwise the trainer could not see that one is trained on.
        for validated in _validated(config, trainer):
            changes[f"{validated.id}#data"] = changes[where] | {"records": copy.deepcopy(validated.argument("data"))}
    try:
        changed = config.with_changes(changes)
        (records,) = changed.evaluated(where)
        of_records = units_of(Dataset(list(records)), unit=request.unit, patient_key=request.patient_key)
        units = set(of_records)
        if not units:
            raise FileNotFoundError("no records are here")
    except Exception as error:  # the files may not be here, or the bundle's code fails
        return _unknown_patients(where, error, changes, request)
    if request.num_patients is not None and request.num_patients != len(units):
        return [
            Finding("asked", where, f"the records have {len(units)} {request.unit}s, and you say {request.num_patients}",
                    "Correct --num-patients, or leave it out")
        ], None  # fmt: skip
    both = units & _validated_units(changed, trainer, request) if request.unit == "patient" else set()
    if both:
        return [
            Finding("asked", where, f"{len(both)} patients are in training and in validation too, which the trainer refuses",
                    "Divide the images by patient")
        ], None  # fmt: skip
    what = f"{len(records)} records of {len(units)} {request.unit}s; that number becomes public"
    if request.unit == "image":
        what += ". Single images are protected, and a patient with several images less"
    elif len(units) == len(records):
        what += ". Each image names a patient of its own: true only if nobody has two of them"
    else:
        what += f". One patient has {max(Counter(of_records).values())} of them, and nobody more"
    return [Finding("changed" if changes else "private", where, what, changes=changes)], len(units)


def _unknown_patients(
    where: str, error: Exception, changes: dict[str, Any], request: PrivacyRequest
) -> tuple[list[Finding], int | None]:
    told = error
    while isinstance(told.__cause__, Exception):
        told = told.__cause__
    reason = " ".join(str(told).split())[:200].rstrip(".") or type(told).__name__
    no_id = isinstance(told, ValueError) and "patient" in reason
    if request.num_patients is not None and not no_id:
        what = (
            f"the records cannot be read here ({reason}); the trainer looks for {request.patient_key} in each of them"
        )
        return [Finding("noted", where, what, changes=changes)], request.num_patients
    remedy = (
        "Name the key (--patient-key), a CSV (--patient-table) or a pattern of the file names (--patient-pattern), or ask "
        "for --unit image, which protects single images only"
        if no_id
        else "Give --num-patients, or run where the records are"
    )
    return [Finding("asked", where, f"whose images these are is not known: {reason}", remedy)], None


# ------------------------------------------------------------------ seeds and folders


def _judge_seeds(config: BundleConfig) -> list[Finding]:
    if "set_determinism" in str(config.get("initialize")):
        return [Finding("private", "initialize", "set_determinism fixes neither the draw of patients nor the noise")]
    return []


def _judge_folder(config: BundleConfig, trainer: Node) -> list[Finding]:
    """Where the private network is saved: not over the one that the bundle came with."""
    found = []
    for place, value in _saving_folders(config, trainer).items():
        private = _beside(value)
        if private is not None:
            found.append(
                Finding("changed", place, "the private network is saved in a folder of its own, private/, not over the "
                        "bundle's", changes={place: private})
            )  # fmt: skip
    return found


def _saving_folders(config: BundleConfig, trainer: Node) -> dict[str, Any]:
    """Config ids of the folders into which networks are saved, and what stands there."""
    lists = [(trainer.argument("train_handlers"), f"{trainer.id}#train_handlers")]
    for handler in config.components(*lists[0]):
        if handler.target == "ValidationHandler":
            evaluator = config.argument(handler, "validator")
            lists.append((evaluator.argument("val_handlers"), f"{evaluator.id}#val_handlers"))
    found: dict[str, Any] = {}
    for value, where in lists:
        for handler in config.components(value, where):
            if handler.target == "CheckpointSaver":
                place = config.argument(handler, "save_dir")
                found[place.id] = place.value
    return found


def _beside(value: Any) -> str | None:
    if not isinstance(value, str) or not value:
        return None
    return f"{value} + '/private'" if value.startswith("$") else f"{value.rstrip('/')}/private"


def _report_folder(config: BundleConfig, trainer: Node) -> str:
    places = list(_saving_folders(config, trainer))
    return f"@{places[0]}" if places else "privacy_report"
