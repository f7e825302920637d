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

"""Which method for which layer: the fastest that was measured, within the memory there is."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from monai_privacy.mechanisms.clipping.materials import Material, unless_all
from monai_privacy.mechanisms.clipping.operation import NormMethod
from monai_privacy.mechanisms.clipping.units import Units

# Beside what plain training needs at its peak; the rest is what the backward pass has freed so far.
_ALLOWANCE = 0.06
_LEAST_ALLOWANCE = 32 << 20
# A second run of a slow method would tell little and cost much.
_CLEARLY_SLOWER = 2.0


@dataclass(frozen=True)
class Choice:
    """A method, as it was chosen.

    Args:
        method: its name.
        seconds: what it took, the forming of the clipped sum included; 0 where it was not measured.
    """

    method: str
    seconds: float


class MemoryBudget:
    """What one backward pass may hold beside the tensors of plain training, at the height that plain training reaches.

    Args:
        input_bytes: what the layers' inputs take, all of which plain training holds when its backward pass begins.
    """

    def __init__(self, input_bytes: int) -> None:
        self._left = max(_LEAST_ALLOWANCE, int(_ALLOWANCE * input_bytes))

    def admits(self, method: NormMethod) -> bool:
        """Whether the method fits now."""
        return method.held + method.temporary <= self._left

    def hold(self, nbytes: int) -> None:
        """Count what a method keeps."""
        self._left -= nbytes

    def free(self, nbytes: int) -> None:
        """Count what plain training would have freed by now, or would hold in gradients."""
        self._left += nbytes


class MethodChooser:
    """Remembers the fastest method of each layer; measures where it does not know it.

    Args:
        measure: False to choose by estimate, so that runs repeat: times do not, and the methods' roundings differ. So
            it is under ``torch.use_deterministic_algorithms(True)``.
    """

    def __init__(self, measure: bool = True) -> None:
        self._measure = measure
        self._choices: dict[tuple[object, ...], Choice] = {}

    def collect(
        self,
        number: int,
        signature: tuple[object, ...],
        methods: Callable[[], Sequence[NormMethod]],
        collect: Callable[[str], Material],
        units: Units,
        budget: MemoryBudget,
        device: torch.device,
    ) -> tuple[Material, str]:
        """Collect by the method that is known to be the fastest for this use, or find it; also return its name.

        Args:
            number: the use in the pass: two layers of one shape have not the same memory left.
            signature: what the time depends on, the number of rows apart.
            methods: gives the candidates.
            collect: does what the method of that name does.
            units: Poisson draws differ from step to step, so times are remembered by power of two.
            budget: what may be held.
            device: where it runs.
        """
        key = (number, signature, units.rows.bit_length(), units.number.bit_length(), units.equal is None)
        if key not in self._choices:
            candidates = methods()
            fitting = {method.name: method for method in candidates if budget.admits(method)}
            # Where nothing fits, the one that holds least.
            admitted = [method for method in fitting.values() if method.instead_of not in fitting] or [
                min(candidates, key=lambda method: method.held + method.temporary)
            ]
            measure = self._measure and not torch.are_deterministic_algorithms_enabled()
            self._choices[key] = (
                _fastest(admitted, collect, units, device) if measure else Choice(_by_estimate(admitted)[0].name, 0.0)
            )
        method = self._choices[key].method
        material = collect(method)
        budget.hold(material.nbytes)
        return material, method


def _fastest(
    methods: Sequence[NormMethod], collect: Callable[[str], Material], units: Units, device: torch.device
) -> Choice:
    by_estimate = _by_estimate(methods)
    if len(methods) == 1:
        return Choice(methods[0].name, 0.0)
    best = Choice(by_estimate[0].name, _seconds(collect, by_estimate[0].name, units, device))
    best = Choice(best.method, min(best.seconds, _seconds(collect, best.method, units, device)))
    for name in (method.name for method in by_estimate[1:]):
        seconds = _seconds(collect, name, units, device)
        if seconds < _CLEARLY_SLOWER * best.seconds:
            seconds = min(seconds, _seconds(collect, name, units, device))
        if seconds < best.seconds:
            best = Choice(name, seconds)
    return best


def _by_estimate(methods: Sequence[NormMethod]) -> list[NormMethod]:
    return sorted(methods, key=lambda method: method.arithmetic)


def _seconds(collect: Callable[[str], Material], name: str, units: Units, device: torch.device) -> float:
    """What a method takes, the forming of the clipped sum included; its result goes at once, to leave the memory."""
    ones = torch.ones(units.number, dtype=torch.float64, device=device)
    finite = unless_all(torch.ones(units.number, dtype=torch.bool, device=device))
    _wait(device)
    start = time.perf_counter()
    collect(name).weighted_sum(ones, finite)
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
