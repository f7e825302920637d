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

"""MONAI's networks as it ships them: the clipped sum is that of plain autograd, and by which path it comes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_clipping_operations import assert_close, patient_by_patient

from benchmarks.zoo import CASES, batch, make
from monai_privacy.mechanisms.clipping import GradientClipper

EXACT = 1e-12
PATIENTS = torch.tensor([3, 1, 3])


def marked(name: str):
    return pytest.param(name, marks=[pytest.mark.slow(seconds=30)] if CASES[name].slow else [])


@pytest.mark.parametrize("name", [marked(name) for name in CASES])
def test_equals_one_patient_at_a_time(name):
    case = CASES[name]
    pytest.importorskip(case.needs)
    network = make(case)
    loss, (inputs, targets) = batch(case, len(PATIENTS))
    total, norms, bound = patient_by_patient(network, loss, (inputs, targets), PATIENTS)
    assert float(norms.min()) > 0
    clipper = GradientClipper(network, loss)
    assert_close(clipper((inputs, targets), PATIENTS, bound), total, norms, EXACT)
    if case.fault:
        # The attention's positions come before its rows: which of the two is noticed first depends on their numbers.
        by_name, by_number = f"{case.fault} is used by an operation without a rule", "a layer sees a number of rows"
        by_rows = "layer_norm of transformer.layers.3.norm2.weight sees rows"
        assert clipper.faults[0].startswith((by_name, by_number, by_rows))
        with pytest.raises(ValueError, match="one at a time"):
            GradientClipper(network, loss, method="one_pass")((inputs, targets), PATIENTS, bound)
    else:
        assert clipper.faults == ()


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.needs == "monai"])
def test_the_docs_say_which_path_it_takes(name):
    lines = (Path(__file__).parents[2] / "docs" / "clipping.md").read_text(encoding="utf-8").splitlines()
    path = f"one patient at a time: {CASES[name].fault}" if CASES[name].fault else "one pass |"
    assert any(line.startswith(f"| {name} | {path}") for line in lines)
