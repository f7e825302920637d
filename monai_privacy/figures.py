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

"""Pictures of a run."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sklearn.metrics import roc_auc_score, roc_curve

# Okabe and Ito's palette, which colour-blind readers can tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")


def save_training_figure(
    path: str | os.PathLike[str],
    *,
    scores: Mapping[str, tuple[Sequence[int], Sequence[float]]],
    epsilon_by_epoch: Sequence[float],
    delta: float,
    title: str,
) -> Path:
    """Draw the ROC curves of several networks beside ε after each epoch of the private one.

    Args:
        path: PNG file to write.
        scores: for each network, by name, the test labels (0 or 1) and the scores given to label 1.
        epsilon_by_epoch: ε at ``delta`` after each epoch, the first epoch first.
        delta: the δ of those.
        title: what the picture is of; says "synthetic" where the images are.
    """
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    # No pyplot: its global state and window are not wanted in a training process.
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    figure.suptitle(title)
    for colour, (name, (labels, values)) in zip(_COLOURS, scores.items(), strict=False):
        false_positive, true_positive, _ = roc_curve(labels, values)
        left.plot(false_positive, true_positive, color=colour, label=f"{name}, AUC {roc_auc_score(labels, values):.3f}")
    left.plot([0, 1], [0, 1], color="0.7", linestyle=":", label="chance")
    left.set(xlabel="false-positive rate", ylabel="true-positive rate", title="test patients", aspect="equal")
    left.legend(loc="lower right", frameon=False)
    epochs = np.arange(len(epsilon_by_epoch) + 1)
    right.plot(epochs, [0.0, *epsilon_by_epoch], color=_COLOURS[1], marker=".")
    right.set(xlabel="epoch", ylabel=f"ε at δ = {delta:g}", title="privacy spent", xlim=(0, None), ylim=(0, None))
    right.xaxis.get_major_locator().set_params(integer=True)
    right.grid(alpha=0.3)
    target = Path(path)
    figure.savefig(target, dpi=130)
    return target
