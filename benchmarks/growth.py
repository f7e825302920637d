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

"""How the cost of a private step, over a plain one, grows with the batch, the side of the images and the channels.

    python -m benchmarks.growth

Measured as in ``benchmarks.clipping``, without memory: ResNet9 on 16 images of 96², one of the three changed at a time.
Writes results/growth_<device>.json and .png.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.progress import track

from benchmarks.clipping import RESULTS, Case, machine, times
from monai_privacy.networks import ResNet9

COMPARED = ("ours", "Opacus hooks", "one patient at a time")
WIDTHS = (64, 128, 256, 512)


def case(images: int = 16, side: int = 96, share: float = 1.0) -> Case:
    """ResNet9 with a share of its channels."""
    widths = [int(n * share) for n in WIDTHS]
    return (
        partial(ResNet9, spatial_dims=2, in_channels=1, out_channels=2, widths=widths, num_groups=16),
        (1, side, side),
        images,
    )


CASES: dict[str, dict[float, Case]] = {
    "images in a batch": {n: case(images=n) for n in (1, 4, 16, 64)},
    "pixels a side": {n: case(side=n) for n in (32, 64, 96, 160, 224)},
    "first layer's channels": {64 * share: case(share=share) for share in (0.25, 0.5, 1, 2)},
}

Numbers = list[float | None]
Ratios = dict[str, dict[str, Numbers]]


def measured(repeats: int, device: str, amp: bool) -> Ratios:
    """For each axis, its values and each contender's ratios to plain training; None where it could not run."""
    found: Ratios = {}
    for axis, cases in CASES.items():
        values: Numbers = list(cases)
        found[axis] = {"values": values} | {contender: [] for contender in COMPARED}
        for one in track(cases.values(), description=axis):
            for contender, timing in times(one, COMPARED, repeats, device, amp).items():
                found[axis][contender].append(None if isinstance(timing, str) else timing.ratio)
    return found


def drawn(ratios: Ratios) -> Figure:
    """One panel an axis, its values on a logarithmic scale."""
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    panels = figure.subplots(1, len(ratios), sharey=True)
    for panel, (axis, found) in zip(panels, ratios.items(), strict=True):
        for contender in COMPARED:
            panel.plot(found["values"], [value or float("nan") for value in found[contender]], "o-", label=contender)
        panel.axhline(1.0, color="black", linewidth=0.8)
        panel.set_xscale("log", base=2)
        panel.set_xticks(found["values"], [f"{value:g}" for value in found["values"] if value is not None])
        panel.set_xlabel(axis)
        panel.set_yscale("log", base=2)
        panel.yaxis.set_major_formatter("{x:g}")
    panels[0].set_ylabel("time of a step / plain training")
    panels[0].legend(frameon=False)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--amp", action="store_true", help="bf16 autocast")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, help="without its ending")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    output = options.output or RESULTS / f"growth_{options.device}{'_bf16' if options.amp else ''}"
    ratios = measured(options.repeats, options.device, options.amp)
    output.parent.mkdir(exist_ok=True)
    results = {"machine": machine(options.device, options.threads), "ratios": ratios}
    output.with_suffix(".json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    drawn(ratios).savefig(output.with_suffix(".png"), dpi=100)


if __name__ == "__main__":
    main()
