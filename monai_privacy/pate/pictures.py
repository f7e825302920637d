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


"""A picture of what a plan gives."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter

from monai_privacy.pate.planning import (
    INFORMATIVE,
    LEAST_EPSILON,
    MOST_EPSILON,
    PlanAdvice,
    counted,
    label_agreement,
    multiples,
    percent,
)

# Okabe and Ito's palette, which colour-blind readers can tell apart; the lines differ in their dashes as well.
_COLOURS = ("#000000", "#0072B2", "#009E73", "#E69F00", "#CC79A7")
_DASHES = ("-", (0, (6, 1.5)), (0, (3, 1.5)), (0, (6, 1.5, 1, 1.5)), (0, (1, 1.2)))
_POINTS = 80


def save_plan_figure(path: str | os.PathLike[str], found: PlanAdvice) -> Path:
    """Draw label accuracy against ε: one line for the planned number of teachers, and one for each of its multiples.

    Args:
        path: PNG file to write.
        found: the plan and the assumed agreement.

    Raises:
        ValueError: for a file that is no PNG by its name.
    """
    target = Path(path)
    if target.suffix.lower() != ".png":
        raise ValueError(f"the picture is {target.name!r}, but only PNG can be written: give a name that ends in .png.")
    plan = found.plan
    epsilons = np.geomspace(
        max(min(0.25, plan.epsilon / 4), LEAST_EPSILON), min(max(32.0, plan.epsilon * 4), MOST_EPSILON), _POINTS
    )
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    # No pyplot: its global state and window are not wanted here.
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.axhspan(0, INFORMATIVE, color="0.93", zorder=0, label="a student learns little")
    axes.axhline(1 / plan.num_classes, color="0.5", linewidth=1, label="chance")
    axes.axvline(plan.epsilon, color="0.5", linewidth=1, linestyle=":", label=f"ε = {plan.epsilon:g}")
    for number, (factor, teachers) in enumerate(multiples(plan)):
        shares = [
            label_agreement(replace(plan, num_teachers=teachers, epsilon=float(epsilon)), found.agreement)
            for epsilon in epsilons
        ]
        name = counted(teachers, "teacher") + (f" ({factor} × as many)" if factor > 1 else "")
        axes.plot(epsilons, shares, color=_COLOURS[number], linestyle=_DASHES[number], linewidth=2, label=name)
    axes.plot([plan.epsilon], [found.label_accuracy], "o", color=_COLOURS[0], markersize=8, zorder=3)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda epsilon, _: f"{epsilon:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set(
        xlabel=f"ε of all labels together, at δ = {plan.delta:g}",
        ylabel="labels as most teachers gave them",
        title=f"{plan.num_queries} queries, {plan.num_classes} classes, {percent(found.agreement)} of the teachers agree",
        xlim=(epsilons[0], epsilons[-1]),
        ylim=(max(0.0, 1 / plan.num_classes - 0.08), 1.01),
    )
    axes.grid(alpha=0.25)
    axes.legend(reverse=True, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.savefig(target, dpi=130)
    return target
