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

"""How exact norms and clipped sum are for each of MONAI's networks, and the path that clipping takes.

    python -m benchmarks.exactness

Writes results/exactness.json and prints the table. Three images of two patients, synthetic; the networks as MONAI ships
them, batch norm converted, nothing drawn at random. The larger of two relative errors: of the clipped sum, and of any
patient's norm. In float64 against the definition (each patient alone, plain autograd), in float32 against float64 on the
same batch; beside it, what plain autograd in float32 makes of the definition, since some networks are that sensitive to
rounding (a ReLU that flips, a group norm over few values).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

from benchmarks.clipping import RESULTS, machine
from benchmarks.zoo import CASES, Case, batch, make
from monai_privacy.mechanisms import GradientClipper

PATIENTS = torch.tensor([3, 1, 3])


def by_definition(
    network: nn.Module, loss: nn.Module, data: tuple[Tensor, Tensor], bound: float | None = None
) -> tuple[Tensor, Tensor, float]:
    """Clipped sum, norms, and the bound, which is their mean where none is given."""
    gradients = []
    for patient in PATIENTS.unique():
        rows = patient == PATIENTS
        outputs, targets = network(data[0][rows]), data[1][rows]
        total = torch.stack([loss(outputs[i : i + 1], targets[i : i + 1]) for i in range(len(targets))]).sum()
        found = torch.autograd.grad(total, list(network.parameters()), materialize_grads=True)
        gradients.append(torch.cat([gradient.reshape(-1) for gradient in found]))
    each = torch.stack(gradients).double()
    norms = each.norm(dim=1)
    bound = float(norms.mean()) if bound is None else bound
    return (bound / norms).clamp(max=1.0) @ each, norms, bound


def measured(case: Case) -> dict[str, Any]:
    """Errors and path of a network."""
    network = make(case)
    loss, data = batch(case, len(PATIENTS))
    total, norms, bound = by_definition(network, loss, data)
    clipper = GradientClipper(network, loss)
    wide = _flat(clipper, data, bound)
    narrow_data = (data[0].float(), data[1].float() if data[1].is_floating_point() else data[1])
    narrow = _flat(GradientClipper(network.float(), loss), narrow_data, bound)
    plain = by_definition(network, loss, narrow_data, bound)
    return {
        "float64": _error(wide, (total, norms)),
        "float32": _error(narrow, wide),
        "autograd_in_float32": _error((plain[0], plain[1]), wide),
        "one_at_a_time": clipper.faults[0] if clipper.faults else "",
    }


def _flat(clipper: GradientClipper, data: tuple[Tensor, Tensor], bound: float) -> tuple[Tensor, Tensor]:
    found = clipper(data, PATIENTS, bound)
    return torch.cat([gradient.reshape(-1) for gradient in found.gradients]).double(), found.norms


def _error(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> float:
    total = float((found[0] - expected[0]).norm() / expected[0].norm())
    return max(total, float(((found[1] - expected[1]) / expected[1]).abs().max()))


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| network | path | error in float64 | in float32 | autograd's in float32 |", "|---|---|---|---|---|"]
    for name, row in results.items():
        path = f"one patient at a time: {row['one_at_a_time']}" if row["one_at_a_time"] else "one pass"
        errors = " | ".join(f"{row[key]:.0e}" for key in ("float64", "float32", "autograd_in_float32"))
        lines.append(f"| {name} | {path} | {errors} |")
    return "\n".join(lines)


def main() -> None:
    """Run it."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    found = {
        name: measured(case)
        for name, case in track(CASES.items(), description="networks")
        if importlib.util.find_spec(case.needs)
    }
    results = {"machine": machine("cpu", 1), "networks": found}
    (RESULTS / "exactness.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    main()
