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
"""An ordinary trainer that Python code has made, as a private one: for workflows without configs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ignite.metrics import Metric
from monai.engines import SupervisedTrainer
from monai.engines.workflow import Workflow

from monai_privacy.accounting.ledger import PrivacyLedger
from monai_privacy.engines import DPSupervisedTrainer
from monai_privacy.plan import DPSGDPlan

__all__ = ["private_trainer"]


def private_trainer(
    trainer: SupervisedTrainer, *, plan: DPSGDPlan, ledger: PrivacyLedger, **private_arguments: Any
) -> DPSupervisedTrainer:
    """A private trainer with the loader, network, optimizer, loss and handlers of an ordinary one that has not run.

    For Python workflows: put it in the place of the trainer at the end of ``initialize``. Handlers are attached to the new
    trainer as well, in the order in which the old one knows them; metrics on training patients are left out. The old
    trainer must not be run.

    Args:
        trainer: MONAI's ``SupervisedTrainer`` itself, not a subclass, before its first step.
        plan: see ``DPSupervisedTrainer``.
        ledger: see ``DPSupervisedTrainer``.
        private_arguments: the other arguments of ``DPSupervisedTrainer`` that ``SupervisedTrainer`` has not.

    Raises:
        ValueError: where something would be lost or would void the guarantee: a step of its own, plain functions as event
            handlers, a handler that holds the old trainer, and whatever ``DPSupervisedTrainer`` refuses.
    """
    if type(trainer) is not SupervisedTrainer:
        raise ValueError(
            f"the trainer is a {type(trainer).__name__}: its steps may be its own, and would be neither clipped nor noised. "
            "Give a SupervisedTrainer."
        )
    if trainer.state.iteration:
        raise ValueError(
            f"the trainer has made {trainer.state.iteration} steps without privacy, which no ledger knows. Make it anew."
        )
    if trainer._process_function != trainer._iteration:
        raise ValueError(
            "the trainer has an iteration_update of its own, which would replace the private step. Remove it."
        )
    if trainer.compile:
        raise ValueError(
            "the trainer compiled its network. Make it without compile; the private trainer compiles it itself."
        )
    return DPSupervisedTrainer(
        device=trainer.state.device,
        max_epochs=trainer.state.max_epochs,
        train_data_loader=trainer.data_loader,  # type: ignore[arg-type]
        network=trainer.network,
        optimizer=trainer.optimizer,
        loss_function=trainer.loss_function,
        plan=plan,
        ledger=ledger,
        non_blocking=trainer.non_blocking,
        prepare_batch=trainer.prepare_batch,
        inferer=trainer.inferer,
        metric_cmp_fn=trainer.metric_cmp_fn,
        train_handlers=_handlers_of(trainer),
        amp=trainer.amp,
        optim_set_to_none=trainer.optim_set_to_none,
        to_kwargs=trainer.to_kwargs,
        amp_kwargs=trainer.amp_kwargs,
        accumulation_steps=trainer.accumulation_steps,
        **private_arguments,
    )


def _handlers_of(trainer: SupervisedTrainer) -> list[Any]:
    """The objects that were attached to a trainer."""
    found: dict[int, Any] = {}
    for function in _registered(trainer):
        owner = function if hasattr(function, "attach") else getattr(function, "__self__", None)
        if owner is trainer or isinstance(owner, Metric) or _is_monais_own(function):
            continue
        if owner is None or not callable(getattr(owner, "attach", None)):
            name = getattr(function, "__qualname__", repr(function))
            raise ValueError(
                f"the trainer has the function {name} as event handler, which cannot be taken over as it was registered. "
                "Add it to the private trainer instead."
            )
        found[id(owner)] = owner
    for owner in found.values():
        if any(value is trainer for value in _held_by(owner)):
            raise ValueError(
                f"{type(owner).__name__} holds the trainer itself, and would save one that never runs. Make it after the "
                "private trainer, and attach it to that."
            )
    return list(found.values())


def _registered(trainer: SupervisedTrainer) -> Iterator[Callable[..., Any]]:
    for registered in trainer._event_handlers.values():
        for function, _, _ in registered:
            # ignite wraps what runs only every so often; a method may be wrapped itself, and knows whose it is.
            whole = hasattr(function, "__self__") or hasattr(function, "attach")
            yield function if whole else getattr(function, "__wrapped__", function)


def _is_monais_own(function: Callable[..., Any]) -> bool:
    """Whether the trainer registered it for itself: decollation, postprocessing, the sampler's epoch."""
    return getattr(function, "__module__", "") == Workflow.__module__


def _held_by(owner: Any) -> Iterator[Any]:
    for value in vars(owner).values():
        yield value
        if isinstance(value, dict):
            yield from value.values()
