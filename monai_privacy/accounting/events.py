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

from collections.abc import Iterable, Mapping
from typing import Any

from dp_accounting import dp_event
from dp_accounting.dp_event import DpEvent

from monai_privacy.accounting.values import checked_count, checked_positive


def dpsgd_event(*, sample_rate: float, noise_multiplier: float, steps: int = 1) -> DpEvent:
    """The event of ``steps`` DP-SGD steps.

    Args:
        sample_rate: probability with which each unit enters a step's batch, on its own coin; above 0, at most 1.
        noise_multiplier: noise standard deviation divided by the clipping norm (σ/C).
        steps: number of steps released.

    Reference: Abadi et al. 2016, Algorithm 1; Poisson sampling as in Mironov et al. 2019, Section 3.
    """
    sample_rate = checked_sample_rate(sample_rate)
    step = dp_event.PoissonSampledDpEvent(
        sample_rate, dp_event.GaussianDpEvent(checked_positive("noise_multiplier", noise_multiplier))
    )
    return dp_event.SelfComposedDpEvent(step, checked_count("steps", steps))


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
    for leaf, times in _walk(event, count):
        counts[leaf] = counts.get(leaf, 0) + times
    return counts


def _walk(event: DpEvent, count: int) -> Iterable[tuple[DpEvent, int]]:
    if type(event) is dp_event.ComposedDpEvent:
        for child in event.events:
            yield from _walk(child, count)
    elif type(event) is dp_event.SelfComposedDpEvent:
        yield from _walk(event.event, count * checked_count("count", event.count))
    elif type(event) is not dp_event.NoOpDpEvent:
        yield _checked_leaf(event), count


def _checked_leaf(event: DpEvent) -> DpEvent:
    # Types are compared exactly: a subclass may mean another mechanism.
    if type(event) is dp_event.GaussianDpEvent:
        return dp_event.GaussianDpEvent(checked_positive("noise_multiplier", event.noise_multiplier))
    if type(event) is dp_event.PoissonSampledDpEvent and type(event.event) is dp_event.GaussianDpEvent:
        return dp_event.PoissonSampledDpEvent(
            checked_sample_rate(event.sampling_probability), _checked_leaf(event.event)
        )
    raise ValueError(
        f"{type(event).__name__} is no event that this version can account for: use a Gaussian release or "
        "dpsgd_event, alone or composed."
    )


# An allow-list: loading a ledger must never import or construct what a file names.
def event_to_dict(event: DpEvent) -> dict[str, Any]:
    """``event`` as plain JSON; raises ValueError for a kind that is not on the allow-list, or numbers out of range."""
    if type(event) is dp_event.SelfComposedDpEvent:
        return {
            "kind": "repeated",
            "count": checked_count("count", event.count),
            "event": event_to_dict(event.event),
        }
    if type(event) is dp_event.ComposedDpEvent and event.events:
        return {"kind": "composed", "events": [event_to_dict(child) for child in event.events]}
    leaf = _checked_leaf(event)
    if isinstance(leaf, dp_event.GaussianDpEvent):
        return {"kind": "gaussian", "noise_multiplier": leaf.noise_multiplier}
    return {
        "kind": "poisson_sampled",
        "sample_rate": leaf.sampling_probability,
        "event": event_to_dict(leaf.event),
    }


def event_from_dict(data: Mapping[str, Any]) -> DpEvent:
    """The event that ``event_to_dict`` wrote; raises ValueError for anything else, non-finite numbers included."""
    try:
        kind = data["kind"]
        if kind == "gaussian":
            return dp_event.GaussianDpEvent(checked_positive("noise_multiplier", data["noise_multiplier"]))
        if kind == "poisson_sampled":
            return _checked_leaf(dp_event.PoissonSampledDpEvent(data["sample_rate"], event_from_dict(data["event"])))
        if kind == "repeated":
            return dp_event.SelfComposedDpEvent(event_from_dict(data["event"]), checked_count("count", data["count"]))
        # Never empty: a step that releases nothing would be free.
        if kind == "composed" and isinstance(data["events"], list) and data["events"]:
            return composed(event_from_dict(child) for child in data["events"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{data!r} is no event of this package ({error!r}): the record is damaged.") from error
    raise ValueError(f"{data!r} is no event that this version knows: update monai-privacy to read it.")
