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

"""The plan: what it refuses, what it derives, and that it says what its events cost."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from typing import Any

import pytest
from dp_accounting.dp_event import SelfComposedDpEvent
from hypothesis import given, settings
from hypothesis import strategies as st

from monai_privacy import DPSGDPlan, accounting

NUMBERS = {"num_patients": 100, "expected_batch_size": 20, "steps": 40, "delta": 1e-3}


def make_plan(**changes: Any) -> DPSGDPlan:
    return DPSGDPlan(**NUMBERS | {"noise_multiplier": 4.0} | changes)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[
            (name, value)
            for name in ("num_patients", "expected_batch_size", "steps")
            for value in (0, -5, 20.0, 2.5, True, "20", None, math.nan)
        ],
        *[("delta", value) for value in (0, 1, -1e-5, math.nan, math.inf, True, "1e-5", None)],
        *[
            (name, value)
            for name in ("max_grad_norm", "noise_multiplier")
            for value in (0, -1.0, math.nan, math.inf, True, "1.0", [1.0])
        ],
        ("max_grad_norm", None),
        *[("unit", value) for value in ("hospital", "Patient", "", None, 3, ["patient"])],
    ],
)
def test_a_bad_number_is_named_with_its_value(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{name} is "):
        make_plan(**{name: value})


def test_a_batch_cannot_be_larger_than_the_cohort() -> None:
    with pytest.raises(ValueError, match=r"^expected_batch_size is 101, above the 100 patients.*1.01, above 1. Lower"):
        make_plan(expected_batch_size=101)
    with pytest.raises(ValueError, match="above the 100 images"):
        make_plan(expected_batch_size=101, unit="image")
    assert make_plan(expected_batch_size=100).sample_rate == 1


@pytest.mark.parametrize("delta", [0.01, 0.0101, 0.5])
def test_a_delta_that_permits_publishing_a_patient_warns(delta: float) -> None:
    with pytest.warns(UserWarning, match=r"at or above 1/100.*publishes one patient in full") as caught:
        make_plan(delta=delta)
    assert caught[0].filename == __file__, "the warning names the user's line"


def test_a_small_delta_does_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_plan(delta=0.0099)


def test_positional_and_unknown_arguments_are_refused() -> None:
    with pytest.raises(TypeError):
        DPSGDPlan(100, 20, 40, 1e-3)  # type: ignore[misc]
    with pytest.raises(TypeError, match="epochs"):
        make_plan(epochs=3)


@pytest.mark.parametrize("name", [*NUMBERS, "noise_multiplier", "max_grad_norm", "unit"])
def test_a_plan_never_changes(name: str) -> None:
    plan = make_plan()
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(plan, name, getattr(plan, name))
    assert plan == make_plan()
    assert hash(plan) == hash(make_plan())


def test_numbers_of_other_types_become_plain_ones() -> None:
    class Count:
        def __index__(self) -> int:
            return 100

    class Number:
        def __float__(self) -> float:
            return 1e-3

    plan = make_plan(num_patients=Count(), delta=Number(), max_grad_norm=2)
    assert plan == make_plan(max_grad_norm=2.0)
    assert [type(value) for value in dataclasses.astuple(plan)] == [int, int, int, float, float, float, str]


def test_derived_numbers() -> None:
    plan = make_plan(num_patients=101, max_grad_norm=0.5)
    assert plan.sample_rate == 20 / 101
    assert plan.steps_per_epoch == 6
    assert plan.noise_std == 2.0
    assert make_plan().steps_per_epoch == 5


@pytest.mark.parametrize(("patients", "batch"), [(1, 1), (7, 7), (640, 64), (641, 64), (2279, 256), (10**9, 3)])
def test_an_epoch_draws_everybody_once_on_average(patients: int, batch: int) -> None:
    # In integers: int(1 / rate) loses a step for many sizes of the cohort.
    steps = make_plan(num_patients=patients, expected_batch_size=batch, delta=1e-12).steps_per_epoch
    assert (steps - 1) * batch < patients <= steps * batch


@pytest.mark.parametrize("unit", ["patient", "image"])
def test_for_epochs(unit: str) -> None:
    plan = DPSGDPlan.for_epochs(
        num_patients=101,
        expected_batch_size=20,
        epochs=3,
        delta=1e-3,
        max_grad_norm=0.5,
        noise_multiplier=2.0,
        unit=unit,
    )
    assert plan == make_plan(num_patients=101, steps=18, max_grad_norm=0.5, noise_multiplier=2.0, unit=unit)
    assert DPSGDPlan.for_epochs(num_patients=100, expected_batch_size=20, epochs=8, delta=1e-3) == DPSGDPlan(**NUMBERS)


@pytest.mark.parametrize("epochs", [0, -1, 1.5, True, "3", None])
def test_bad_epochs(epochs: object) -> None:
    with pytest.raises(ValueError, match=r"^epochs is "):
        DPSGDPlan.for_epochs(num_patients=100, expected_batch_size=20, epochs=epochs, delta=1e-3)  # type: ignore[arg-type]


def test_the_steps_of_a_plan_cost_what_the_plan_says() -> None:
    plan = make_plan()
    assert plan.step_event == accounting.dpsgd_event(sample_rate=0.2, noise_multiplier=4.0).event
    for steps in (1, 7, None):
        event = SelfComposedDpEvent(plan.step_event, plan.steps if steps is None else steps)
        assert plan.epsilon(steps) == accounting.epsilon(event, plan.delta)
    # The clipping norm scales noise and gradients alike, and the unit only says whose data they are.
    assert make_plan(max_grad_norm=7.0, unit="image").epsilon() == plan.epsilon()


@pytest.mark.parametrize("steps", [0, -1, 2.5, True, "7"])
def test_bad_steps(steps: object) -> None:
    with pytest.raises(ValueError, match=r"^steps is "):
        make_plan().epsilon(steps)  # type: ignore[arg-type]


@settings(max_examples=8, deadline=None)
@given(steps=st.integers(1, 500), more=st.integers(1, 500))
def test_more_steps_never_cost_less(steps: int, more: int) -> None:
    plan = make_plan(noise_multiplier=10.0)
    assert plan.epsilon(steps) <= plan.epsilon(steps + more)


def test_calibrate_returns_a_new_plan_with_the_least_noise() -> None:
    plan = DPSGDPlan(**NUMBERS)
    calibrated = plan.calibrate(epsilon=0.8)
    assert plan.noise_multiplier is None
    assert calibrated == dataclasses.replace(plan, noise_multiplier=calibrated.noise_multiplier)
    assert 0.8 * (1 - 1e-3) <= calibrated.epsilon() <= 0.8
    again = calibrated.calibrate(epsilon=0.4)
    assert again.noise_multiplier > calibrated.noise_multiplier


@pytest.mark.parametrize("epsilon", [0, -1.0, math.nan, math.inf, True, "3", None])
def test_bad_target(epsilon: object) -> None:
    with pytest.raises(ValueError, match=r"^epsilon is "):
        DPSGDPlan(**NUMBERS).calibrate(epsilon)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "use",
    [
        lambda plan: plan.step_event,
        lambda plan: plan.noise_std,
        lambda plan: plan.epsilon(),
        lambda plan: plan.epsilon(3),
    ],
    ids=["step_event", "noise_std", "epsilon()", "epsilon(3)"],
)
def test_a_plan_without_noise_refuses(use: Any) -> None:
    with pytest.raises(ValueError, match=r"noise_multiplier is None.*Call plan.calibrate\(epsilon="):
        use(DPSGDPlan(**NUMBERS))


@pytest.mark.parametrize(
    "plan", [DPSGDPlan(**NUMBERS), make_plan(unit="image", max_grad_norm=0.3)], ids=["bare", "full"]
)
def test_a_plan_survives_json(plan: DPSGDPlan) -> None:
    data = json.loads(json.dumps(plan.to_dict(), allow_nan=False))
    assert DPSGDPlan.from_dict(data) == plan
    assert set(data) == {field.name for field in dataclasses.fields(DPSGDPlan)}


@pytest.mark.parametrize("changes", [{"steps": 0}, {"noise_multiplier": "4"}, {"unit": "hospital"}])
def test_a_damaged_plan_is_refused(changes: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        DPSGDPlan.from_dict(make_plan().to_dict() | changes)
    with pytest.raises(TypeError, match="momentum"):
        DPSGDPlan.from_dict(make_plan().to_dict() | {"momentum": 0.9})
