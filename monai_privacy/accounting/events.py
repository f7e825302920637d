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


"""Releases as facts: which mechanism ran, how often, with which parameters. No opinion on what it cost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dp_accounting import dp_event
from dp_accounting.dp_event import DpEvent
from scipy import stats

from monai_privacy.accounting.values import checked_count, checked_noise, checked_number, checked_positive

# A tuned recipe whose runs were themselves tuned: each level costs, and more than a few are a mistake.
_DEEPEST = 4
_MOST_RELEASES = 10**18


@dataclass(frozen=True)
class SmoothReleaseDpEvent(DpEvent):
    """A number published with Gaussian noise in proportion to its β-smooth sensitivity; see :func:`smooth_release_event`."""

    beta: float
    noise_multiplier: float


def dpsgd_event(*, sample_rate: float, noise_multiplier: float, steps: int = 1) -> DpEvent:
    """The event of ``steps`` DP-SGD steps.

    Args:
        sample_rate: probability with which each unit enters a step's batch, on its own coin; above 0, at most 1.
        noise_multiplier: noise standard deviation divided by the clipping norm (σ/C).
        steps: number of steps released.

    Reference: Abadi et al. 2016, Algorithm 1; Poisson sampling as in Mironov et al. 2019, Section 3.
    """
    step = dp_event.PoissonSampledDpEvent(checked_sample_rate(sample_rate), gaussian_event(noise_multiplier))
    return dp_event.SelfComposedDpEvent(step, checked_count("steps", steps))


def truncated_dpsgd_event(
    *, num_patients: int, sample_rate: float, max_batch_size: int, noise_multiplier: float, steps: int = 1
) -> DpEvent:
    """The event of ``steps`` DP-SGD steps whose Poisson draws are cut down, at random, to a largest size.

    Args:
        num_patients: exact number of units in the larger of two neighbouring cohorts; neither more nor fewer is a bound.
        sample_rate: probability with which each unit enters a draw, before it is cut.
        max_batch_size: most units in a batch; about six standard deviations above the mean costs nothing.
        noise_multiplier: noise standard deviation divided by the clipping norm (σ/C).
        steps: number of steps released.

    Reference: Ganesh et al. 2025, arXiv:2508.15089, as in dp-accounting.
    """
    step = dp_event.TruncatedSubsampledGaussianDpEvent(
        dataset_size=checked_count("num_patients", num_patients),
        sampling_probability=checked_sample_rate(sample_rate),
        truncated_batch_size=checked_count("max_batch_size", max_batch_size),
        noise_multiplier=checked_noise("noise_multiplier", noise_multiplier),
    )
    return dp_event.SelfComposedDpEvent(step, checked_count("steps", steps))


def capped_images_event(
    *, sample_rate: float, noise_multiplier: float, max_images_per_patient: int, steps: int = 1
) -> DpEvent:
    """The event, for one patient, of ``steps`` DP-SGD steps that draw and clip single images.

    This certifies a run at image level for patients who have at most so many images in it: each of them is drawn on
    its own coin, so that a patient moves the sum of one step by a binomial number of clipping norms.

    Args:
        sample_rate: probability with which each image enters a step's batch.
        noise_multiplier: noise standard deviation divided by the clipping norm of one image.
        max_images_per_patient: a cap that was enforced before training, whoever the patient.
        steps: number of steps released.

    Reference: Ganesh 2024, arXiv:2401.10294; Charles et al. 2024, arXiv:2407.07737, Section 3 (example-level sampling).
    """
    images = checked_count("max_images_per_patient", max_images_per_patient)
    law = stats.binom(images, checked_sample_rate(sample_rate))
    step = dp_event.MixtureOfGaussiansDpEvent(
        standard_deviation=checked_noise("noise_multiplier", noise_multiplier),
        sensitivities=tuple(float(count) for count in range(images + 1)),
        sampling_probs=tuple(float(law.pmf(count)) for count in range(images + 1)),
    )
    return dp_event.SelfComposedDpEvent(step, checked_count("steps", steps))


def gaussian_event(noise_multiplier: float) -> DpEvent:
    """One release with Gaussian noise of ``noise_multiplier`` times its L2 sensitivity to one unit."""
    return dp_event.GaussianDpEvent(checked_noise("noise_multiplier", noise_multiplier))


def laplace_event(noise_multiplier: float) -> DpEvent:
    """One release with Laplace noise of scale ``noise_multiplier`` times its L1 sensitivity to one unit."""
    return dp_event.LaplaceDpEvent(checked_noise("noise_multiplier", noise_multiplier))


def gnmax_event(*, noise_std: float, answers: int = 1, teachers_per_patient: int = 1) -> DpEvent:
    """The event of ``answers`` labels by GNMax: the class with most votes after Gaussian noise on each count.

    A patient who is in t teachers moves at most t votes from one class to another: √2 t in L2.

    Args:
        noise_std: standard deviation of the noise on each count, in votes.
        answers: number of queries answered.
        teachers_per_patient: most teachers that saw one patient.

    Reference: Papernot et al. 2018, arXiv:1802.08908, Proposition 8, data-independent.
    """
    sensitivity = math.sqrt(2) * checked_count("teachers_per_patient", teachers_per_patient)
    answer = gaussian_event(checked_positive("noise_std", noise_std) / sensitivity)
    return dp_event.SelfComposedDpEvent(answer, checked_count("answers", answers))


def vote_threshold_event(*, noise_std: float, questions: int = 1, teachers_per_patient: int = 1) -> DpEvent:
    """The event of asking ``questions`` times whether the largest count, with Gaussian noise, passes a threshold.

    A patient who is in t teachers moves the largest count by at most t. Confident-GNMax asks this of every query, and
    :func:`gnmax_event` of those that passed.

    Reference: Papernot et al. 2018, arXiv:1802.08908, Algorithm 1.
    """
    sensitivity = checked_count("teachers_per_patient", teachers_per_patient)
    question = gaussian_event(checked_positive("noise_std", noise_std) / sensitivity)
    return dp_event.SelfComposedDpEvent(question, checked_count("questions", questions))


def lnmax_event(*, noise_scale: float, answers: int = 1, teachers_per_patient: int = 1) -> DpEvent:
    """The event of ``answers`` labels by LNMax: the class with most votes after Laplace noise on each count.

    A patient who is in t teachers moves at most t votes from one class to another: at most t in each of two counts, or
    the same spread over more, which costs less. (Of two counts moved by a and b, in units of the scale, δ(ε) is
    1 - (1 + min(x, a, b) / 2) / e^x with x = (a + b - ε) / 2, and 1 - 1 / e^x of one moved by a + b.)

    Reference: Papernot et al. 2017, arXiv:1610.05755, Section 2.
    """
    scale = checked_positive("noise_scale", noise_scale)
    count = laplace_event(scale / checked_count("teachers_per_patient", teachers_per_patient))
    return dp_event.SelfComposedDpEvent(count, 2 * checked_count("answers", answers))


def noisy_count_event(*, noise_std: float, answers: int = 1, teachers_per_patient: int = 1) -> DpEvent:
    """The event of publishing ``answers`` counts of the teachers that say yes, with Gaussian noise.

    A patient who is in t teachers moves a count by at most t. What is made of the count, an abstention too, is free.
    """
    return vote_threshold_event(noise_std=noise_std, questions=answers, teachers_per_patient=teachers_per_patient)


def label_votes_event(
    *, noise_std: float, num_labels: int, most_positives: int, answers: int = 1, teachers_per_patient: int = 1
) -> DpEvent:
    """The event of publishing, of ``answers`` queries, the counts of all labels with Gaussian noise on each.

    Each teacher says yes to at most ``most_positives`` labels, so that its votes have an L2 norm of at most τ, the
    square root of that. A patient who is in t teachers replaces t such vectors, none with a negative part: √2 τ t in L2,
    and never more than every label of t teachers.

    Args:
        noise_std: standard deviation of the noise on each count, in votes.
        num_labels: labels of a query.
        most_positives: τ², enforced before the votes are counted.
        answers: number of queries answered, with all their labels.
        teachers_per_patient: most teachers that saw one patient.

    Reference: τ voting of Dziedzic et al. 2022, arXiv:2211.15410, Section 4.2.
    """
    moved = min(2 * checked_count("most_positives", most_positives), checked_count("num_labels", num_labels))
    sensitivity = math.sqrt(moved) * checked_count("teachers_per_patient", teachers_per_patient)
    answer = gaussian_event(checked_positive("noise_std", noise_std) / sensitivity)
    return dp_event.SelfComposedDpEvent(answer, checked_count("answers", answers))


def smooth_release_event(*, beta: float, noise_multiplier: float) -> DpEvent:
    """The event of publishing a number with noise N(0, (smooth sensitivity · ``noise_multiplier``)²).

    The noise is as large as the data make it, so that its size is private too. Only Rényi divergences of it are known,
    those of low orders, see :func:`~monai_privacy.accounting.vote_sensitivity.smooth_release_rdp`.

    Args:
        beta: of the smooth sensitivity.
        noise_multiplier: noise standard deviation divided by the smooth sensitivity.

    Reference: Nissim et al. 2007; Papernot et al. 2018, arXiv:1802.08908, Section B.
    """
    return SmoothReleaseDpEvent(checked_positive("beta", beta), checked_noise("noise_multiplier", noise_multiplier))


def tuning_event(run: DpEvent, *, mean_runs: float, shape: float = 0.0) -> DpEvent:
    """The event of running ``run`` a random number of times and releasing the best result alone.

    The number of runs must be drawn, secretly, before the first of them; the score that selects must come from within
    each run or from other patients; and nothing of the other runs may leave, not even their scores.

    Args:
        run: the event of one whole run.
        mean_runs: mean of the number of runs; at least 1 unless its law is Poisson.
        shape: 0 logarithmic, 1 geometric, ``math.inf`` Poisson, any other number above 0 truncated negative binomial.

    Reference: Papernot & Steinke 2022, arXiv:2110.03620, Theorems 2 and 6.
    """
    return _checked_leaf(dp_event.RepeatAndSelectDpEvent(run, mean_runs, shape))


def checked_sample_rate(sample_rate: float) -> float:
    """Return ``sample_rate``, or raise ValueError unless it lies in (0, 1]."""
    rate = checked_positive("sample_rate", sample_rate)
    if rate > 1:
        raise ValueError(f"sample_rate is {rate:.3g}, above 1, but it is a probability. Lower expected_batch_size.")
    return rate


def composed(events: Iterable[DpEvent]) -> DpEvent:
    """All ``events`` on one cohort, one after another."""
    return dp_event.ComposedDpEvent(list(events))


def leaves(event: DpEvent, count: int = 1) -> dict[DpEvent, int]:
    """How often each elementary release occurs in ``event``.

    Raises:
        ValueError: for a kind of event that no accountant of this package can judge, or numbers out of range.
    """
    counts: dict[DpEvent, int] = {}
    for leaf, times in _walk(event, count, depth=0):
        counts[leaf] = counts.get(leaf, 0) + times
    return counts


def _walk(event: DpEvent, count: int, depth: int) -> Iterable[tuple[DpEvent, int]]:
    if type(event) is dp_event.ComposedDpEvent:
        for child in event.events:
            yield from _walk(child, count, depth)
    elif type(event) is dp_event.SelfComposedDpEvent:
        times = count * checked_count("count", event.count)
        if times > _MOST_RELEASES:
            raise ValueError(f"the event is repeated more than {_MOST_RELEASES:.0e} times: no accountant can judge it.")
        yield from _walk(event.event, times, depth)
    elif type(event) is not dp_event.NoOpDpEvent:
        yield _checked_leaf(event, depth), count


def _checked_leaf(event: DpEvent, depth: int = 0) -> DpEvent:
    # Types are compared exactly: a subclass may mean another mechanism.
    kind = type(event)
    if kind is dp_event.GaussianDpEvent:
        return gaussian_event(event.noise_multiplier)
    if kind is dp_event.LaplaceDpEvent:
        return laplace_event(event.noise_multiplier)
    if kind is dp_event.PoissonSampledDpEvent and type(event.event) is dp_event.GaussianDpEvent:
        return dp_event.PoissonSampledDpEvent(
            checked_sample_rate(event.sampling_probability), _checked_leaf(event.event)
        )
    if kind is dp_event.TruncatedSubsampledGaussianDpEvent:
        return truncated_dpsgd_event(
            num_patients=event.dataset_size,
            sample_rate=event.sampling_probability,
            max_batch_size=event.truncated_batch_size,
            noise_multiplier=event.noise_multiplier,
        ).event
    if kind is dp_event.MixtureOfGaussiansDpEvent:
        return _checked_mixture(event)
    if kind is SmoothReleaseDpEvent and depth == 0:  # dp-accounting, which judges tuned runs, does not know it
        return smooth_release_event(beta=event.beta, noise_multiplier=event.noise_multiplier)
    if kind is dp_event.RepeatAndSelectDpEvent and depth < _DEEPEST:
        return _checked_tuning(event, depth)
    raise ValueError(
        f"{kind.__name__} is no event that this version can account for: use those of "
        "monai_privacy.accounting.events, alone or composed."
    )


def _checked_mixture(event: DpEvent) -> DpEvent:
    sensitivities, chances = _numbers("sensitivities", event.sensitivities), _numbers("chances", event.sampling_probs)
    if not sensitivities or len(sensitivities) != len(chances) or len(set(sensitivities)) != len(sensitivities):
        raise ValueError(
            f"sensitivities are {sensitivities} with chances {chances}, but there must be one chance for each, and no two "
            "alike."
        )
    if min(*sensitivities, *chances) < 0 or not math.isclose(sum(chances), 1, abs_tol=1e-9):
        raise ValueError(
            f"sensitivities are {sensitivities} with chances {chances}: none may be below 0, chances add to 1."
        )
    if max(sensitivities) == 0:
        raise ValueError("all sensitivities are 0: a step that releases nothing would be free.")
    return dp_event.MixtureOfGaussiansDpEvent(
        checked_noise("noise_multiplier", event.standard_deviation), sensitivities, chances
    )


def _checked_tuning(event: DpEvent, depth: int) -> DpEvent:
    counts: dict[DpEvent, int] = {}
    for leaf, times in _walk(event.event, 1, depth + 1):
        counts[leaf] = counts.get(leaf, 0) + times
    if not counts:
        raise ValueError("the run that is repeated releases nothing: name its event.")
    mean, shape = checked_positive("mean_runs", event.mean), checked_number("shape", event.shape)
    if math.isnan(shape) or shape < 0 or (mean < 1 and shape < math.inf):
        raise ValueError(
            f"mean_runs is {event.mean} with shape {event.shape}: the mean must be at least 1, and the shape at least 0; "
            "only with the Poisson law (shape inf) may the mean be lower."
        )
    # With tuples, so that it can be a key; in one order, so that equal runs are equal.
    parts = tuple(dp_event.SelfComposedDpEvent(leaf, times) for leaf, times in sorted(counts.items(), key=repr))
    return dp_event.RepeatAndSelectDpEvent(dp_event.ComposedDpEvent(parts), mean, shape)


def _numbers(name: str, values: Sequence[float]) -> tuple[float, ...]:
    if not isinstance(values, (list, tuple)):
        raise ValueError(f"{name} are {values!r}, but they must be a list of numbers.")
    numbers = tuple(checked_number(name, value) for value in values)
    if not all(math.isfinite(number) for number in numbers):
        raise ValueError(f"{name} are {values!r}, but each must be a finite number.")
    return numbers
