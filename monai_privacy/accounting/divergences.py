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


"""What one elementary release costs, as Rényi divergences and as a privacy loss distribution; both are kept."""

from __future__ import annotations

import logging
import math
from functools import lru_cache

import numpy as np
from dp_accounting import dp_event, rdp
from dp_accounting.dp_event import DpEvent
from dp_accounting.pld import privacy_loss_distribution as pld_lib
from numpy.typing import NDArray

from monai_privacy.accounting.events import SmoothReleaseDpEvent, leaves
from monai_privacy.accounting.vote_sensitivity import smooth_release_limit, smooth_release_rdp

# dp-accounting warns through absl for each RDP order that does not converge; leaving one out only loosens the bound.
logging.getLogger("absl").setLevel(logging.ERROR)

ORDERS = tuple(float(order) for order in rdp.RdpAccountant().orders)
_MOST_POINTS = 16_000
_WITHOUT_DISTRIBUTION = (dp_event.RepeatAndSelectDpEvent, SmoothReleaseDpEvent)
_WITHOUT_DIVERGENCE = (dp_event.MixtureOfGaussiansDpEvent, dp_event.TruncatedSubsampledGaussianDpEvent)


def has_distribution(leaf: DpEvent) -> bool:
    """Whether a privacy loss distribution of this release is known."""
    return not isinstance(leaf, _WITHOUT_DISTRIBUTION)


def has_tight_divergence(leaf: DpEvent) -> bool:
    """Whether the Rényi divergences of this release are known, and not only those without amplification."""
    if isinstance(leaf, dp_event.RepeatAndSelectDpEvent):
        return all(has_tight_divergence(inner) for inner in leaves(leaf.event))
    return not isinstance(leaf, _WITHOUT_DIVERGENCE)


def renyi_divergences(leaf: DpEvent) -> NDArray[np.float64]:
    """Upper bounds on the Rényi divergences of one release, at :data:`ORDERS`; inf where none is known."""
    return _renyi_divergences(_with_divergences(leaf))


# The curve takes most of the time, and every number of steps and every δ asks for the same one.
@lru_cache(maxsize=256)
def _renyi_divergences(leaf: DpEvent) -> NDArray[np.float64]:
    if isinstance(leaf, SmoothReleaseDpEvent):
        finite = [order for order in ORDERS if leaf.beta < smooth_release_limit(order)]
        known = [smooth_release_rdp(order, leaf.beta, leaf.noise_multiplier) for order in finite]
        return np.array(known + [np.inf] * (len(ORDERS) - len(known)))
    accountant = rdp.RdpAccountant(ORDERS)
    with np.errstate(over="ignore", divide="ignore"):  # an infinite divergence is an answer
        accountant.compose(leaf)
    curve = accountant.rdp
    # Divergences of about 1e-20 drown in rounding, and dp-accounting takes a negative one for no cost at all.
    return np.where(curve > 0, curve, np.inf)


def _with_divergences(leaf: DpEvent) -> DpEvent:
    """The release itself, or one that bounds it, of which dp-accounting knows the divergences."""
    return leaf if has_tight_divergence(leaf) else without_amplification(leaf)


def without_amplification(leaf: DpEvent) -> DpEvent:
    """The release where an adversary knows who was drawn: its outputs are mixtures of this one's.

    Divergences are jointly quasi-convex, so that those of this event bound those of ``leaf``. A release that draws
    nobody at random is returned as it is.
    """
    if isinstance(leaf, dp_event.PoissonSampledDpEvent):
        return leaf.event
    if isinstance(leaf, dp_event.MixtureOfGaussiansDpEvent):
        return dp_event.GaussianDpEvent(leaf.standard_deviation / max(leaf.sensitivities))
    if isinstance(leaf, dp_event.TruncatedSubsampledGaussianDpEvent):
        # The unit may take the place of another one in the batch.
        return dp_event.GaussianDpEvent(leaf.noise_multiplier / 2)
    if isinstance(leaf, dp_event.RepeatAndSelectDpEvent):
        parts = [dp_event.SelfComposedDpEvent(without_amplification(x), n) for x, n in leaves(leaf.event).items()]
        inner = dp_event.ComposedDpEvent(parts)
        ((plain, _),) = leaves(dp_event.RepeatAndSelectDpEvent(inner, leaf.mean, leaf.shape)).items()
        return plain
    return leaf


def finest_interval(leaf: DpEvent) -> float:
    """The finest discretisation that takes seconds and no minutes; 0 where any does.

    dp-accounting inverts the privacy loss of mixtures point by point, in Python.
    """
    if isinstance(leaf, dp_event.MixtureOfGaussiansDpEvent):
        reach = max(leaf.sensitivities) / leaf.standard_deviation
    elif isinstance(leaf, dp_event.TruncatedSubsampledGaussianDpEvent):
        reach = 2 / leaf.noise_multiplier
    else:
        return 0.0
    # Of the losses that occur, about.
    return (reach**2 / 2 + 6 * reach) / _MOST_POINTS


# The single-step distribution takes most of the time, and every epoch of a run asks for the same one.
@lru_cache(maxsize=64)
def privacy_loss_distribution(leaf: DpEvent, interval: float) -> pld_lib.PrivacyLossDistribution:
    """The privacy loss of one release, discretised pessimistically at ``interval``."""
    grid = {"value_discretization_interval": interval}
    if isinstance(leaf, dp_event.LaplaceDpEvent):
        return pld_lib.from_laplace_mechanism(parameter=leaf.noise_multiplier, **grid)
    if isinstance(leaf, dp_event.MixtureOfGaussiansDpEvent):
        return pld_lib.from_mixture_gaussian_mechanism(
            leaf.standard_deviation, leaf.sensitivities, leaf.sampling_probs, **grid
        )
    if isinstance(leaf, dp_event.TruncatedSubsampledGaussianDpEvent):
        return pld_lib.from_truncated_subsampled_gaussian_mechanism(
            dataset_size=leaf.dataset_size,
            sampling_probability=leaf.sampling_probability,
            truncated_batch_size=leaf.truncated_batch_size,
            noise_multiplier=leaf.noise_multiplier,
            **grid,
        )
    sampled = isinstance(leaf, dp_event.PoissonSampledDpEvent)
    return pld_lib.from_gaussian_mechanism(
        standard_deviation=leaf.event.noise_multiplier if sampled else leaf.noise_multiplier,
        sampling_prob=leaf.sampling_probability if sampled else 1.0,
        **grid,
    )


def combined(leaf: DpEvent, count: int) -> tuple[DpEvent, int]:
    """The same release said in fewer: composed Gaussians are one Gaussian, exact, and fast."""
    if isinstance(leaf, dp_event.GaussianDpEvent):
        return dp_event.GaussianDpEvent(leaf.noise_multiplier / math.sqrt(count)), 1
    return leaf, count
