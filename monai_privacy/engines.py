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

"""MONAI's SupervisedTrainer with a patient-level privacy guarantee."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.engines.workflow import Workflow
from monai.handlers import CheckpointLoader
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import Optimizer
from torch.utils.data import DataLoader

from monai_privacy.accounting.ledger import PrivacyLedger
from monai_privacy.data.loading import (
    PATIENT_KEY,
    BatchPart,
    LogicalBatch,
    parts_by_patient,
    poisson_loader,
    require_unchanged,
    rows_of_value,
    units_of,
)
from monai_privacy.distributed import ProcessGroup
from monai_privacy.ledger_conduct import LedgerConduct
from monai_privacy.mechanisms.clipping import ClippingMethod, GradientClipper
from monai_privacy.mechanisms.losses import RowLoss
from monai_privacy.mechanisms.noise import InsecureNoise, NoiseSource, SystemNoise
from monai_privacy.mechanisms.randomness import InsecureSeeds, fresh_randomness, system_seed
from monai_privacy.networks import require_privately_trainable
from monai_privacy.plan import DPSGDPlan
from monai_privacy.provenance import code_digest, file_digests
from monai_privacy.requirements import (
    assumptions_of,
    differences,
    is_row_wise,
    refuse_mixing,
    refuse_unsupported,
    refuse_validation_on_training_patients,
    rows_of_batch,
    unnoised_by,
)
from monai_privacy.train_statistics import NO_STATISTICS, merged, training_statistics

_ENTRY = "ledger_entry"
# Calls of the network for fewer pixels spend their time in book-keeping, and for many more wait for memory.
_PIXELS = 1 << 18


class DPSupervisedTrainer(SupervisedTrainer):
    """Supervised training in which every step is differentially private, patient by patient.

    One iteration is one Poisson draw of patients, one noised sum of their clipped gradients, one step of the user's own
    optimizer and one line in the ledger, written before the noised gradient exists. All rows of a patient (images,
    crops, views) make one gradient, their mean, clipped once. A draw may be empty: it is noised and recorded like any
    other, and the network is not called. MONAI's iteration events fire once for each iteration; learning-rate
    schedulers, checkpoints, validation and loggers work as they do with ``SupervisedTrainer``.

    Checkpoints that hold the trainer (``save_dict={"trainer": trainer, ...}``) also hold the name of its ledger entry,
    so that a resumed run continues the entry. Steps that are repeated after a crash are new releases and are charged.

    Before each step the ledger is asked whether it fits the plan and the cohort's budget. When the next one would not,
    the epoch ends there, with its validation, checkpoint and logs, and then the run.

    Args:
        device: see ``SupervisedTrainer``.
        max_epochs: see ``SupervisedTrainer``; the plan's ``steps`` bound the run as well.
        train_data_loader: an ordinary ``DataLoader`` over records with a patient id. Its dataset, transforms, workers
            and collation are used; its batch size, shuffling and ``drop_last`` give way to the Poisson draw.
        network: see ``SupervisedTrainer``; without batch norm (see ``convert_batch_norm``).
        optimizer: any plain ``torch.optim`` optimizer over parameters of ``network``.
        loss_function: see ``SupervisedTrainer``; it is called for each row.
        plan: the privacy numbers, calibrated.
        ledger: where each step is recorded before it is released.
        max_physical_batch_size: most rows in one call of the network; does not change the result. Where None, the
            loader's own batch size, since what fitted into memory without privacy does so with it, and more of images
            so small that a quarter of a million pixels are not reached.
        clipping_method: see ``GradientClipper``.
        patient_key: key of the patient's id in the dataset's records.
        release_train_statistics: let the training loss, predictions and training metrics leave without noise. They are
            off otherwise: ``engine.state.output`` is empty, and ``key_train_metric`` is left out. The report says so.
        assumptions: what your claim rests on besides, in words, for the report; for instance "the class weights in the
            loss are public".
        purpose: who trains and why, in words, for the ledger and the report.
        config_files: files whose SHA-256 goes into the ledger, beside that of this package and of the trained network.
        partition: the part of a registered cohort that these patients are, counted from 0; see ``PrivacyLedger``.
        fewest_steps: train with as many of the plan's steps as the budget has room for, if at least with so many; where
            None, a plan that does not fit whole is refused, since noise made for all steps wastes what is left.
        insecure_seed: repeatable draws and noise for debugging; the report then says "not private".
        epoch_length: iterations in an epoch; ``plan.steps_per_epoch`` where None.
        amp: bf16 autocast, without a gradient scaler: scaled gradients would all be clipped.
        kwargs: the other arguments of ``SupervisedTrainer``, unchanged in meaning.

    Raises:
        ValueError: for whatever would void the guarantee, before training: batch norm, data that cannot be drawn by
            patient, losses or networks that mix rows, ``accumulation_steps``, ``iteration_update``, ``DataParallel``.
        PrivacyBudgetError: from ``run``, where not even one step fits.

    Guarantee: the network after each step, and all of them together, are (``ledger.epsilon(delta)``, ``delta``)-DP under
        adding or removing one patient.
    Reference: Abadi et al. 2016, Algorithm 1; McMahan et al. 2018, Algorithm 1, with patients as users.
    """

    def __init__(
        self,
        device: str | torch.device,
        max_epochs: int,
        train_data_loader: Iterable | DataLoader,
        network: nn.Module,
        optimizer: Optimizer,
        loss_function: Callable,
        *,
        plan: DPSGDPlan,
        ledger: PrivacyLedger,
        max_physical_batch_size: int | None = None,
        clipping_method: ClippingMethod = "auto",
        patient_key: str = PATIENT_KEY,
        release_train_statistics: bool = False,
        assumptions: Sequence[str] = (),
        purpose: str = "",
        config_files: Sequence[str] = (),
        partition: int | None = None,
        fewest_steps: int | None = None,
        insecure_seed: int | None = None,
        epoch_length: int | None = None,
        amp: bool = False,
        **kwargs: Any,
    ) -> None:
        refuse_unsupported(network, optimizer, kwargs)
        plain = network.module if isinstance(network, DistributedDataParallel) else network
        require_privately_trainable(plain)
        plan.step_event  # noqa: B018  an uncalibrated plan is refused here, not after the data was loaded
        self.plan = plan
        self.ledger = ledger
        self._group = ProcessGroup.current()
        loader = poisson_loader(
            train_data_loader,  # type: ignore[arg-type]
            sample_rate=plan.sample_rate,
            steps=epoch_length or plan.steps_per_epoch,
            unit=plan.unit,
            patient_key=patient_key,
            rank=self._group.rank,
            world_size=self._group.size,
            insecure_seed=insecure_seed,
        )
        self._require_common_data(train_data_loader, patient_key)
        handlers = kwargs.get("train_handlers")
        if not release_train_statistics:
            kwargs |= {"decollate": False, "postprocessing": None}
            self._dropped = [key for key in ("key_train_metric", "additional_metrics") if kwargs.pop(key, None)]
        super().__init__(
            device,
            max_epochs,
            loader,
            network,
            optimizer,
            loss_function,
            epoch_length=epoch_length or plan.steps_per_epoch,
            amp=amp,
            **kwargs,
        )
        self._row_loss = RowLoss(loss_function)
        self._seeds = system_seed if insecure_seed is None else InsecureSeeds(insecure_seed)
        self._patient_key = patient_key
        self._noise: NoiseSource = SystemNoise() if insecure_seed is None else InsecureNoise(insecure_seed)
        self._max_physical_batch_size = max_physical_batch_size
        self._loader_batch_size = getattr(train_data_loader, "batch_size", None) or 1
        self._clipping_method: ClippingMethod = clipping_method
        self._clipping: tuple[tuple[Any, ...], GradientClipper] | None = None
        self._release_train_statistics = release_train_statistics
        refuse_validation_on_training_patients(handlers, loader.dataset.units, plan.unit, patient_key)  # type: ignore[attr-defined]
        self._conduct = LedgerConduct(
            plan,
            ledger,
            self._group,
            ids=loader.dataset.units,  # type: ignore[attr-defined]
            partition=partition,
            fewest_steps=fewest_steps,
            purpose=purpose,
            artifacts={"code": code_digest(), **file_digests(config_files)},
            unnoised=unnoised_by(handlers, release_train_statistics),
            assumptions=(
                *assumptions_of(plan, plain, loss_function, handlers, train_data_loader.dataset),  # type: ignore[union-attr]
                *assumptions,
            ),
            not_private=() if self._noise.is_secret else ("insecure_seed was set: the noise can be repeated",),
        )
        self._probed = False
        self._stopping = False
        setattr(self.state, _ENTRY, None)
        self.state_dict_user_keys.append(_ENTRY)
        self.add_event_handler(Events.EPOCH_STARTED, self._require_budget)
        self.add_event_handler(Events.EPOCH_COMPLETED, self._end_run_if_stopping)
        patients = loader.batch_sampler.num_patients * self._group.size  # type: ignore[union-attr]
        steps = (self.state.max_epochs, self.state.epoch_length)
        for warning in differences(plan, patients, self._group.size, *steps, getattr(self, "_dropped", [])):
            self.logger.warning(warning)

    @property
    def ledger_entry(self) -> str | None:
        """Name of this run's entry in the ledger; None before its first step."""
        entry: str | None = getattr(self.state, _ENTRY)
        return entry

    def run(self) -> None:  # type: ignore[override]
        """Train, continuing the ledger entry of a loaded checkpoint or beginning one.

        Raises:
            PrivacyBudgetError: where not even one step fits the plan and the budget; nothing is released.
        """
        # Refused before the engine starts: on an error inside it, a CheckpointSaver(save_final=True) would write the
        # untrained network over a model. A run that is resumed when the engine starts has its steps reserved already.
        for loader in self._checkpoint_loaders():
            loader(self)
        if self.ledger_entry is None:
            steps = self._conduct.require_room()
            if steps < self.plan.steps:
                self.logger.warning(
                    f"The budget {self.ledger.budget} has room for {steps} of the plan's {self.plan.steps} steps: the run "
                    "will end early, with noise made for all of them."
                )
        else:
            self._conduct.begin_or_continue(self.ledger_entry, self.state.iteration)
            self._conduct.require_steps_left(self.ledger_entry)
        if self.logger.isEnabledFor(logging.INFO):
            self.logger.info(
                f"Private training: {self.plan.steps} steps are planned, which cost ε = {self.plan.epsilon():.4g} at δ = "
                f"{self.plan.delta:g} for one {self.plan.unit}, besides what the ledger holds."
            )
        # Not Trainer.run: it makes a gradient scaler for amp, and scaled gradients would all be clipped.
        self.scaler = None
        self._stopping = False
        # ignite keeps the dead generator of a run that raised, and would end the next one at once, without a word.
        self._internal_run_generator = None
        Workflow.run(self)
        # Not where it raised: a crash keeps the reservation, so that the run can be resumed.
        self.end_ledger_entry()

    def _checkpoint_loaders(self) -> list[CheckpointLoader]:
        """The handlers that will load this trainer's own state as soon as the engine starts."""
        started = [handler for handler, _, _ in self._event_handlers[Events.STARTED]]
        loaders = [handler for handler in started if isinstance(handler, CheckpointLoader)]
        return [loader for loader in loaders if any(value is self for value in loader.load_dict.values())]

    def end_ledger_entry(self) -> None:
        """Commit the ledger entry of a run that has ended; ``run`` does so itself, and the report's handler before it."""
        if self.ledger_entry is not None:
            self._conduct.end(self.ledger_entry, self._plain_network)

    def _iteration(self, engine: SupervisedTrainer, batchdata: Any) -> Any:
        """One Poisson draw: clip, sum, record, add noise, step; see the class."""
        draw: LogicalBatch = batchdata
        shown = draw.parts[0].data if len(draw.parts) == 1 else [part.data for part in draw.parts]
        # A handler that writes pictures of the batch would publish patients.
        engine.state.batch = shown if self._release_train_statistics else NO_STATISTICS
        engine.network.train()
        engine.optimizer.zero_grad(set_to_none=engine.optim_set_to_none)
        parameters = self._parameters()
        statistics: list[dict[str, Tensor]] = []
        sums: Sequence[Tensor] | None = None
        buffers = self._buffer_versions()
        device = self.state.device
        cuda = (device.index or 0,) if device.type == "cuda" else ()
        with fresh_randomness(self._seeds(), cuda_devices=cuda):
            for part in draw.parts:
                # A function of the user's own might mix the rows that it is given: it is given one patient's.
                for piece in [part] if is_row_wise(self.prepare_batch) else parts_by_patient(part):
                    found = self._clipped_sum(piece, parameters, statistics)
                    sums = found if sums is None else torch._foreach_add(list(sums), list(found))
        if self._buffer_versions() != buffers:
            raise ValueError(
                "the network wrote to its buffers in this step: what it keeps there is never noised, so nothing was "
                "released. Replace the layer that does so (convert_batch_norm does for batch norm)."
            )
        engine.fire_event(IterationEvents.FORWARD_COMPLETED)
        engine.fire_event(IterationEvents.LOSS_COMPLETED)
        self._release(parameters, [torch.zeros_like(p) for p in parameters] if sums is None else sums)
        engine.fire_event(IterationEvents.BACKWARD_COMPLETED)
        engine.optimizer.step()
        engine.state.output = merged(statistics) if statistics else NO_STATISTICS
        engine.fire_event(IterationEvents.MODEL_COMPLETED)
        self._stop_if_next_step_does_not_fit()
        return engine.state.output

    def _clipped_sum(
        self, part: BatchPart, parameters: list[nn.Parameter], statistics: list[dict[str, Tensor]]
    ) -> tuple[Tensor, ...]:
        patient_index = part.patient_index
        batch = self.prepare_batch(part.data, self.state.device, self.non_blocking, **self.to_kwargs)
        inputs, targets, args, kwargs = rows_of_batch(batch, len(patient_index))
        forward = self._forward(args, kwargs, len(patient_index))
        if not self._probed:
            refuse_mixing(self._plain_network, self.loss_function, self._row_loss, forward, inputs, targets)
            self._probed = True
        predictions: list[tuple[Tensor, Any]] = []

        def observe(outputs: Tensor, rows: Tensor) -> None:
            predictions.append((rows, outputs.detach()))

        counts = torch.bincount(patient_index)
        # No probe can vary what it does not know: rows with further arguments go through one patient at a time.
        result = self._clipper(parameters, alone=bool(args or kwargs))(
            (inputs, targets),
            patient_index,
            self.plan.max_grad_norm,
            # A mean over a patient's own rows: how many images they have does not scale their gradient.
            row_weights=(1.0 / counts[patient_index]).to(inputs.device),
            max_physical_batch_size=self._physical_batch_size(inputs),
            forward=forward,
            observe=observe if self._release_train_statistics else None,
        )
        if predictions:
            statistics.append(training_statistics(self._row_loss, inputs, targets, predictions))
        return result.gradients

    def _physical_batch_size(self, inputs: Tensor) -> int:
        """Most rows in one call of the network: a draw may be many times as large as what memory holds."""
        if self._max_physical_batch_size is not None:
            return self._max_physical_batch_size
        return max(self._loader_batch_size, _PIXELS // max(1, inputs[0].numel()))

    def _clipper(self, parameters: list[nn.Parameter], alone: bool) -> GradientClipper:
        """The clipper of these parameters: a scheduler that unfreezes layers gets a new one."""
        key = (alone, *(id(parameter) for parameter in parameters))
        if self._clipping is None or self._clipping[0] != key:
            if alone and self._clipping_method not in ("auto", "microbatch"):
                raise ValueError(
                    f"clipping_method is {self._clipping_method!r}, but prepare_batch gives the network further inputs: no "
                    "probe knows how those mix the rows, so only one patient at a time is certain. Leave clipping_method "
                    "out."
                )
            clipper = GradientClipper(
                self._plain_network,
                self._row_loss,
                parameters=parameters,
                method="microbatch" if alone else self._clipping_method,
                repeatable=not self._noise.is_secret,
            )
            self._clipping = (key, clipper)
        return self._clipping[1]

    def _release(self, parameters: Sequence[nn.Parameter], sums: Sequence[Tensor]) -> None:
        """Record the step, then give the parameters the noised mean gradient."""
        # Recorded first: a crash after this line over-counts, never under-counts.
        self._conduct.record_step(self.state.ledger_entry)
        if self._group.is_first:
            sums = self._noise.add_gaussian(sums, self.plan.noise_std)
        means = torch._foreach_div(list(self._group.sum(sums)), self.plan.expected_batch_size)
        for parameter, mean in zip(parameters, means, strict=True):
            parameter.grad = mean

    def _forward(self, args: Any, kwargs: Any, rows_in_batch: int) -> Callable[[Tensor, Tensor], Any]:
        autocast_kwargs = {"dtype": torch.bfloat16} | self.amp_kwargs

        def forward(inputs: Tensor, rows: Tensor) -> Any:
            chosen_args, chosen_kwargs = rows_of_value((args, kwargs), rows, rows_in_batch)
            with torch.autocast(self.state.device.type, enabled=self.amp, **autocast_kwargs):
                outputs = self.inferer(inputs, self._plain_network, *chosen_args, **chosen_kwargs)
            return outputs.float() if self.amp and isinstance(outputs, Tensor) else outputs

        return forward

    def _buffer_versions(self) -> dict[str, tuple[int, int]]:
        # Data pointer and write count: nothing waits for a GPU, and nothing is copied.
        return {name: (id(b), b._version) for name, b in self._plain_network.named_buffers()}

    @property
    def _plain_network(self) -> nn.Module:
        # Distributed wrappers would average gradients by themselves; the clipped sums are added up here.
        network: nn.Module = self.network
        return network.module if isinstance(network, DistributedDataParallel) else network  # type: ignore[return-value]

    def _parameters(self) -> list[nn.Parameter]:
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        return [p for p in self._plain_network.parameters() if p.requires_grad and id(p) in held]

    def _require_budget(self, engine: Engine) -> None:
        """Begin or continue the ledger entry, and refuse an epoch of which not even one step fits."""
        require_unchanged(self.data_loader, unit=self.plan.unit, patient_key=self._patient_key)
        setattr(self.state, _ENTRY, self._conduct.begin_or_continue(self.ledger_entry, self.state.iteration))
        self._conduct.require_steps_left(self.state.ledger_entry)

    def _require_common_data(self, loader: Any, patient_key: str) -> None:
        if self._group.size == 1:
            return
        units = units_of(loader.dataset, unit=self.plan.unit, patient_key=patient_key)
        if not self._group.all_agree(hashlib.sha256("\n".join(units).encode()).digest()):
            raise ValueError(
                f"the {self._group.size} processes have different datasets: a patient in two of them would be drawn twice. "
                "Give each process the whole dataset (no partition_dataset); the Poisson draw divides the patients."
            )

    def _stop_if_next_step_does_not_fit(self) -> None:
        if self._conduct.steps_left(self.state.ledger_entry) > 0:
            return
        self._stopping = True
        if self.state.iteration % self.state.epoch_length:
            # Not terminate(): it would skip EPOCH_COMPLETED, and with it validation, checkpoint and logs.
            self.terminate_epoch()

    def _end_run_if_stopping(self, engine: Engine) -> None:
        if self._stopping and self.state.epoch < self.state.max_epochs:
            self.logger.warning(
                f"Stopped after epoch {self.state.epoch} of {self.state.max_epochs}: the next step would not fit the "
                f"plan's {self.plan.steps} steps or the budget {self.ledger.budget}."
            )
            self.terminate()
