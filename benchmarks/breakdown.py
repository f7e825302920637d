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

"""Where the time of a private step goes that a plain one does not take.

    python -m benchmarks.breakdown --networks "DenseNet121 3D 64³"

Prints medians in milliseconds, plain and private steps in turns, on the CPU: the plain step; what the private one takes
beyond it, by part; and the same on images of 32 pixels a side, on which hardly anything is left but the calls of operations
themselves.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from benchmarks.clipping import NETWORKS, Case, batch
from benchmarks.contenders import CONTENDERS
from monai_privacy.mechanisms import GradientClipper, SystemNoise
from monai_privacy.mechanisms.clipping import one_pass
from monai_privacy.mechanisms.clipping.convolution import ConvolutionRule


class Seconds:
    """Seconds of each part, a list a part."""

    def __init__(self) -> None:
        self.parts: dict[str, list[float]] = {}

    def add(self, part: str, call: Callable[[], Any]) -> Any:
        """Call, and count the time for the part."""
        start = time.perf_counter()
        found = call()
        self.parts.setdefault(part, []).append(time.perf_counter() - start)
        return found

    def milliseconds(self, part: str) -> float:
        """Median over the steps."""
        return 1000 * statistics.median(self.parts.get(part, [0.0]))


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """While this lasts, ``owner.name`` is another."""
    kept = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, kept)


def steps(case: Case, repeats: int, shape: tuple[int, ...] | None = None) -> dict[str, float]:
    """Milliseconds of a plain step, of a clipped sum, of its forming from what was kept, and of noise."""
    make, own_shape, rows = case
    torch.manual_seed(0)
    network = make().train()
    images, labels = batch(shape or own_shape, rows, "cpu")
    plain = CONTENDERS["plain"](network, images, labels, False)
    clipper, noise, patients = GradientClipper(network, nn.CrossEntropyLoss()), SystemNoise(), torch.arange(rows)
    for _ in range(2):  # methods are chosen
        clipper((images, labels), patients, 1.0)
    seconds, summed = Seconds(), one_pass.summed
    with replaced(one_pass, "summed", lambda *a: seconds.add("summed", lambda: summed(*a))):
        for _ in range(repeats):
            seconds.add("plain", plain)
            total = seconds.add("clipped", lambda: clipper((images, labels), patients, 1.0))
            seconds.add("noise", partial(noise.add_gaussian, total.gradients, 1.0))
    return {part: seconds.milliseconds(part) for part in ("plain", "clipped", "summed", "noise")} | {
        "weights": _weights(clipper, (images, labels), patients)
    }


def _weights(clipper: GradientClipper, rows: tuple[Tensor, Tensor], patients: Tensor) -> float:
    """Milliseconds that gradients of convolution weights by patient take beyond those of the batch."""
    backward: Any = ConvolutionRule.backward
    extra = [0.0]

    def timed(self: ConvolutionRule, x: Tensor, weight: Any, bias: Any, e: Any, gradient: Tensor, *others: Any) -> Any:
        *rest, choose = others

        def both(*arguments: Any) -> Any:
            seconds = Seconds()
            material = seconds.add("ours", lambda: choose(*arguments))
            seconds.add("plain", lambda: self._weight_gradient(x, gradient, weight))
            extra[0] += seconds.milliseconds("ours") - seconds.milliseconds("plain")
            return material

        return backward(self, x, weight, bias, e, gradient, *rest, both)

    with replaced(ConvolutionRule, "backward", timed):
        clipper(rows, patients, 1.0)
    return extra[0]


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS)[:5], choices=list(NETWORKS), metavar="NAME")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console = Console()
    console.print("| | plain step | weights by patient | sum from what was kept | the rest | noise | the rest at 32 |")
    console.print("|---|---|---|---|---|---|---|")
    for name in options.networks:
        found = steps(NETWORKS[name], options.repeats)
        shape = NETWORKS[name][1]
        small = steps(NETWORKS[name], options.repeats, (shape[0], *(32 for _ in shape[1:])))
        cells = [found["plain"], found["weights"], found["summed"], _rest(found), found["noise"], _rest(small)]
        console.print(
            f"| {name} | " + " | ".join(f"{cell:.0f}" for cell in cells) + " |", soft_wrap=True, highlight=False
        )


def _rest(found: dict[str, float]) -> float:
    return found["clipped"] - found["plain"] - found["weights"] - found["summed"]


if __name__ == "__main__":
    main()
