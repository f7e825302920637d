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
"""Judge a bundle's config, part by part: what is private as it is, what an overlay changes, what cannot be."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from typing import Any

from monai.data import PatchDataset
from monai.engines import SupervisedTrainer
from torch import nn
from torch.utils.data import IterableDataset

from monai_privacy.bundle.findings import Finding, PrivacyRequest
from monai_privacy.bundle.reading import BundleConfig, Node, is_supervised
from monai_privacy.engines import DPSupervisedTrainer
from monai_privacy.networks import check_network

__all__ = ["judge_data", "judge_handlers", "judge_network", "judge_trainer"]

_TRAINER = "monai_privacy.DPSupervisedTrainer"
_CONVERSION = "monai_privacy.networks.converted_network"
_CONVERTED = ("batch_norm", "tracked_instance_norm")
_WEIGHTS = ("weight", "pos_weight", "class_weight", "ce_weight")
_PLAIN_SAMPLERS = ("DistributedSampler", "RandomSampler", "SequentialSampler")
_ON_DISK = ("PersistentDataset", "CacheNTransDataset", "LMDBDataset", "GDSDataset")
_SHOW_TRAINING = (
    "StatsHandler", "TensorBoardStatsHandler", "MetricLogger", "MLFlowHandler", "ClearMLStatsHandler", "LogfileHandler"
)  # fmt: skip
_SHOW_IMAGES = (
    "TensorBoardImageHandler", "ClearMLImageHandler", "MetricsSaver", "ClassificationSaver", "ProbMapProducer"
)  # fmt: skip
_KNOWN_HANDLERS = ("monai.", "ignite.", "monai_privacy.")


# ------------------------------------------------------------------ trainer, loss, optimizer


def judge_trainer(config: BundleConfig, trainer: Node) -> Iterator[Finding]:
    """The trainer's own class and arguments, its loss and its optimizer."""
    found = config.located(trainer)
    if found is DPSupervisedTrainer:
        yield Finding("private", trainer.id, "it is private already, with the numbers of its own plan")
    elif is_supervised(found):
        yield Finding("changed", trainer.id, "SupervisedTrainer becomes DPSupervisedTrainer",
                      changes={f"{trainer.id}#_target_": _TRAINER})  # fmt: skip
    else:
        yield Finding("refused", trainer.id, *_why_no_trainer(trainer, found))
    if trainer.argument("iteration_update"):
        yield Finding(
            "refused", f"{trainer.id}#iteration_update", "an iteration_update of your own would replace the private step",
            "Use prepare_batch, inferer or handlers instead",
        )  # fmt: skip
    if trainer.argument("accumulation_steps") not in (None, 1):
        place = f"{trainer.id}#accumulation_steps"
        yield Finding(
            "changed", place, "gradients of several batches were added up before a step; a private step takes its "
            "whole draw at once, in as many pieces as memory asks for", changes={place: 1},
        )  # fmt: skip
    if trainer.argument("amp"):
        yield Finding(
            "noted", f"{trainer.id}#amp", "bf16 without a gradient scaler: scaled gradients would all be clipped"
        )
    for name in ("key_train_metric", "additional_metrics", "postprocessing"):
        if trainer.argument(name):
            yield Finding(
                "changed", f"{trainer.id}#{name}", "left out: what is measured on training patients has no noise",
                "Measure on validation patients",
            )  # fmt: skip
    yield from _judge_loss(config.argument(trainer, "loss_function"))
    optimizer = config.argument(trainer, "optimizer")
    if optimizer.target == "LBFGS":
        yield Finding("refused", optimizer.id, "LBFGS evaluates the loss several times a step, each a release",
                      "Use SGD, Adam, NAdam or another first-order optimizer")  # fmt: skip


def _why_no_trainer(trainer: Node, found: Any) -> tuple[str, str]:
    if trainer.target in ("GanTrainer", "AdversarialTrainer"):
        return (
            f"{trainer.target} trains two networks on each batch, and only one step of one network is accounted",
            "Train the discriminator privately by itself, with SupervisedTrainer",
        )
    if found is None:
        return (f"its class {trainer.value.get('_target_')} cannot be found here", "Install it, or run from its folder")
    if isinstance(found, type) and issubclass(found, SupervisedTrainer):
        reason = f"{trainer.target} may have steps of its own, which would be neither clipped nor noised"
    else:
        reason = f"{trainer.target} is no SupervisedTrainer, and its steps are neither clipped nor noised"
    return reason, "Use SupervisedTrainer, with prepare_batch, inferer or handlers for what is special"


def _judge_loss(loss: Node) -> Iterator[Finding]:
    if not loss.target:
        yield Finding("noted", loss.id, "a loss of your own is called for each row; one that mixes rows is refused by a "
                      "probe before the first step")  # fmt: skip
        return
    reduction = loss.argument("reduction") or "mean"
    yield Finding("private", loss.id, f"{loss.target} is taken row by row: its reduction ({reduction}) has no say")
    if loss.argument("batch"):
        yield Finding(
            "refused", loss.id, f"{loss.target} with batch=True mixes the rows of a batch", "Set batch to false"
        )
    for name in _WEIGHTS:
        if loss.argument(name) is not None:
            yield Finding("noted", f"{loss.id}#{name}", "the claim assumes that these weights are public, and not counted "
                          "from the training patients; the report says so")  # fmt: skip


# ------------------------------------------------------------------ network


def judge_network(config: BundleConfig, trainer: Node, request: PrivacyRequest) -> Iterator[Finding]:
    """The network's layers: it is made, once, and not called."""
    definition = config.network_definition(trainer.argument("network"), f"{trainer.id}#network")
    where = definition.id
    if _names_data_parallel(config, trainer):
        yield Finding("refused", where, "DataParallel splits a patient's rows over devices and mixes gradients",
                      "Use DistributedDataParallel under torchrun, or one device")  # fmt: skip
    try:
        (network,) = config.evaluated(where)
    except Exception as error:  # whatever the bundle's own code raises
        yield Finding("noted", where, f"it could not be made here ({_short(error)}); the trainer checks it before its "
                      "first step", "Install what it needs, and check again")  # fmt: skip
        return
    if not isinstance(network, nn.Module):
        yield Finding("refused", where, f"it is a {type(network).__name__}, not a network", "Name the network's place")
        return
    problems = check_network(network)
    for problem in problems:
        if problem.kind not in _CONVERTED:
            yield Finding("refused", where, f"{problem.name or 'the network itself'}: {problem.reason}", problem.remedy)
    converted = [problem for problem in problems if problem.kind in _CONVERTED]
    count = sum(p.numel() for p in network.parameters() if p.requires_grad)
    if converted:
        what, remedy = _conversion(len(converted), request)
        yield Finding("changed", where, what, remedy, conversion(definition, request), network=True)
    elif not problems:
        yield Finding(
            "private", where, f"{type(network).__name__}, {count:,} trained parameters: no layer mixes patients"
        )


def conversion(definition: Node, request: PrivacyRequest) -> dict[str, Any]:
    """Config ids and values that make a network without batch norm in the place of one with."""
    changed: dict[str, Any] = {"_target_": _CONVERSION, "network": copy.deepcopy(definition.value)}
    if request.batch_norm == "fold":
        changed |= {
            "method": "fold", "public_weights": os.path.abspath(str(request.public_weights)), "statistics_are_public": True
        }  # fmt: skip
    return {definition.id: changed}


def _conversion(layers: int, request: PrivacyRequest) -> tuple[str, str]:
    """What becomes of the batch norms, and what else could."""
    if request.batch_norm == "fold":
        what = (
            f"{layers} batch norms keep what they learnt, as fixed scales: you declare that their statistics are public"
        )
        return what, ""
    return (
        f"{layers} batch norms, which mix patients and keep their statistics, become group norms",
        "Pretrained weights are kept with --batch-norm fold --public-weights FILE, if their data are public",
    )


def _names_data_parallel(config: BundleConfig, trainer: Node) -> bool:
    node = config.follow(trainer.argument("network"))
    text = node.value if isinstance(node.value, str) else node.target
    return "DataParallel" in str(text).replace("DistributedDataParallel", "")


# ------------------------------------------------------------------ loader, dataset, transforms


def judge_data(config: BundleConfig, trainer: Node, request: PrivacyRequest) -> Iterator[Finding]:
    """The loader, its sampler, the dataset and the transforms."""
    loader = config.argument(trainer, "train_data_loader")
    dataset = config.argument(loader, "dataset")
    if loader.argument("repeats") not in (None, 1):
        place = f"{loader.id}#repeats"
        yield Finding("changed", place, "each draw would be used several times and accounted once", changes={place: 1})
    if loader.target == "ThreadDataLoader":
        yield Finding("changed", loader.id, "the trainer draws by a plain loader: ThreadDataLoader ends an epoch early, "
                      "without a word, where its thread fails")  # fmt: skip
    yield from _judge_sampler(config, loader, request)
    yield from _judge_dataset(config, dataset, request)
    for transform in config.components(dataset.argument("transform"), f"{dataset.id}#transform"):
        yield from _judge_transform(transform)


def _judge_sampler(config: BundleConfig, loader: Node, request: PrivacyRequest) -> Iterator[Finding]:
    for name in ("sampler", "batch_sampler"):
        sampler = config.argument(loader, name)
        if sampler.value is None or sampler.target in _PLAIN_SAMPLERS:
            continue
        what = f"{sampler.target or name} does not draw as it is accounted (each patient on a coin of their own)"
        if request.sampler == "drop":
            place = f"{loader.id}#{name}"
            yield Finding("changed", place, f"{what}; it is left out, as you asked", "Fixed public class "
                          "weights in the loss stand in for a balanced draw", {place: None})  # fmt: skip
        else:
            yield Finding("refused", f"{loader.id}#{name}", what, "Leave it out with --sampler drop, and give the loss "
                          "fixed public class weights")  # fmt: skip


def _judge_dataset(config: BundleConfig, dataset: Node, request: PrivacyRequest) -> Iterator[Finding]:
    found = config.located(dataset)
    if dataset.target == "SmartCacheDataset":
        kept = {key: dataset.value[key] for key in ("data", "transform") if key in dataset.value}
        yield Finding(
            "changed", dataset.id, "SmartCacheDataset shows only its cache, so that patients would be drawn at another "
            "rate than accounted: CacheDataset takes its place", changes={dataset.id: {"_target_": "CacheDataset", **kept}},
        )  # fmt: skip
    elif isinstance(found, type) and issubclass(found, PatchDataset):
        yield Finding("refused", dataset.id, f"the rows of {dataset.target} are patches, and whose they are is not to be "
                      "seen", "Use a cropping transform such as RandSpatialCropSamplesd: all crops count as the "
                      "patient's")  # fmt: skip
    elif isinstance(found, type) and issubclass(found, IterableDataset):
        yield Finding("refused", dataset.id, f"{dataset.target} has no rows to draw patients from",
                      "Use Dataset, CacheDataset or PersistentDataset over a list of records")  # fmt: skip
    elif dataset.target in _ON_DISK:
        yield Finding("unnoised", dataset.id, f"{dataset.target} keeps images of patients on the disk "
                      f"({dataset.argument('cache_dir')}), as private as the images themselves",
                      "Delete its folder with them")  # fmt: skip
    elif not dataset.target:
        yield Finding(
            "noted", dataset.id, "a dataset of its own code: the trainer needs its records in .data, one a row"
        )


def _judge_transform(transform: Node) -> Iterator[Finding]:
    samples = transform.argument("num_samples")
    if isinstance(samples, int) and samples > 1:
        yield Finding("private", transform.id, f"{transform.target} makes {samples} samples of an image: all of a patient's "
                      "samples make one gradient, clipped once")  # fmt: skip
    constants = [name for name in ("subtrahend", "divisor") if transform.argument(name) is not None]
    if transform.target.startswith("NormalizeIntensity") and constants:
        yield Finding("noted", transform.id, f"the claim assumes that its {' and '.join(constants)} were not computed from "
                      "the training patients; the report says so")  # fmt: skip
    if transform.target.startswith("SaveImage"):
        yield Finding("unnoised", transform.id, f"{transform.target} writes images of training patients to the disk",
                      "Remove it, or delete what it wrote")  # fmt: skip


# ------------------------------------------------------------------ handlers


def judge_handlers(config: BundleConfig, trainer: Node) -> Iterator[Finding]:
    """The training's handlers: what they would publish."""
    for handler in config.components(trainer.argument("train_handlers"), f"{trainer.id}#train_handlers"):
        if handler.argument("_disabled_") is True:
            continue
        name = handler.target
        if name in _SHOW_TRAINING:
            yield Finding("private", handler.id, f"{name} has nothing to show of the training: loss and metrics on training "
                          "patients have no noise, and are off")  # fmt: skip
        elif name in _SHOW_IMAGES:
            yield Finding("changed", handler.id, f"{name} would publish training patients, and is switched off",
                          changes={f"{handler.id}#_disabled_": True})  # fmt: skip
        elif name == "SmartCacheHandler":
            yield Finding("changed", handler.id, "SmartCacheHandler has no cache to change where CacheDataset stands in, "
                          "and is switched off", changes={f"{handler.id}#_disabled_": True})  # fmt: skip
        elif name == "ValidationHandler":
            yield from _judge_validation(config, handler)
        elif name == "CheckpointLoader":
            yield Finding("noted", handler.id, "the claim assumes that the weights that it loads are public, or come from "
                          "runs on the same ledger")  # fmt: skip
        elif name == "EarlyStopHandler":
            yield Finding("unnoised", handler.id, "when it stops tells something of whom it looks at; the claim assumes "
                          "that the moment was not chosen by looking at training patients")  # fmt: skip
        elif name == "LrScheduleHandler" and _needs_metric(config, handler):
            yield Finding("unnoised", handler.id, "the learning rate follows a metric, which has no noise",
                          "Use a schedule that goes by steps")  # fmt: skip
        elif not str(getattr(config.located(handler), "__module__", "")).startswith(_KNOWN_HANDLERS):
            yield Finding("noted", handler.id, f"{name} is not known here: it is given no batch, prediction or loss, and "
                          "what else it looks at is its own affair")  # fmt: skip


def _judge_validation(config: BundleConfig, handler: Node) -> Iterator[Finding]:
    yield Finding("unnoised", handler.id, "metrics on validation patients, and whatever is chosen by them, have no noise: "
                  "the claim is about training patients alone")  # fmt: skip
    evaluator = config.argument(handler, "validator")
    for inner in config.components(evaluator.argument("val_handlers"), f"{evaluator.id}#val_handlers"):
        if inner.target == "CheckpointSaver" and inner.argument("save_key_metric"):
            yield Finding("unnoised", inner.id, "the network is chosen by its metric on validation patients")


def _needs_metric(config: BundleConfig, handler: Node) -> bool:
    scheduler = config.argument(handler, "lr_scheduler")
    return scheduler.target == "ReduceLROnPlateau" or bool(handler.argument("step_transform"))


def _short(error: Exception) -> str:
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return " ".join(str(error).split())[:160] or type(error).__name__
