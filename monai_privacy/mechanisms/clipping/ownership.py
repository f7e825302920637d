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

"""Which rows of a layer are whose? Asked on synthetic rows, by what each row's loss sends back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from monai_privacy.mechanisms.clipping.calls import Call
from monai_privacy.mechanisms.clipping.interception import Interception, Key, Listener, Use
from monai_privacy.mechanisms.clipping.materials import Material
from monai_privacy.mechanisms.clipping.operation import NormMethod, Wanted
from monai_privacy.mechanisms.clipping.units import Units
from monai_privacy.mechanisms.probe import synthetic_rows, synthetic_targets

_ROWS = 3


class OwnershipProbe(Listener):
    """Notes, for each use, to which rows of its output the loss of one row of the batch sends a gradient.

    The weights are replaced by random ones: a layer that starts at zero (a new head, LoRA) would stop the gradient.
    """

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self.touched: dict[int, Tensor] = {}

    def weights(self, call: Call) -> tuple[Tensor | None, Tensor | None]:
        """See the base class."""
        weight = call.weight
        if weight is None:
            return None, call.bias
        noise = torch.randn(weight.shape, generator=self._generator, dtype=weight.dtype).to(weight.device)
        fan_in = max(1, weight[0].numel()) if weight.dim() > 1 else 1
        value = noise / fan_in**0.5 if weight.dim() > 1 else 1 + 0.1 * noise
        # Still a function of the parameter, so that the backward pass comes through here.
        return weight + (value - weight).detach(), call.bias

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
        self.touched[use.number] = (gradient != 0).flatten(1).any(1).cpu()
        wanted = Wanted(input=wants_input, weight=False, bias=False)
        return use.operation.backward(x, weight, bias, extra, gradient, Units((1,) * len(x)), wanted, _never).input


def find_fault(
    parameters: Sequence[nn.Parameter],
    names: Sequence[str],
    row_losses: Callable[[Tensor, Tensor], Tensor],
    inputs: Tensor,
    targets: Tensor,
) -> tuple[tuple[Key, ...] | None, str]:
    """Ask whether each row of each use belongs to one row of the batch, in the order of the batch.

    A layer may see m rows for each row of the batch (slices, windows, instances of a bag): rows m i to m (i + 1) are
    then those of row i. Exact zeros are asked for, not small numbers: autograd sends nothing where nothing depends.

    Args:
        parameters: the trained parameters.
        names: their names.
        row_losses: (R, ...) inputs and (R, ...) targets to (R,) losses.
        inputs: any batch of at least one row; only its shape, dtype and device are used.
        targets: likewise.

    Returns:
        What was called on what (see ``Pass.key``), and why gradients cannot be told apart by rows; empty if they can.
    """
    probe = OwnershipProbe()
    mode = Interception(parameters, probe)
    devices = [inputs.device] if inputs.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        with mode:
            losses = row_losses(synthetic_rows(inputs, _ROWS), synthetic_targets(targets, _ROWS))
        key = mode.heard.key(_ROWS)
        if key is None:
            return None, "a layer sees a number of rows that is no multiple of the batch's"
        seen = torch.zeros(len(mode.heard.uses), dtype=torch.bool)
        for row in range(_ROWS):
            probe.touched.clear()
            with mode:
                unheard = mode.gradients(losses[row], parameters, retain_graph=row < _ROWS - 1)
            if unheard:
                return key, f"{names[unheard[0]]} is used by an operation without a rule"
            for number, touched in probe.touched.items():
                own = touched.unflatten(0, (_ROWS, -1))
                others = own.sum() - own[row].sum()
                use = mode.heard.uses[number]
                if others:
                    return key, f"{use.operation.name} of {names[use.parameters[0]]} mixes the rows of the batch"
                seen[number] |= bool(own[row].any())
    if not bool(seen.all()):
        use = mode.heard.uses[int((~seen).nonzero()[0])]
        return key, f"{use.operation.name} of {names[use.parameters[0]]} received no gradient from synthetic rows"
    return key, ""


def _never(
    signature: tuple[object, ...], methods: Callable[[], Sequence[NormMethod]], collect: Callable[[str], Material]
) -> Material:
    raise AssertionError("no material was wanted")
