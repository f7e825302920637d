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

"""One training step of each contender on a network: plain, ours, Opacus's three modes, fastDP, one patient at a time."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable

import torch
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import Tensor, nn

from monai_privacy.mechanisms import GradientClipper, SystemNoise

Step = Callable[[], None]
LEARNING_RATE = 1e-6  # the weights stay what they were, so that every step does the same work


class _Cloned(nn.Module):
    """A layer whose output may be written over without harm to hooks on it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Clone what the layer gives."""
        out: Tensor = self.layer(x).clone()
        return out


def for_hooks(network: nn.Module) -> nn.Module:
    """A copy that Opacus's hooks can work on: no activation in place, no residual sum into a hooked output."""
    network = copy.deepcopy(network)
    for module in list(network.modules()):
        if hasattr(module, "inplace"):
            setattr(module, "inplace", False)  # noqa: B010
        for name, child in list(module.named_children()):
            if isinstance(child, nn.GroupNorm):
                setattr(module, name, _Cloned(child))
    return network


def plain(network: nn.Module, inputs: Tensor, targets: Tensor, amp: bool) -> Step:
    """Ordinary training."""
    optimizer = torch.optim.SGD(_trained(network), lr=LEARNING_RATE)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=amp):
            outputs = network(inputs)
        nn.functional.cross_entropy(outputs.float(), targets).backward()
        optimizer.step()

    return step


def ours(method: str, rows_of_patient: int) -> Callable[[nn.Module, Tensor, Tensor, bool], Step]:
    """This package: clipped sum, noise, step."""

    def make(network: nn.Module, inputs: Tensor, targets: Tensor, amp: bool) -> Step:
        parameters = _trained(network)
        optimizer = torch.optim.SGD(parameters, lr=LEARNING_RATE)
        clipper = GradientClipper(network, nn.CrossEntropyLoss(), method=method)  # type: ignore[arg-type]
        noise = SystemNoise()
        patients = torch.arange(len(inputs)) // rows_of_patient

        def forward(some: Tensor, rows: Tensor) -> Tensor:
            with torch.autocast(some.device.type, torch.bfloat16, enabled=amp):
                outputs: Tensor = network(some)
            return outputs.float()

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            total = clipper((inputs, targets), patients, 1.0, forward=forward)
            for parameter, gradient in zip(parameters, noise.add_gaussian(total.gradients, 1.0), strict=True):
                parameter.grad = gradient / len(inputs)
            optimizer.step()

        return step

    return make


def opacus(functorch: bool) -> Callable[[nn.Module, Tensor, Tensor, bool], Step]:
    """Opacus with hooks, or with functorch everywhere."""

    def make(network: nn.Module, inputs: Tensor, targets: Tensor, amp: bool) -> Step:
        wrapped = GradSampleModule(for_hooks(network), force_functorch=functorch, strict=False)
        optimizer = DPOptimizer(
            torch.optim.SGD(_trained(wrapped), lr=LEARNING_RATE),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            expected_batch_size=len(inputs),
        )

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(inputs.device.type, torch.bfloat16, enabled=amp):
                outputs = wrapped(inputs)
            nn.functional.cross_entropy(outputs.float(), targets).backward()
            optimizer.step()

        return step

    return make


def opacus_ghost(network: nn.Module, inputs: Tensor, targets: Tensor, amp: bool) -> Step:
    """Opacus with ghost clipping: norms in one backward pass, the weighted loss in a second."""
    wrapped = GradSampleModuleFastGradientClipping(
        for_hooks(network), max_grad_norm=1.0, use_ghost_clipping=True, strict=False
    )
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(_trained(wrapped), lr=LEARNING_RATE),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        expected_batch_size=len(inputs),
    )
    loss = DPLossFastGradientClipping(wrapped, optimizer, nn.CrossEntropyLoss(), loss_reduction="mean")

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=amp):
            outputs = wrapped(inputs)
        loss(outputs.float(), targets).backward()
        optimizer.step()

    return step


def fast_dp(network: nn.Module, inputs: Tensor, targets: Tensor, amp: bool) -> Step:
    """fastDP's book-keeping (https://github.com/awslabs/fast-differential-privacy, to be installed from there).

    It leaves parameters that it does not know untrained, which makes it faster than it should be; its own output names them.
    """
    from fastDP import PrivacyEngine  # type: ignore[import-not-found,unused-ignore]

    network = for_hooks(network)
    optimizer = torch.optim.SGD(_trained(network), lr=LEARNING_RATE)
    with contextlib.redirect_stdout(io.StringIO()):
        engine = PrivacyEngine(
            network,
            batch_size=len(inputs),
            sample_size=10 * len(inputs),
            epochs=1,
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            clipping_fn="Abadi",
            clipping_mode="MixOpt",
        )
        engine.attach(optimizer)

    def step() -> None:
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=amp):
            outputs = network(inputs)
        nn.functional.cross_entropy(outputs.float(), targets).backward()
        with contextlib.redirect_stdout(io.StringIO()):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


CONTENDERS: dict[str, Callable[[nn.Module, Tensor, Tensor, bool], Step]] = {
    "plain": plain,
    "ours": ours("auto", 1),
    "ours, 2 images a patient": ours("auto", 2),
    "ours, 4 images a patient": ours("auto", 4),
    "one patient at a time": ours("microbatch", 1),
    "Opacus hooks": opacus(functorch=False),
    "Opacus functorch": opacus(functorch=True),
    "Opacus ghost": opacus_ghost,
    "fastDP": fast_dp,
}


def _trained(network: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in network.parameters() if parameter.requires_grad]
