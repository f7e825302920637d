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

"""The fast method: all patients in one backward pass, each layer's norms and clipped sum from what passes through it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from monai_privacy.mechanisms.clipping.choosing import MemoryBudget, MethodChooser
from monai_privacy.mechanisms.clipping.chunk import Chunk
from monai_privacy.mechanisms.clipping.interception import Interception, Key, Listener, Pass, Use
from monai_privacy.mechanisms.clipping.materials import Material, added, bundled, clip_factors, unless_all
from monai_privacy.mechanisms.clipping.operation import NormMethod, Wanted
from monai_privacy.mechanisms.clipping.precision import full_precision
from monai_privacy.mechanisms.clipping.result import ClippedGradientSum
from monai_privacy.mechanisms.clipping.units import Units
from monai_privacy.mechanisms.losses import RowLoss


@dataclass(frozen=True)
class UseCost:
    """What one use of trained parameters cost in a backward pass.

    Args:
        use: the use.
        method: how the norms of the weight were found; "rows" where the operation gives them by itself.
        seconds: its backward pass and norms.
        nbytes: memory held until the clip factors were known.
    """

    use: Use
    method: str
    seconds: float
    nbytes: int


class NotSeenError(Exception):
    """The gradients of some parameter cannot be told apart by rows; the message says why.

    Args:
        reason: why.
        parameter: position of a parameter that was used where it was not heard; None for other reasons.
    """

    def __init__(self, reason: str, parameter: int | None = None) -> None:
        super().__init__(reason)
        self.parameter = parameter


def one_pass_sum(
    forward: Callable[[Tensor, Tensor], Any],
    row_loss: RowLoss,
    chunk: Chunk,
    parameters: Sequence[nn.Parameter],
    max_grad_norm: float,
    *,
    chooser: MethodChooser,
    require_owned: Callable[[tuple[Key, ...] | None], None],
    observe: Callable[[Any, Tensor], None] | None = None,
    meter: Callable[[UseCost], None] | None = None,
) -> ClippedGradientSum:
    """Clip and sum the gradients of a chunk.

    Args:
        forward: ``forward(inputs, rows)``, the network on these inputs, rows (R,) of the batch.
        row_loss: see :class:`RowLoss`.
        chunk: the rows.
        parameters: what to differentiate.
        max_grad_norm: L2 bound C on one patient's total gradient.
        chooser: remembers methods.
        require_owned: raises ``NotSeenError`` where the rows of what was called do not belong to the batch's rows.
        observe: is shown what the network gave, and its rows, where the pass succeeded.
        meter: is told the cost of each use; waits for a GPU.

    Raises:
        NotSeenError: where the gradients cannot be had this way; nothing was changed.
    """
    units = chunk.units
    listener = _Collector(units, chooser, meter)
    mode = Interception(parameters, listener)
    with mode:
        outputs = forward(chunk.inputs, chunk.rows)
        losses = row_loss(outputs, chunk.targets)
        loss = (losses if chunk.weights is None else losses * chunk.weights.to(losses)).sum()
    if not loss.requires_grad:
        return ClippedGradientSum.nothing(parameters, units.number, loss.device)
    require_owned(mode.heard.key(units.rows))
    listener.begin(mode.heard)
    unheard = mode.gradients(loss, parameters)
    if unheard:
        raise NotSeenError("a parameter is used by an operation without a rule", unheard[0])
    result = summed(listener.materials, parameters, units, max_grad_norm, loss.device)
    # Afterwards: what it does to the outputs must not reach what the sum is made of.
    if observe is not None:
        observe(outputs, chunk.rows)
    return result


@torch.no_grad()
def summed(
    found: dict[int, list[Material]],
    parameters: Sequence[nn.Parameter],
    units: Units,
    max_grad_norm: float,
    device: torch.device,
) -> ClippedGradientSum:
    """Clip and sum from the materials of each parameter, which are used up."""
    materials = {at: added(found.pop(at)) for at in list(found)}
    if not materials:
        return ClippedGradientSum.nothing(parameters, units.number, device)
    alone, places = bundled(materials)
    del materials
    bundles = {id(bundle): bundle for bundle, _ in places.values()}
    everything = [*alone.values(), *(bundle.gradients for bundle in bundles.values())]
    norms, factors, counts = clip_factors(everything, max_grad_norm)
    finite = unless_all(counts)
    del everything
    gradients = []
    with full_precision(norms):
        sums = {at: one.gradients.weighted_sum(factors, finite).split(one.sizes) for at, one in bundles.items()}
        for at, parameter in enumerate(parameters):
            if at in places:
                bundle, number = places[at]
                total = sums[id(bundle)][number]
            elif at in alone:
                # Taken out one by one, so that the memory goes as the sums come.
                total = alone.pop(at).weighted_sum(factors, finite)
            else:
                total = torch.zeros_like(parameter)
            gradients.append(total.reshape(parameter.shape).to(parameter.dtype))
    return ClippedGradientSum(tuple(gradients), norms)


class _Collector(Listener):
    """Collects the materials of each parameter during the backward pass."""

    def __init__(self, units: Units, chooser: MethodChooser, meter: Callable[[UseCost], None] | None) -> None:
        self._units = units
        self._chooser = chooser
        self._meter = meter
        self.materials: dict[int, list[Material]] = {}

    def begin(self, heard: Pass) -> None:
        """The forward pass is over: what it used is known."""
        self._heard = heard
        self._budget = MemoryBudget(heard.input_bytes)

    def heard(
        self,
        use: Use,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        extra: tuple[Tensor, ...],
        gradient: Tensor,
        wants_input: bool,
    ) -> Tensor | None:
        """See the base class."""
        times = self._heard.times_used
        wanted = Wanted(
            input=wants_input,
            weight=use.weight is not None,
            bias=use.bias is not None,
            gradients_only=use.weight is not None and times[use.weight] > 1,
        )
        units = self._units.times(use.rows // self._units.rows)

        chosen = "rows"

        def choose(
            signature: tuple[object, ...],
            methods: Callable[[], Sequence[NormMethod]],
            collect: Callable[[str], Material],
        ) -> Material:
            nonlocal chosen
            material, chosen = self._chooser.collect(
                use.number, signature, methods, collect, units, self._budget, x.device
            )
            return material

        start = 0.0 if self._meter is None else _now(x.device)
        found = use.operation.backward(x, weight, bias, extra, gradient, units, wanted, choose)
        # Plain training has freed the input by now, and holds the gradients of these parameters.
        self._budget.free(x.nbytes)
        nbytes = 0
        for at, parameter, material in ((use.weight, weight, found.weight), (use.bias, bias, found.bias)):
            if parameter is not None:
                self._budget.free(parameter.nbytes)
            if at is not None and material is not None:
                self.materials.setdefault(at, []).append(material)
                nbytes += material.nbytes
        if self._meter is not None:
            self._meter(UseCost(use, chosen, _now(x.device) - start, nbytes))
        return found.input


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
