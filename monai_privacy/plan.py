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

"""The one place where the privacy numbers of a run live."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from dp_accounting.dp_event import DpEvent

from monai_privacy.accounting import accountants
from monai_privacy.accounting.calibration import calibrate_noise_multiplier
from monai_privacy.accounting.cohort import UNITS
from monai_privacy.accounting.events import dpsgd_event
from monai_privacy.accounting.values import checked_count, checked_delta, checked_positive


@dataclass(frozen=True, kw_only=True)
class DPSGDPlan:
    """The public numbers of one DP-SGD run; the sampler, the clipping, the noise and the ledger all read them here.

    Nothing is derived from the data: each number is an explicit choice that may be published. A plan never changes;
    :meth:`calibrate` returns a new one.

    Args:
        num_patients: number of privacy units: patients, or images where ``unit`` is "image". Public.
        expected_batch_size: units a step draws on average; each unit is drawn with probability
            ``expected_batch_size / num_patients``, on its own coin, and the noised sum is divided by this number.
        steps: the most steps that the run may ever release, repeated ones after a crash included.
        delta: the δ of the guarantee, below ``1 / num_patients``.
        max_grad_norm: L2 bound C on the whole gradient of one unit.
        noise_multiplier: noise standard deviation divided by C; None until calibrated.
        unit: "patient" (the default) protects everything that a patient has in the data; "image" protects one image,
            and less the more images a patient has.

    Raises:
        ValueError: for values out of range, with the value, the reason and the remedy.

    Guarantee: a run that follows the plan is (``epsilon()``, ``delta``)-DP under adding or removing one unit.
    Reference: Abadi et al. 2016, Algorithm 1; Poisson sampling of users as in McMahan et al. 2018, Algorithm 1.

    Example::

        plan = DPSGDPlan(num_patients=2279, expected_batch_size=256, steps=180, delta=1e-5).calibrate(epsilon=3.0)
    """

    num_patients: int
    expected_batch_size: int
    steps: int
    delta: float
    max_grad_norm: float = 1.0
    noise_multiplier: float | None = None
    unit: str = "patient"

    def __post_init__(self) -> None:
        for name in ("num_patients", "expected_batch_size", "steps"):
            object.__setattr__(self, name, checked_count(name, getattr(self, name)))
        object.__setattr__(self, "delta", checked_delta(self.delta))
        object.__setattr__(self, "max_grad_norm", checked_positive("max_grad_norm", self.max_grad_norm))
        if self.noise_multiplier is not None:
            object.__setattr__(self, "noise_multiplier", checked_positive("noise_multiplier", self.noise_multiplier))
        if self.unit not in UNITS:
            raise ValueError(f"unit is {self.unit!r}, but it must be one of {', '.join(UNITS)}.")
        if self.expected_batch_size > self.num_patients:
            raise ValueError(
                f"expected_batch_size is {self.expected_batch_size}, above the {self.num_patients} {self.unit}s there "
                f"are, so sample_rate would be {self.sample_rate:.3g}, above 1. Lower expected_batch_size."
            )
        if self.delta >= 1 / self.num_patients:
            warnings.warn(
                f"delta is {self.delta:g}, at or above 1/{self.num_patients}: a mechanism that publishes one {self.unit} "
                f"in full could meet it. Take a delta well below {1 / self.num_patients:.1g}.",
                stacklevel=3,
            )

    @classmethod
    def for_epochs(
        cls,
        *,
        num_patients: int,
        expected_batch_size: int,
        epochs: int,
        delta: float,
        max_grad_norm: float = 1.0,
        noise_multiplier: float | None = None,
        unit: str = "patient",
    ) -> DPSGDPlan:
        """A plan of ``epochs`` times ``steps_per_epoch`` steps.

        A convenience for MONAI's way of counting. Whoever derives ``num_patients`` from the data makes the number of
        patients public: the report says so.
        """
        epochs = checked_count("epochs", epochs)
        one = cls(
            num_patients=num_patients,
            expected_batch_size=expected_batch_size,
            steps=1,
            delta=delta,
            max_grad_norm=max_grad_norm,
            noise_multiplier=noise_multiplier,
            unit=unit,
        )
        return replace(one, steps=epochs * one.steps_per_epoch)

    @property
    def sample_rate(self) -> float:
        """The probability with which each unit is drawn in a step."""
        return self.expected_batch_size / self.num_patients

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which each unit is drawn once on average, rounded up."""
        return -(-self.num_patients // self.expected_batch_size)

    @property
    def noise_std(self) -> float:
        """Standard deviation σC of the noise on each coordinate of the clipped sum."""
        return self._calibrated() * self.max_grad_norm

    @property
    def step_event(self) -> DpEvent:
        """The event of one step."""
        return dpsgd_event(sample_rate=self.sample_rate, noise_multiplier=self._calibrated()).event

    def epsilon(self, steps: int | None = None) -> float:
        """ε at ``delta`` after ``steps`` steps; after all planned ones where None."""
        count = self.steps if steps is None else checked_count("steps", steps)
        event = dpsgd_event(sample_rate=self.sample_rate, noise_multiplier=self._calibrated(), steps=count)
        return accountants.epsilon(event, self.delta)

    def calibrate(self, epsilon: float) -> DPSGDPlan:
        """A plan with the least noise, to 0.1 % in ε, whose steps together cost at most ``epsilon`` at ``delta``."""
        sigma = calibrate_noise_multiplier(
            epsilon=epsilon, delta=self.delta, sample_rate=self.sample_rate, steps=self.steps
        )
        return replace(self, noise_multiplier=sigma)

    def to_dict(self) -> dict[str, Any]:
        """The numbers as plain JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DPSGDPlan:
        """The plan that :meth:`to_dict` wrote."""
        return cls(**data)

    def _calibrated(self) -> float:
        if self.noise_multiplier is None:
            raise ValueError(
                "noise_multiplier is None: the plan has no noise yet. Call plan.calibrate(epsilon=...) or give one."
            )
        return self.noise_multiplier


def calibrated_plan(
    *,
    epsilon: float,
    num_patients: int,
    expected_batch_size: int,
    epochs: int,
    delta: float,
    max_grad_norm: float = 1.0,
    unit: str = "patient",
) -> DPSGDPlan:
    """A plan of ``epochs`` epochs with the least noise that stays below ``epsilon``, in one call, for config files.

    See :class:`DPSGDPlan` for the arguments, and :meth:`DPSGDPlan.calibrate`.
    """
    return DPSGDPlan.for_epochs(
        num_patients=num_patients,
        expected_batch_size=expected_batch_size,
        epochs=epochs,
        delta=delta,
        max_grad_norm=max_grad_norm,
        unit=unit,
    ).calibrate(epsilon=epsilon)
