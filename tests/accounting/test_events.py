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
from dp_accounting.dp_event import (
    ComposedDpEvent,
    GaussianDpEvent,
    LaplaceDpEvent,
    MixtureOfGaussiansDpEvent,
    PoissonSampledDpEvent,
    RepeatAndSelectDpEvent,
    SelfComposedDpEvent,
)
from hypothesis import given
from hypothesis import strategies as st

from monai_privacy.accounting import (
    capped_images_event,
    dpsgd_event,
    epsilon_bounds,
    event_from_dict,
    event_to_dict,
    gnmax_event,
    lnmax_event,
    smooth_release_event,
    truncated_dpsgd_event,
    tuning_event,
    vote_threshold_event,
)
from monai_privacy.accounting.events import composed, leaves

SIGMAS = st.floats(min_value=1e-3, max_value=1e6)
RATES = st.floats(min_value=1e-9, max_value=1.0)
GAUSSIANS = st.builds(GaussianDpEvent, SIGMAS)
COUNTS = st.integers(1, 10**6)
TRUNCATED = st.builds(
    lambda *numbers: truncated_dpsgd_event(
        num_patients=numbers[0], sample_rate=numbers[1], max_batch_size=numbers[2], noise_multiplier=numbers[3]
    ).event,
    COUNTS, RATES, COUNTS, SIGMAS,
)  # fmt: skip
CAPPED = st.builds(
    lambda rate, sigma, images: capped_images_event(
        sample_rate=rate, noise_multiplier=sigma, max_images_per_patient=images
    ).event,
    RATES, SIGMAS, st.integers(1, 20),
)  # fmt: skip
SIMPLE = (
    GAUSSIANS
    | st.builds(LaplaceDpEvent, SIGMAS)
    | st.builds(PoissonSampledDpEvent, RATES, GAUSSIANS)
    | TRUNCATED
    | CAPPED
)
SMOOTH = st.builds(
    lambda beta, sigma: smooth_release_event(beta=beta, noise_multiplier=sigma), st.floats(1e-6, 2.0), SIGMAS
)
TUNED = st.builds(
    lambda parts, mean, shape: tuning_event(composed(parts), mean_runs=mean, shape=shape),
    st.lists(SIMPLE, min_size=1, max_size=3), st.floats(1, 1e6), st.sampled_from([0.0, 0.5, 1.0, math.inf]),
)  # fmt: skip
LEAVES = SIMPLE | TUNED | SMOOTH
EVENTS = st.recursive(
    LEAVES,
    lambda inner: (
        st.builds(SelfComposedDpEvent, inner, st.integers(1, 500))
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
    assert leaves(again) == leaves(event)
    assert event_to_dict(again) == event_to_dict(event)


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
        dp_event.DiscreteLaplaceDpEvent(1.0, 1),
        dp_event.ZCDpEvent(1.0),
        dp_event.RandomizedResponseDpEvent(0.5, 2),
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
        {"kind": "laplace"},
        {"kind": "dp_accounting.dp_event.GaussianDpEvent", "noise_multiplier": 1.0},
        {"kind": "mixture_of_gaussians", "noise_multiplier": 1.0},
        {"kind": "mixture_of_gaussians", "noise_multiplier": 1.0, "sensitivities": {}, "chances": []},
        {"kind": "truncated_poisson", "noise_multiplier": 1.0},
        {"kind": "tuned", "mean_runs": 2, "shape": "poisson"},
        {"kind": "tuned", "mean_runs": 2, "shape": "poisson", "event": {"kind": "composed", "events": []}},
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
    with pytest.raises(ValueError, match=r"no event|no accountant|noise_multiplier|must be a list"):
        event_from_dict(data)  # type: ignore[arg-type]


@pytest.mark.parametrize("event", [composed([]), dp_event.NoOpDpEvent(), SelfComposedDpEvent(composed([]), 5)])
def test_a_step_that_releases_nothing_has_no_ledger_form(event: dp_event.DpEvent) -> None:
    with pytest.raises(ValueError, match="no event that this version can account for"):
        event_to_dict(event)


def test_votes_move_by_what_one_patient_can_change() -> None:
    """Histograms of votes by hand: a patient in t teachers moves t votes from one class to another."""
    for teachers in (1, 3):
        before, after = [7, 5, 2], [7 - teachers, 5 + teachers, 2]
        l2 = math.dist(before, after)
        l1 = sum(abs(a - b) for a, b in zip(before, after, strict=True))
        settings = {"teachers_per_patient": teachers}
        answers = gnmax_event(noise_std=40.0, answers=9, **settings)
        assert answers.count == 9
        assert answers.event.noise_multiplier == pytest.approx(40 / l2)
        # Two counts, each moved by half of it.
        answer = lnmax_event(noise_scale=40.0, answers=9, **settings)
        assert answer == SelfComposedDpEvent(LaplaceDpEvent(40 / (l1 / 2)), 18)
        # The largest count falls by as many where the class that gains was far behind.
        asked = vote_threshold_event(noise_std=40.0, questions=2, **settings)
        assert asked == SelfComposedDpEvent(GaussianDpEvent(40 / (max(9, 0) - max(9 - teachers, teachers))), 2)


def test_images_of_a_patient_are_drawn_apart() -> None:
    step = capped_images_event(sample_rate=0.25, noise_multiplier=2.0, max_images_per_patient=2).event
    assert step.sensitivities == (0.0, 1.0, 2.0)
    assert step.sampling_probs == pytest.approx((0.5625, 0.375, 0.0625))
    one = capped_images_event(sample_rate=0.25, noise_multiplier=2.0, max_images_per_patient=1)
    plain = dpsgd_event(sample_rate=0.25, noise_multiplier=2.0)
    assert epsilon_bounds(one, 1e-5).pld == pytest.approx(epsilon_bounds(plain, 1e-5).pld, rel=1e-5)


@pytest.mark.parametrize(
    ("sensitivities", "chances", "said"),
    [
        ((), (), "one chance for each"),
        ((0.0, 1.0), (1.0,), "one chance for each"),
        ((1.0, 1.0), (0.5, 0.5), "no two"),
        ((0.0, -1.0), (0.5, 0.5), "below 0"),
        ((0.0, 1.0), (1.5, -0.5), "below 0"),
        ((0.0, 1.0), (0.5, 0.4), "add to 1"),
        ((0.0,), (1.0,), "releases nothing"),
        ((0.0, math.nan), (0.5, 0.5), "finite"),
        ((0.0, 1.0), (0.5, math.inf), "finite"),
        ((0.0, "1"), (0.5, 0.5), "number"),
    ],
)
def test_bad_mixtures(sensitivities: tuple, chances: tuple, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        leaves(MixtureOfGaussiansDpEvent(1.0, sensitivities, chances))


@pytest.mark.parametrize(
    ("mean", "shape"), [(0.5, 0.0), (0.99, 1.0), (0.0, math.inf), (2.0, -1.0), (math.nan, 0.0), (2.0, math.nan)]
)
def test_bad_tuning(mean: float, shape: float) -> None:
    with pytest.raises(ValueError, match="mean_runs"):
        tuning_event(GaussianDpEvent(1.0), mean_runs=mean, shape=shape)


def test_a_smooth_release_is_not_tuned() -> None:
    with pytest.raises(ValueError, match="SmoothReleaseDpEvent is no event"):
        tuning_event(smooth_release_event(beta=0.01, noise_multiplier=20.0), mean_runs=2)


@pytest.mark.parametrize("beta", NO_POSITIVE_NUMBER)
def test_bad_smooth_releases(beta: object) -> None:
    with pytest.raises(ValueError, match="beta is"):
        smooth_release_event(beta=beta, noise_multiplier=20.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="noise_multiplier is"):
        smooth_release_event(beta=0.01, noise_multiplier=beta)  # type: ignore[arg-type]


def test_tuning_of_nothing_and_without_end() -> None:
    with pytest.raises(ValueError, match="releases nothing"):
        tuning_event(composed([]), mean_runs=2)
    event: dp_event.DpEvent = GaussianDpEvent(1.0)
    for _ in range(6):
        event = RepeatAndSelectDpEvent(event, 2.0, 1.0)
    with pytest.raises(ValueError, match="RepeatAndSelectDpEvent is no event"):
        leaves(event)
    data = GAUSSIAN
    for _ in range(40):
        data = {"kind": "repeated", "count": 1, "event": data}
    with pytest.raises(ValueError, match="no event"):
        event_from_dict(data)
