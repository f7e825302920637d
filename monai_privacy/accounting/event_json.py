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


"""Events as typed JSON, from an allow-list: loading a ledger never imports or constructs what a file names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dp_accounting import dp_event
from dp_accounting.dp_event import DpEvent

from monai_privacy.accounting.events import SmoothReleaseDpEvent, composed, leaves
from monai_privacy.accounting.values import checked_count

# Kinds nest a few levels: a step, its repetition, a run that was tuned.
_DEEPEST = 16


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
    if type(event) in (dp_event.ComposedDpEvent, dp_event.NoOpDpEvent):
        raise ValueError(f"{event} is no event that this version can account for: it releases nothing.")
    ((leaf, _),) = leaves(event).items()
    return _leaf_to_dict(leaf)


def _leaf_to_dict(leaf: DpEvent) -> dict[str, Any]:
    if isinstance(leaf, dp_event.GaussianDpEvent):
        return {"kind": "gaussian", "noise_multiplier": leaf.noise_multiplier}
    if isinstance(leaf, dp_event.LaplaceDpEvent):
        return {"kind": "laplace", "noise_multiplier": leaf.noise_multiplier}
    if isinstance(leaf, dp_event.PoissonSampledDpEvent):
        return {
            "kind": "poisson_sampled",
            "sample_rate": leaf.sampling_probability,
            "event": _leaf_to_dict(leaf.event),
        }
    if isinstance(leaf, dp_event.TruncatedSubsampledGaussianDpEvent):
        return {
            "kind": "truncated_poisson",
            "num_patients": leaf.dataset_size,
            "sample_rate": leaf.sampling_probability,
            "max_batch_size": leaf.truncated_batch_size,
            "noise_multiplier": leaf.noise_multiplier,
        }
    if isinstance(leaf, dp_event.MixtureOfGaussiansDpEvent):
        return {
            "kind": "mixture_of_gaussians",
            "noise_multiplier": leaf.standard_deviation,
            "sensitivities": list(leaf.sensitivities),
            "chances": list(leaf.sampling_probs),
        }
    if isinstance(leaf, SmoothReleaseDpEvent):
        return {"kind": "smooth_release", "beta": leaf.beta, "noise_multiplier": leaf.noise_multiplier}
    if isinstance(leaf, dp_event.RepeatAndSelectDpEvent):
        shape = "poisson" if math.isinf(leaf.shape) else leaf.shape
        return {"kind": "tuned", "mean_runs": leaf.mean, "shape": shape, "event": event_to_dict(leaf.event)}
    raise AssertionError(f"{leaf} has passed as a leaf and has no JSON form")


def event_from_dict(data: Mapping[str, Any]) -> DpEvent:
    """The event that ``event_to_dict`` wrote; raises ValueError for anything else, non-finite numbers included."""
    try:
        event = _read(data, _DEEPEST)
        leaves(event)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{data!r} is no event of this package ({error!r}): the record is damaged.") from error
    return event


def _read(data: Mapping[str, Any], levels: int) -> DpEvent:
    kind = data["kind"]
    if levels and kind == "repeated":
        return dp_event.SelfComposedDpEvent(_read(data["event"], levels - 1), checked_count("count", data["count"]))
    # Never empty: a step that releases nothing would be free.
    if levels and kind == "composed" and isinstance(data["events"], list) and data["events"]:
        return composed(_read(child, levels - 1) for child in data["events"])
    if kind in _LEAVES and levels:
        ((leaf, _),) = leaves(_LEAVES[kind](data, levels - 1)).items()
        return leaf
    raise ValueError(f"{data!r} is no event that this version knows: update monai-privacy to read it.")


def _read_tuned(data: Mapping[str, Any], levels: int) -> DpEvent:
    shape = math.inf if data["shape"] == "poisson" else data["shape"]
    if shape is not math.inf and isinstance(shape, float) and not math.isfinite(shape):
        raise ValueError(f"{data!r} is no event of this package: the record is damaged.")
    return dp_event.RepeatAndSelectDpEvent(_read(data["event"], levels), data["mean_runs"], shape)


_LEAVES = {
    "gaussian": lambda data, _: dp_event.GaussianDpEvent(data["noise_multiplier"]),
    "laplace": lambda data, _: dp_event.LaplaceDpEvent(data["noise_multiplier"]),
    "poisson_sampled": lambda data, levels: dp_event.PoissonSampledDpEvent(
        data["sample_rate"], _read(data["event"], levels)
    ),
    "truncated_poisson": lambda data, _: dp_event.TruncatedSubsampledGaussianDpEvent(
        data["num_patients"], data["sample_rate"], data["max_batch_size"], data["noise_multiplier"]
    ),
    "mixture_of_gaussians": lambda data, _: dp_event.MixtureOfGaussiansDpEvent(
        data["noise_multiplier"], data["sensitivities"], data["chances"]
    ),
    "smooth_release": lambda data, _: SmoothReleaseDpEvent(data["beta"], data["noise_multiplier"]),
    "tuned": _read_tuned,
}
