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

"""What answers by vote cost for the votes that were really cast: data-dependent bounds, which are themselves private."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import log_ndtr, logsumexp

from monai_privacy.accounting.values import checked_positive

__all__ = [
    "checked_votes",
    "gnmax_log_q",
    "gnmax_rdp",
    "lnmax_log_q",
    "lnmax_rdp",
    "threshold_log_probability",
    "threshold_rdp",
]

_Array = NDArray[np.float64]


def checked_votes(votes: ArrayLike, num_teachers: int | None = None) -> NDArray[np.int64]:
    """Vote histograms as integers, shape (queries, classes).

    Args:
        votes: counts, one row a query.
        num_teachers: number that voted on each query, where it has to be so; None where it need not.

    Raises:
        ValueError: for counts that are no whole numbers of at least 0, fewer than two classes, or rows that do not add
            up.
    """
    counts = np.asarray(votes)
    if counts.ndim != 2 or counts.shape[1] < 2:
        raise ValueError(f"votes have shape {counts.shape}, but they must be (queries, classes), two classes or more.")
    if counts.dtype.kind not in "iuf" or not np.all(np.isfinite(counts)) or np.any(counts != np.floor(counts)):
        raise ValueError("votes hold values that are no whole numbers: give counts, not shares or scores.")
    if np.any(counts < 0) or np.any(counts > 2**31):
        raise ValueError("votes hold counts below 0 or above 2e9: a histogram of teachers has none.")
    if num_teachers is not None and np.any(counts.sum(axis=1) != num_teachers):
        row = int(np.argmax(counts.sum(axis=1) != num_teachers))
        raise ValueError(
            f"votes of query {row} add up to {int(counts[row].sum())}, but {num_teachers} teachers vote: each votes once on "
            "every query. Count again."
        )
    return counts.astype(np.int64)


def gnmax_log_q(votes: ArrayLike, noise_std: float) -> _Array:
    """Upper bounds on log Pr[GNMax gives another class than the one with most votes], shape (queries,).

    Args:
        votes: counts, shape (queries, classes).
        noise_std: standard deviation of the noise on each count, in votes.

    Reference: Papernot et al. 2018, arXiv:1802.08908, Proposition 7.
    """
    return _union(_gaps(votes) / checked_positive("noise_std", noise_std), lambda gap: log_ndtr(-gap / math.sqrt(2)))


def lnmax_log_q(votes: ArrayLike, noise_scale: float) -> _Array:
    """The same for LNMax, whose noise is Laplace of scale ``noise_scale``, in votes.

    Reference: Papernot et al. 2017, arXiv:1610.05755, Lemma 4.
    """
    return _union(_gaps(votes) / checked_positive("noise_scale", noise_scale), lambda gap: np.log((2 + gap) / 4) - gap)


def threshold_log_probability(largest: ArrayLike, threshold: float, noise_std: float) -> _Array:
    """log Pr[``largest`` + N(0, ``noise_std``²) reaches ``threshold``], shape (queries,).

    Args:
        largest: the largest count of each query; of Interactive-GNMax the largest excess over the student's, rounded.
        threshold: in votes.
        noise_std: in votes.
    """
    distance = np.asarray(largest, dtype=np.float64) - threshold
    return np.asarray(log_ndtr(distance / checked_positive("noise_std", noise_std)))


def gnmax_rdp(log_q: ArrayLike, noise_std: float, orders: ArrayLike) -> _Array:
    """Upper bounds on the Rényi divergence of one GNMax answer at these very votes, shape (queries, orders).

    Never above the data-independent α/σ². It depends on the votes: keep it as secret as they are.

    Args:
        log_q: as of :func:`gnmax_log_q`, shape (queries,).
        noise_std: standard deviation of the noise on each count, in votes.
        orders: above 1.

    Reference: Papernot et al. 2018, arXiv:1802.08908, Theorem 6, with μ₁ and μ₂ of Proposition 10.
    """
    alpha, variance = _checked_orders(orders), checked_positive("noise_std", noise_std) ** 2
    logs = np.atleast_1d(np.asarray(log_q, dtype=np.float64))[:, None]
    if np.any(logs > 0) or np.any(np.isnan(logs)):
        raise ValueError("log_q is above 0, but it is the logarithm of a probability.")
    independent = np.broadcast_to(alpha / variance, (len(logs), alpha.shape[1]))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        higher = np.sqrt(-logs * variance)
        applies = rdp_formula_applies(logs, higher, variance) & (higher + 1 > alpha)
        found = np.minimum(independent, rdp_formula(logs, higher, variance, alpha))
    return np.where(np.isneginf(logs), 0.0, np.where(applies, np.maximum(found, 0.0), independent))


def rdp_formula_applies(logs: _Array, higher: _Array, variance: float) -> NDArray[np.bool_]:
    """Whether Theorem 6 may be used at log q, at orders up to μ₁ = ``higher`` + 1."""
    limit = (higher - 1) * higher / variance - higher * (np.log1p(1 / higher) + np.log1p(1 / (higher - 1)))
    return (higher > 1) & (-logs > higher / variance) & (logs <= limit)


def rdp_formula(logs: _Array, higher: _Array, variance: float, alpha: _Array) -> _Array:
    """The formula of Theorem 6, wherever it is valid."""
    log_not_q = _log_one_minus(logs)
    a = (alpha - 1) * (log_not_q - _log_one_minus((logs + higher / variance) * (1 - 1 / higher)))
    b = (alpha - 1) * ((higher + 1) / variance - logs / higher)
    return np.asarray(np.logaddexp(log_not_q + a, logs + b) / (alpha - 1))


def threshold_rdp(log_probability: ArrayLike, noise_std: float, orders: ArrayLike) -> _Array:
    """The same for one noisy comparison of the largest count with a threshold, shape (queries, orders).

    Args:
        log_probability: as of :func:`threshold_log_probability`.
        noise_std: standard deviation of the noise on the count, in votes.
        orders: above 1.

    Reference: Papernot et al. 2018, arXiv:1802.08908, Theorem 6 and Appendix A; one vote moves the count by 1.
    """
    logs = np.asarray(log_probability, dtype=np.float64)
    rarer = np.minimum(logs, _log_one_minus(logs))
    return gnmax_rdp(rarer, math.sqrt(2) * checked_positive("noise_std", noise_std), orders)


def lnmax_rdp(log_q: ArrayLike, noise_scale: float, orders: ArrayLike) -> _Array:
    """The same for one LNMax answer, shape (queries, orders). The moments of the paper are (α - 1) times these.

    Reference: Papernot et al. 2017, arXiv:1610.05755, Theorems 2 and 3, the latter only where q ≤ 1 / (1 + e^{2/b}):
    the published script uses it up to ½ and states too little.
    """
    alpha, pure = _checked_orders(orders), 2 / checked_positive("noise_scale", noise_scale)
    logs = np.atleast_1d(np.asarray(log_q, dtype=np.float64))[:, None]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        rare = _log_one_minus(logs)
        common = rare + (rare - _log_one_minus(pure + logs)) * (alpha - 1)
        dependent = np.logaddexp(common, logs + pure * (alpha - 1)) / (alpha - 1)
    dependent = np.where(logs <= -np.logaddexp(0, pure), dependent, np.inf)
    return np.minimum(np.minimum(pure**2 * alpha / 2, pure), dependent)


def _gaps(votes: ArrayLike) -> _Array:
    """Votes by which each class lies behind the first of those with most; inf for that one."""
    counts = checked_votes(votes)
    gaps = (counts.max(axis=1, keepdims=True) - counts).astype(np.float64)
    gaps[np.arange(len(gaps)), counts.argmax(axis=1)] = np.inf
    return gaps


def _union(gaps: _Array, log_chance: Callable[[_Array], _Array]) -> _Array:
    with np.errstate(invalid="ignore"):
        logs = np.where(np.isinf(gaps), -np.inf, log_chance(gaps))
    return np.asarray(np.minimum(logsumexp(logs, axis=1), math.log1p(-1 / gaps.shape[1])))


def _log_one_minus(logs: _Array) -> _Array:
    """log(1 - exp(x)) for x ≤ 0."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return np.where(logs < -1, np.log1p(-np.exp(logs)), np.log(-np.expm1(logs)))


def _checked_orders(orders: ArrayLike) -> _Array:
    alpha = np.atleast_1d(np.asarray(orders, dtype=np.float64))[None, :]
    if not np.all(np.isfinite(alpha)) or np.any(alpha <= 1):
        raise ValueError(f"orders are {orders!r}, but each must be a finite number above 1.")
    return alpha
