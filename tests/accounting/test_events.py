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

from __future__ import annotations

import json
import math

import pytest
from dp_accounting import dp_event
from dp_accounting.dp_event import ComposedDpEvent, GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from hypothesis import given
from hypothesis import strategies as st

from monai_privacy.accounting import dpsgd_event, epsilon_bounds, event_from_dict, event_to_dict
from monai_privacy.accounting.events import composed, leaves

SIGMAS = st.floats(min_value=1e-3, max_value=1e6)
RATES = st.floats(min_value=1e-9, max_value=1.0)
GAUSSIANS = st.builds(GaussianDpEvent, SIGMAS)
LEAVES = GAUSSIANS | st.builds(PoissonSampledDpEvent, RATES, GAUSSIANS)
EVENTS = st.recursive(
    LEAVES,
    lambda inner: (
        st.builds(SelfComposedDpEvent, inner, st.integers(1, 10**9))
        | st.lists(inner, min_size=1, max_size=3).map(ComposedDpEvent)
    ),
    max_leaves=6,
)
NO_POSITIVE_NUMBER = [math.nan, math.inf, -math.inf, -1.0, 0.0, -0.0, 5e-324, True, False, "1.0", None, [1.0], 10**400]
NO_COUNT = [0, -3, 2.7, 2.0, math.nan, math.inf, True, "2", None]
GAUSSIAN = {"kind": "gaussian", "noise_multiplier": 2.0}


def poisson(rate: object, child: object = None) -> dict:
    return {"kind": "poisson_sampled", "sample_rate": rate, "event": GAUSSIAN if child is None else child}


@given(event=EVENTS)
def test_an_event_survives_the_ledger(event: dp_event.DpEvent) -> None:
    text = json.dumps(event_to_dict(event), allow_nan=False)
    again = event_from_dict(json.loads(text))
    assert again == event
    assert leaves(again) == leaves(event)


def test_dpsgd_event_is_repeated_poisson_sampling_of_a_gaussian() -> None:
    event = dpsgd_event(sample_rate=0.25, noise_multiplier=1.5, steps=7)
    assert event == SelfComposedDpEvent(PoissonSampledDpEvent(0.25, GaussianDpEvent(1.5)), 7)
    assert dpsgd_event(sample_rate=1, noise_multiplier=1.5).count == 1


def test_leaves_count_every_release() -> None:
    step = dpsgd_event(sample_rate=0.1, noise_multiplier=1.0).event
    event = composed(
        [SelfComposedDpEvent(composed([step, SelfComposedDpEvent(step, 4)]), 3), GaussianDpEvent(2.0), step]
    )
    assert leaves(event) == {step: 3 * 5 + 1, GaussianDpEvent(2.0): 1}
    assert leaves(composed([])) == leaves(dp_event.NoOpDpEvent()) == {}


@given(parts=st.lists(EVENTS, min_size=1, max_size=4))
def test_leaves_of_a_composition_add_up(parts: list[dp_event.DpEvent]) -> None:
    total: dict[dp_event.DpEvent, int] = {}
    for part in parts:
        for leaf, count in leaves(part).items():
            total[leaf] = total.get(leaf, 0) + count
    assert leaves(composed(parts)) == leaves(composed(reversed(parts))) == total


@pytest.mark.parametrize("value", NO_POSITIVE_NUMBER)
def test_bad_noise_multiplier(value: object) -> None:
    for make in (
        lambda: dpsgd_event(sample_rate=0.1, noise_multiplier=value),  # type: ignore[arg-type]
        lambda: event_from_dict({"kind": "gaussian", "noise_multiplier": value}),
        lambda: event_from_dict(poisson(0.1, {"kind": "gaussian", "noise_multiplier": value})),
        lambda: event_to_dict(GaussianDpEvent(value)),
        lambda: event_to_dict(PoissonSampledDpEvent(0.1, GaussianDpEvent(value))),
        lambda: epsilon_bounds(GaussianDpEvent(value), 1e-5),
        lambda: epsilon_bounds(PoissonSampledDpEvent(0.1, GaussianDpEvent(value)), 1e-5),
    ):
        with pytest.raises(ValueError, match="noise_multiplier"):
            make()


@pytest.mark.parametrize("value", [*NO_POSITIVE_NUMBER, 1.0000001, 64])
def test_bad_sample_rate(value: object) -> None:
    for make in (
        lambda: dpsgd_event(sample_rate=value, noise_multiplier=1.0),  # type: ignore[arg-type]
        lambda: event_from_dict(poisson(value)),
        lambda: event_to_dict(PoissonSampledDpEvent(value, GaussianDpEvent(1.0))),
        lambda: epsilon_bounds(PoissonSampledDpEvent(value, GaussianDpEvent(1.0)), 1e-5),
    ):
        with pytest.raises(ValueError, match="sample_rate"):
            make()


def test_a_sample_rate_above_one_names_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"sample_rate is 1\.5, above 1.*Lower expected_batch_size"):
        dpsgd_event(sample_rate=1.5, noise_multiplier=1.0)


@pytest.mark.parametrize("value", NO_COUNT)
def test_bad_count(value: object) -> None:
    step = GaussianDpEvent(1.0)
    repeated = SelfComposedDpEvent(step, 1)
    object.__setattr__(repeated, "count", value)
    for make in (
        lambda: dpsgd_event(sample_rate=0.1, noise_multiplier=1.0, steps=value),  # type: ignore[arg-type]
        lambda: event_from_dict({"kind": "repeated", "count": value, "event": GAUSSIAN}),
        # Rounding 2.7 down, or adding a negative count, would understate what was released.
        lambda: event_to_dict(repeated),
        lambda: leaves(composed([step, repeated])),
    ):
        with pytest.raises(ValueError, match=r"(count|steps) is .*whole number"):
            make()


class Sneaky(GaussianDpEvent):
    """A subclass may mean anything."""


@pytest.mark.parametrize(
    "event",
    [
        dp_event.LaplaceDpEvent(1.0),
        dp_event.NonPrivateDpEvent(),
        dp_event.UnsupportedDpEvent(),
        dp_event.SampledWithoutReplacementDpEvent(100, 10, GaussianDpEvent(1.0)),
        dp_event.SampledWithReplacementDpEvent(100, 10, GaussianDpEvent(1.0)),
        PoissonSampledDpEvent(0.5, PoissonSampledDpEvent(0.5, GaussianDpEvent(1.0))),
        PoissonSampledDpEvent(0.5, SelfComposedDpEvent(GaussianDpEvent(1.0), 2)),
        Sneaky(1.0),
    ],
    ids=lambda event: type(event).__name__,
)
def test_mechanisms_without_an_accountant_are_refused(event: dp_event.DpEvent) -> None:
    for make in (event_to_dict, leaves, lambda e: epsilon_bounds(e, 1e-5)):
        for nested in (event, SelfComposedDpEvent(event, 3), composed([GaussianDpEvent(1.0), event])):
            with pytest.raises(
                ValueError, match=f"{type(event).__name__} is no event that this version can account for"
            ):
                make(nested)


@pytest.mark.parametrize(
    "data",
    [
        {},
        [],
        "gaussian",
        None,
        7,
        {"kind": "laplace", "noise_multiplier": 1.0},
        {"kind": "os.system", "command": "true"},
        {"kind": None},
        {"kind": ["gaussian"], "noise_multiplier": 1.0},
        {"kind": "Gaussian", "noise_multiplier": 1.0},
        {"kind": "gaussian"},
        {"kind": "poisson_sampled", "sample_rate": 0.1},
        {"kind": "poisson_sampled", "event": GAUSSIAN},
        {"kind": "repeated", "count": 2},
        {"kind": "repeated", "count": 2, "event": {"kind": "composed", "events": [{"kind": "noop"}]}},
        {"kind": "composed"},
        # Nothing at all would be a release that costs nothing.
        {"kind": "composed", "events": []},
        {"kind": "composed", "events": ""},
        {"kind": "composed", "events": {}},
        {"kind": "composed", "events": None},
        {"kind": "composed", "events": [GAUSSIAN, "gaussian"]},
        poisson(0.5, poisson(0.5)),
        poisson(0.5, {"kind": "repeated", "count": 2, "event": GAUSSIAN}),
    ],
    ids=str,
)
def test_damaged_records_are_refused(data: object) -> None:
    with pytest.raises(ValueError, match=r"no event|no accountant|noise_multiplier"):
        event_from_dict(data)  # type: ignore[arg-type]


@pytest.mark.parametrize("event", [composed([]), dp_event.NoOpDpEvent(), SelfComposedDpEvent(composed([]), 5)])
def test_a_step_that_releases_nothing_has_no_ledger_form(event: dp_event.DpEvent) -> None:
    with pytest.raises(ValueError, match="no event that this version can account for"):
        event_to_dict(event)
