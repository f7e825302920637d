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

"""Parameters in a network's own arithmetic: those that stand for each row alike are heard, all others noticed."""

from __future__ import annotations

import pytest
import torch
from test_clipping_operations import EXACT, assert_close, assert_exact, patient_by_patient
from torch import nn

from monai_privacy.mechanisms.clipping import GradientClipper

PATIENTS = torch.tensor([7, 1, 7, 0, 1, 2])
LOSS = nn.CrossEntropyLoss()


def in_place(x, p):
    x = x.clone()
    seen = x
    x += p
    return x + seen


def out(x, p):
    return torch.add(x, p, out=torch.empty(0))


HEARD = {
    "x + p": ((1, 3, 4), lambda x, p: x + p),
    "p + x": ((1, 3, 4), lambda x, p: p + x),
    "x.add(p)": ((1, 3, 4), lambda x, p: x.add(p)),
    "torch.add": ((1, 3, 4), lambda x, p: torch.add(x, other=p)),
    "one for all positions": ((1, 1, 4), lambda x, p: x + p),
    "one for all channels": ((1, 3, 1), lambda x, p: x + p),
    "fewer dimensions": ((4,), lambda x, p: x + p),
    "two dimensions": ((3, 4), lambda x, p: x + p),
    "a number": ((), lambda x, p: p + x),
    "twice": ((1, 3, 4), lambda x, p: torch.tanh(x + p) + p),
    "changed in place afterwards": ((1, 3, 4), lambda x, p: (x + p).relu_()),
    "expand": ((1, 1, 4), lambda x, p: torch.cat([p.expand(len(x), -1, -1), x], 1)),
    "expand by a list": ((1, 1, 4), lambda x, p: torch.cat([p.expand([len(x), 2, 4]), x], 1)),
    "expand and add": ((1, 1, 4), lambda x, p: torch.cat([p.expand(len(x), 1, 4), x + p], 1)),
}
UNHEARD = {
    "alpha": ((1, 3, 4), lambda x, p: torch.add(x, p, alpha=2)),
    "in place": ((1, 3, 4), in_place),
    "one for each row of the batch": ((6, 3, 4), lambda x, p: x + p[: len(x)]),
    "two parameters": ((1, 3, 4), lambda x, p: x + (p + p)),
    "more dimensions": ((1, 1, 3, 4), lambda x, p: (x + p)[0]),
    "expand to another number": ((1, 1, 4), lambda x, p: x + p.expand(3, 1, 4).sum(0)),
    "expand by more dimensions": ((1, 4), lambda x, p: x + p.expand(len(x), 3, 4)),
    "repeat": ((1, 1, 4), lambda x, p: torch.cat([p.repeat(len(x), 1, 1), x], 1)),
}


class Bare(nn.Module):
    """Six numbers a row to three tokens of four, with a parameter in between."""

    def __init__(self, shape, use) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Linear(6, 12), nn.Linear(4, 2)
        self.parameter, self.use = nn.Parameter(torch.randn(shape)), use

    def forward(self, inputs):
        tokens = torch.tanh(self.stem(inputs)).reshape(len(inputs), 3, 4)
        return self.head(torch.tanh(self.use(tokens, self.parameter)).mean(1))


def batch(rows=6):
    torch.manual_seed(1)
    return torch.randn(rows, 6, dtype=torch.float64) * torch.linspace(0.2, 3, rows)[:, None], torch.arange(rows) % 2


@pytest.mark.parametrize("name", HEARD)
def test_parameters_for_each_row_alike_are_heard(name):
    assert_exact(Bare(*HEARD[name]).double(), batch(), PATIENTS, loss=LOSS)


@pytest.mark.parametrize("name", UNHEARD)
def test_all_other_uses_are_noticed(name):
    network = Bare(*UNHEARD[name]).double()
    if name == "one for each row of the batch":
        # By the row's place in what the network is given, so that a patient alone has another gradient.
        clipper = GradientClipper(network, LOSS)
        clipper(batch(), PATIENTS, 1.0)
        assert clipper.faults
        return
    assert_exact(network, batch(), PATIENTS, loss=LOSS, faults=" ")


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("name", HEARD)
def test_in_small_batches(name, rows):
    network, data = Bare(*HEARD[name]).double(), batch(rows)
    total, norms, bound = patient_by_patient(network, LOSS, data, PATIENTS[:rows])
    assert_close(GradientClipper(network, LOSS, method="one_pass")(data, PATIENTS[:rows], bound), total, norms, EXACT)


def test_out_is_not_ours():
    network = Bare((1, 3, 4), out).double()
    with pytest.raises(RuntimeError, match="out"), torch.enable_grad():
        GradientClipper(network, LOSS)(batch(), PATIENTS, 1.0)


def test_a_frozen_one_costs_nothing():
    network = Bare(*HEARD["x + p"]).double()
    network.parameter.requires_grad_(False)
    assert_exact(network, batch(), PATIENTS, loss=LOSS)


def test_under_bfloat16_autocast():
    """The sum of a bfloat16 tensor and a float32 parameter is in float32, as torch has it."""
    network, data = Bare(*HEARD["x + p"]), (batch()[0].float(), batch()[1])

    def forward(inputs, rows):
        with torch.autocast("cpu", torch.bfloat16):
            return network(inputs).float()

    found = GradientClipper(network, LOSS, method="one_pass")(data, PATIENTS, 1e9, forward=forward)
    nn.functional.cross_entropy(forward(data[0], None), data[1], reduction="sum").backward()
    for gradient, parameter in zip(found.gradients, network.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=2e-2, atol=1e-2)
