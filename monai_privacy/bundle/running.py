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

"""Run MONAI bundles from Python: train one, then score a list of records with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events
from monai.bundle import ConfigWorkflow
from monai.engines import SupervisedTrainer


@dataclass(frozen=True)
class Scores:
    """What a binary classifier says of the records of an evaluation, in their order.

    Args:
        labels: 0 or 1 for each image.
        values: probability of label 1 for each image.
        metrics: the evaluator's own metrics, as plain floats.
    """

    labels: tuple[int, ...]
    values: tuple[float, ...]
    metrics: dict[str, float]


def train_bundle(
    configs: Sequence[Path],
    overrides: Mapping[str, Any],
    *,
    handlers: Sequence[Any] = (),
    logging_file: str | bool = False,
) -> SupervisedTrainer:
    """Train as ``monai.bundle run`` does, with these config files and overrides.

    Args:
        configs: config files, the bundle's own first.
        overrides: values for config ids, such as ``{"epochs": 3}``.
        handlers: more handlers for the trainer.
        logging_file: see ``monai.bundle.ConfigWorkflow``.

    Returns:
        The trainer, after the run.
    """
    workflow = _workflow("train", configs, logging_file, overrides)
    workflow.initialize()
    trainer: SupervisedTrainer = workflow.parser.get_parsed_content("train#trainer")
    for handler in handlers:
        handler.attach(trainer)
    workflow.run()
    workflow.finalize()
    return trainer


def score_bundle(configs: Sequence[Path], overrides: Mapping[str, Any], *, logging_file: str | bool = False) -> Scores:
    """Evaluate as ``monai.bundle run`` does and return labels and scores; see :func:`train_bundle` for arguments."""
    workflow = _workflow("train", configs, logging_file, overrides)
    workflow.initialize()
    evaluator = workflow.parser.get_parsed_content("validate#evaluator")
    labels: list[int] = []
    values: list[float] = []

    def collect(engine: Engine) -> None:
        outputs: list[dict[str, Any]] = engine.state.output  # type: ignore[assignment]
        for output in outputs:
            labels.append(int(output["label"].argmax()))
            values.append(float(output["pred"][1]))

    evaluator.add_event_handler(Events.ITERATION_COMPLETED, collect)
    workflow.run()
    workflow.finalize()
    # MONAI's are numpy or torch numbers in some cases (AUC where scores are tied), which JSON does not know.
    metrics = {name: float(value) for name, value in evaluator.state.metrics.items()}
    return Scores(tuple(labels), tuple(values), metrics)


def _workflow(
    kind: str, configs: Sequence[Path], logging_file: str | bool, overrides: Mapping[str, Any]
) -> ConfigWorkflow:
    return ConfigWorkflow(
        config_file=[str(path) for path in configs], workflow_type=kind, logging_file=logging_file, **overrides
    )
