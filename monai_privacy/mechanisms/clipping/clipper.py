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

"""The clipped gradient sum, by the fastest method that is exact for the network at hand."""

from __future__ import annotations

import ctypes
import itertools
import logging
import math
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from monai_privacy.mechanisms.clipping.choosing import MethodChooser
from monai_privacy.mechanisms.clipping.chunk import Chunk, chunks
from monai_privacy.mechanisms.clipping.interception import Key
from monai_privacy.mechanisms.clipping.microbatch import microbatch_sum
from monai_privacy.mechanisms.clipping.one_pass import NotSeenError, UseCost, one_pass_sum
from monai_privacy.mechanisms.clipping.opacus_hooks import opacus_sum
from monai_privacy.mechanisms.clipping.ownership import WITHOUT_RULE, batches_alike, find_fault
from monai_privacy.mechanisms.clipping.result import ClippedGradientSum
from monai_privacy.mechanisms.losses import RowLoss
from monai_privacy.mechanisms.probe import require_independent_rows

ClippingMethod = Literal["auto", "one_pass", "microbatch", "opacus"]
Forward = Callable[[Tensor, Tensor], Any]
Observe = Callable[[Any, Tensor], None]
Meter = Callable[[UseCost], None]
_METHODS = ("auto", "one_pass", "microbatch", "opacus")
_logger = logging.getLogger(__name__)


class GradientClipper:
    """Sums the gradients of batches, each patient's clipped once, and remembers what it learnt about the network.

    The fast method is one backward pass for all patients, in which each operation with parameters is heard
    (``Interception``). It is taken where a probe on synthetic rows shows that every row of every such operation
    belongs to one row of the batch, and where no parameter is used unheard. Everywhere else patients go through the
    network one at a time, which is right for any network.

    Args:
        network: any module; buffers that it updates in forward are not covered by the guarantee (see
            ``networks.check_network``).
        loss_function: ``loss_function(outputs, targets)``; made a loss for each row by :class:`RowLoss`.
        parameters: what to differentiate; the network's trainable parameters where None.
        method: "auto"; "microbatch" for one patient at a time; "one_pass" to raise where that would be needed; "opacus"
            for Opacus's per-sample gradients, where they exist and add up.
        repeatable: choose the fast method's arithmetic by estimate and not by time, so that runs agree to the last bit.
    """

    def __init__(
        self,
        network: nn.Module,
        loss_function: Callable[..., Any],
        *,
        parameters: Sequence[nn.Parameter] | None = None,
        method: ClippingMethod = "auto",
        repeatable: bool = False,
    ) -> None:
        if method not in _METHODS:
            raise ValueError(f"method is {method!r}, which is not known. Use one of {', '.join(_METHODS)}.")
        self._network = network
        self._row_loss = loss_function if isinstance(loss_function, RowLoss) else RowLoss(loss_function)
        self._given = None if parameters is None else list(parameters)
        self._method = method
        self._chooser = MethodChooser(measure=not repeatable)
        self._probed: dict[object, str] = {}
        self._trained: list[nn.Parameter] = []
        self._modules: list[tuple[nn.Module, bool]] = []
        self._cases: set[object] = set()
        self._faults: dict[object, str] = {}
        self._told = False

    @property
    def faults(self) -> tuple[str, ...]:
        """Why patients went through the network one at a time; empty where they never did."""
        return tuple(dict.fromkeys(self._faults.values()))

    @property
    def names(self) -> list[str]:
        """The parameters' names, in their order."""
        return self._names(self._parameters())

    def __call__(
        self,
        batch: tuple[Tensor, Tensor],
        patient_index: Tensor,
        max_grad_norm: float,
        *,
        row_weights: Tensor | None = None,
        max_physical_batch_size: int | None = None,
        forward: Forward | None = None,
        observe: Observe | None = None,
        meter: Meter | None = None,
    ) -> ClippedGradientSum:
        """See :func:`clipped_gradient_sum`; ``meter`` is told what each layer cost in the fast method."""
        parameters = self._parameters()
        _check(parameters, max_grad_norm, row_weights, len(batch[0]), max_physical_batch_size)
        modules = list(self._network.modules())
        self._forget_unless(parameters, modules)
        versions = _versions(modules)
        call: Forward = (lambda inputs, rows: self._network(inputs)) if forward is None else forward
        total: ClippedGradientSum | None = None
        for chunk in chunks(batch, patient_index, row_weights, max_physical_batch_size):
            result = self._sum(call, chunk, parameters, max_grad_norm, max_physical_batch_size, observe, meter)
            total = result if total is None else total + result
            # Of the modules that are there now: others may have come, with parameters that were made from the batch.
            if _versions(self._network.modules()) != versions:
                raise ValueError(
                    "the network writes into its own parameters when it is called (an embedding's max_norm does): what it "
                    "learns there is neither clipped nor noised, so nothing is returned. Remove it."
                )
        return ClippedGradientSum.nothing(parameters, 0, batch[0].device) if total is None else total

    def _forget_unless(self, trained: list[nn.Parameter], inside: Sequence[nn.Module]) -> None:
        """What was learnt holds for the parameters that were trained then, and for the network as it was."""
        modules = [(module, module.training) for module in inside]
        known = (*self._trained, *itertools.chain.from_iterable(self._modules))
        found = (*trained, *itertools.chain.from_iterable(modules))
        if len(known) != len(found) or any(a is not b for a, b in zip(known, found, strict=True)):
            # Kept as they are, not their ids: those of things that are gone are given to others.
            self._trained, self._modules = trained, modules
            self._cases.clear()
            self._probed.clear()
            self._faults.clear()

    def _sum(
        self,
        forward: Forward,
        chunk: Chunk,
        parameters: list[nn.Parameter],
        max_grad_norm: float,
        max_rows: int | None,
        observe: Observe | None,
        meter: Meter | None,
    ) -> ClippedGradientSum:
        alike = batches_alike(len(chunk.rows))
        case = (
            *(chunk.inputs.shape[1:], chunk.inputs.dtype, chunk.targets.shape[1:], chunk.targets.dtype, alike),
            getattr(forward, "__code__", None),
        )
        if self._method == "opacus":
            self._require_independent_rows(case, forward, chunk, parameters)
            return opacus_sum(
                self._network,
                forward,
                self._row_loss,
                chunk,
                parameters,
                self._names(parameters),
                max_grad_norm,
                observe=observe,
            )
        # A patient alone costs as little by plain autograd, and no probe needs memory for more of them.
        if self._method == "auto" and chunk.units.number == 1 and meter is None:
            return microbatch_sum(
                forward, self._row_loss, chunk, parameters, max_grad_norm, max_rows=max_rows, observe=observe
            )
        if self._method != "microbatch" and case not in self._cases:
            self._cases.add(case)
            if reason := _is_opaque(self._network) or self._probe(case, forward, chunk, parameters):
                self._faults[case] = reason
        too_many = max_rows is not None and len(chunk.rows) > max_rows
        if self._method != "microbatch" and case not in self._faults and not too_many:
            try:
                return one_pass_sum(
                    forward,
                    self._row_loss,
                    chunk,
                    parameters,
                    max_grad_norm,
                    chooser=self._chooser,
                    require_owned=lambda key: self._require_owned(case, key),
                    observe=observe,
                    meter=meter,
                )
            except NotSeenError as error:
                unheard = error.parameter
                self._faults[case] = str(error) if unheard is None else _without_rule(self._names(parameters)[unheard])
        if self._method == "one_pass":
            raise ValueError(
                f"method is 'one_pass', but {self._faults.get(case, 'a patient has more than max_physical_batch_size rows')}"
                ": patients have to go through the network one at a time. Use method='auto'."
            )
        return microbatch_sum(
            forward, self._row_loss, chunk, parameters, max_grad_norm, max_rows=max_rows, observe=observe
        )

    def _probe(self, case: object, forward: Forward, chunk: Chunk, parameters: list[nn.Parameter]) -> str:
        """Why synthetic rows of this shape cannot be told apart; empty if they can."""
        if not self._told:
            # Minutes for a large network on volumes, in which nothing else is heard of it. Once, and without a number: how
            # many patients were drawn is private.
            self._told = True
            _logger.info(
                "asking the network on synthetic rows whether gradients can be told apart, now and when batches of another "
                "size come: as long as some fifteen steps of at most 32 images"
            )
        # Before the batch itself: beside its graph the probe's would not fit where memory is scarce.
        row_losses = self._row_losses(forward, chunk)
        try:
            key, fault = find_fault(parameters, self._names(parameters), row_losses, chunk.inputs, chunk.targets)
        except Exception as error:  # whatever a network may raise; if it does so for patients too, that will be seen
            return f"synthetic rows could not be tried: {error}"
        finally:
            _give_back_memory()
        self._probed[(case, key)] = fault
        return fault

    def _require_owned(self, case: object, key: tuple[Key, ...] | None) -> None:
        if fault := self._probed.get((case, key), "what the network calls depends on what it sees"):
            raise NotSeenError(fault)

    def _require_independent_rows(
        self, case: object, forward: Forward, chunk: Chunk, parameters: list[nn.Parameter]
    ) -> None:
        """For Opacus's gradients, which are those of the first dimension of each layer, whatever that is."""
        if case in self._cases:
            return
        require_independent_rows(self._row_losses(forward, chunk), chunk.inputs, chunk.targets)
        fault = self._probe(case, forward, chunk, parameters)
        if fault and not fault.endswith(WITHOUT_RULE):
            raise ValueError(f"method is 'opacus', but {fault}. Use method='auto'.")
        self._cases.add(case)

    def _row_losses(self, forward: Forward, chunk: Chunk) -> Callable[[Tensor, Tensor], Tensor]:
        """Losses of synthetic rows, with whatever else the first row of the chunk is given."""

        def row_losses(inputs: Tensor, targets: Tensor) -> Tensor:
            # Whatever else a row is given is that of several rows.
            rows = chunk.rows[torch.arange(len(inputs)) % len(chunk.rows)]
            return self._row_loss(forward(inputs, rows), targets)

        return row_losses

    def _parameters(self) -> list[nn.Parameter]:
        return [p for p in self._network.parameters() if p.requires_grad] if self._given is None else self._given

    def _names(self, parameters: Sequence[nn.Parameter]) -> list[str]:
        known = {id(parameter): name for name, parameter in self._network.named_parameters()}
        return [known.get(id(parameter), "a parameter") for parameter in parameters]


def _versions(modules: Iterable[nn.Module]) -> list[tuple[int, int]]:
    """Their parameters, and how often each was written to: nothing waits for a GPU, and nothing is copied."""
    # Not network.parameters(), which asks each module for its parameters by name and takes twice as long.
    held = [parameter for module in modules for parameter in module._parameters.values()]
    return [(id(parameter), parameter._version) for parameter in held if parameter is not None]


def _check(
    parameters: Sequence[nn.Parameter],
    max_grad_norm: float,
    row_weights: Tensor | None,
    rows: int,
    max_physical_batch_size: int | None,
) -> None:
    if not 0 <= max_grad_norm < math.inf:
        raise ValueError(f"max_grad_norm is {max_grad_norm}, which bounds nothing. Give a finite number, zero or more.")
    if row_weights is not None and row_weights.shape != (rows,):
        raise ValueError(
            f"row_weights has shape {tuple(row_weights.shape)}, but it must be ({rows},): one for each row."
        )
    if max_physical_batch_size is not None and max_physical_batch_size < 1:
        raise ValueError(
            f"max_physical_batch_size is {max_physical_batch_size}, but a call needs a row. Give 1 or more."
        )
    if any(parameter.is_complex() for parameter in parameters):
        raise ValueError(
            "a trained parameter is complex, and only real ones have norms here. Train its real and imaginary parts as two."
        )
    narrow = next((parameter.dtype for parameter in parameters if parameter.element_size() < 4), None)
    if narrow is not None:
        raise ValueError(
            f"a trained parameter is in {narrow}, in which a sum over patients rounds by more than a clipping norm. Keep "
            "parameters in float32, and use autocast for speed."
        )


def _give_back_memory() -> None:
    """What a probe freed goes back to the system: glibc would keep it in pieces."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def _without_rule(name: str) -> str:
    return f"{name} {WITHOUT_RULE}"


def _is_opaque(network: nn.Module) -> str:
    """Why it is no use to look into a network; empty where it is."""
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            return "batch norm mixes the rows of the batch"
        # By name: importing torch._dynamo takes seconds.
        if type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None:
            return "torch.compile hides the operations of the network"
    return ""
