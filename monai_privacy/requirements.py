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

"""What a private training must not be given, and what its claim rests on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from monai.engines.utils import PrepareBatchDefault, PrepareBatchExtraInput, default_prepare_batch
from monai.handlers import ValidationHandler
from monai.transforms import NormalizeIntensity
from monai.utils import convert_to_tensor
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from monai_privacy.data.loading import transforms_of, units_of
from monai_privacy.mechanisms.losses import RowLoss
from monai_privacy.mechanisms.probe import require_independent_rows
from monai_privacy.networks import FoldedBatchNorm, find_updated_buffers
from monai_privacy.plan import DPSGDPlan


def is_row_wise(prepare_batch: Callable[..., Any]) -> bool:
    """Whether this prepare_batch puts row beside row and lets none see another; another one is not known to."""
    return prepare_batch is default_prepare_batch or type(prepare_batch) in (
        PrepareBatchDefault,
        PrepareBatchExtraInput,
    )


def rows_of_batch(batch: Any, rows: int) -> tuple[Tensor, Tensor, tuple[Any, ...], dict[str, Any]]:
    """What a prepare_batch gave: inputs and targets of so many rows, and the network's further arguments.

    Raises:
        ValueError: where it is not to be seen which rows are whose.
    """
    inputs, targets, args, kwargs = (*batch, (), {}) if len(batch) == 2 else batch
    if not (isinstance(inputs, Tensor) and isinstance(targets, Tensor)):
        raise ValueError(
            f"prepare_batch gave {type(inputs).__name__} and {type(targets).__name__}: the rows of a patient can be "
            "told apart only in tensors. Return tensors with one row for each image."
        )
    if not len(inputs) == len(targets) == rows:
        raise ValueError(
            f"the batch has {len(inputs)} inputs and {len(targets)} targets for {rows} samples: it is unknown which "
            "rows are whose. Let the collate function keep one row for each sample or crop."
        )
    # Plain tensors: indexing metadata row by row costs more than a small network.
    return convert_to_tensor(inputs, track_meta=False), convert_to_tensor(targets, track_meta=False), args, kwargs


def refuse_unsupported(network: nn.Module, optimizer: Optimizer, kwargs: dict[str, Any]) -> None:
    if kwargs.get("accumulation_steps", 1) != 1:
        raise ValueError(
            f"accumulation_steps is {kwargs['accumulation_steps']}: each draw must be noised and recorded by itself. "
            "Raise the plan's expected_batch_size, and bound memory with max_physical_batch_size."
        )
    if kwargs.get("iteration_update") is not None:
        raise ValueError(
            "iteration_update is set: it would replace the private step. Remove it; use prepare_batch, inferer or "
            "handlers instead."
        )
    if isinstance(network, nn.DataParallel):
        raise ValueError(
            "network is a DataParallel: it splits a patient's rows over devices and mixes gradients. Use "
            "DistributedDataParallel under torchrun, or one device."
        )
    own = {id(p) for p in network.parameters()}
    foreign = sum(id(p) not in own for group in optimizer.param_groups for p in group["params"])
    if foreign:
        raise ValueError(
            f"the optimizer holds {foreign} parameters that are not the network's: their gradients would not be "
            "private. Make the optimizer from network.parameters(), after convert_batch_norm."
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            "the optimizer is LBFGS: it evaluates the loss several times a step, each a release. Use SGD, Adam, NAdam "
            "or another first-order optimizer."
        )


def refuse_mixing(
    network: nn.Module,
    loss_function: Callable[..., Any],
    row_loss: RowLoss,
    forward: Callable[[Tensor, Tensor], Any],
    inputs: Tensor,
    targets: Tensor,
) -> None:
    """Raise ValueError where the network or the loss learns in its forward pass, or one row's loss sees another row."""

    def row_losses(some_inputs: Tensor, some_targets: Tensor) -> Tensor:
        first_rows = torch.zeros(len(some_inputs), dtype=torch.int64)
        return row_loss(forward(some_inputs, first_rows), some_targets)

    first_row = torch.zeros(1, dtype=torch.int64)
    probe_input = torch.randn_like(inputs[:1]) if inputs.is_floating_point() else inputs[:1] * 0
    changed = find_updated_buffers(network, lambda: forward(probe_input, first_row))
    if isinstance(loss_function, nn.Module):
        changed += find_updated_buffers(row_loss.unreduced, lambda: row_losses(probe_input, targets[:1] * 0))
    if changed:
        raise ValueError(
            f"the network or the loss updates {', '.join(changed)} in its forward pass: what it learns there is never "
            "noised. Replace the layer (convert_batch_norm does so for batch norm)."
        )
    require_independent_rows(row_losses, inputs, targets)


def unnoised_by(handlers: Any, release_train_statistics: bool) -> tuple[str, ...]:
    found = []
    if release_train_statistics:
        found.append("training images, loss, predictions and metrics, to whatever handler asks for them")
    if any(isinstance(handler, ValidationHandler) for handler in handlers or ()):
        found.append("metrics on the validation patients, and whatever was chosen by them")
    return tuple(found)


def assumptions_of(
    plan: DPSGDPlan, network: nn.Module, loss_function: Callable[..., Any], handlers: Any, dataset: Any = None
) -> tuple[str, ...]:
    """What the claim of a run rests on besides its mechanism, in words."""
    found = [
        f"the number of {plan.unit}s, {plan.num_patients}, is public",
        "the weights that training began with are public, or come from runs on this ledger",
        "the numbers of each run, and when it was stopped, were not chosen by looking at what was released",
    ]
    if plan.unit == "patient":
        found.append("all data of one patient carry one patient id")
    else:
        found.append("each image is listed once, or each time by the same file name")
    if any(isinstance(handler, ValidationHandler) for handler in handlers or ()):
        found.append("no validation patient is a training patient")
    if any(isinstance(module, FoldedBatchNorm) for module in network.modules()):
        found.append("the batch-norm statistics that were folded into the network are public")
    if any(getattr(loss_function, name, None) is not None for name in ("weight", "pos_weight", "class_weight")):
        found.append("the class weights in the loss are public")
    fixed = sorted({name for transform in transforms_of(dataset) for name in _fixed_statistics(transform)})
    if fixed:
        found.append(f"the numbers of {', '.join(fixed)} were not computed from the training {plan.unit}s")
    return tuple(found)


def _fixed_statistics(transform: Any) -> Iterator[str]:
    """Names of the transforms, at any depth, whose numbers may be those of somebody's images."""
    for inner in getattr(transform, "transforms", ()):
        yield from _fixed_statistics(inner)
    own = getattr(transform, "normalizer", transform)
    if isinstance(own, NormalizeIntensity) and (own.subtrahend is not None or own.divisor is not None):
        yield type(transform).__name__


def refuse_validation_on_training_patients(handlers: Any, units: Sequence[str], unit: str, patient_key: str) -> None:
    """Raise ValueError where a ValidationHandler measures, without noise, patients who are trained on."""
    for handler in handlers or ():
        loader = getattr(getattr(handler, "validator", None), "data_loader", None)
        dataset = getattr(loader, "dataset", None)
        if not isinstance(handler, ValidationHandler) or dataset is None:
            continue
        try:
            validated = set(units_of(dataset, unit=unit, patient_key=patient_key))
        except ValueError:  # no patient ids there; the report names the assumption
            continue
        both = len(validated & {name for name in units if not name.startswith("row ")})
        if both:
            raise ValueError(
                f"{both} {unit}s are both trained on and validated on: their metrics would leave without noise. Split by "
                "patient (monai_privacy.data.split_patients)."
            )


def differences(
    plan: DPSGDPlan, patients: int, processes: int, max_epochs: int, epoch_length: int, dropped: Sequence[str]
) -> Iterator[str]:
    """What a run does otherwise than its numbers or arguments say, and why the guarantee holds all the same."""
    if abs(patients - plan.num_patients) > max(processes, 0.05 * plan.num_patients):
        yield (
            f"The data has about {patients} {plan.unit}s, the plan says {plan.num_patients}: the guarantee holds, but "
            f"batches will have about {patients * plan.sample_rate:.0f} of them, not {plan.expected_batch_size}."
        )
    if max_epochs * epoch_length != plan.steps:
        yield (
            f"max_epochs {max_epochs} times epoch_length {epoch_length} are {max_epochs * epoch_length} steps, the plan has "
            f"{plan.steps}: the run ends at the smaller, with noise made for the plan."
        )
    if dropped:
        yield (
            f"{' and '.join(dropped)} left out: training metrics are not noised. Measure on validation patients, or set "
            "release_train_statistics=True and the report will say so."
        )
