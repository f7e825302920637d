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

"""The one thing that a release takes from private data: is it bounded, exact and whole?"""

from __future__ import annotations

import pytest
import torch
from conftest import make_network
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from monai_privacy.mechanisms import clipped_gradient_sum

LOSS = nn.CrossEntropyLoss()


def make_batch(rows: int, spatial_dims: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn((rows, 1, *[8] * spatial_dims), generator=generator)
    # Some rows are outliers by orders of magnitude: clipping must hold for them too.
    scale = 10.0 ** torch.randint(-3, 5, (rows,), generator=generator)
    return inputs * scale.reshape(-1, *[1] * (spatial_dims + 1)), torch.randint(0, 2, (rows,), generator=generator)


def flat(gradients: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([gradient.reshape(-1) for gradient in gradients])


def one_patient_at_a_time(network: nn.Module, batch: tuple[Tensor, Tensor], patients: Tensor, bound: float) -> Tensor:
    """The definition, by plain autograd."""
    inputs, targets = batch
    total = torch.zeros(sum(p.numel() for p in network.parameters()), dtype=inputs.dtype)
    for patient in patients.unique():
        rows = patients == patient
        network.zero_grad()
        nn.functional.cross_entropy(network(inputs[rows]), targets[rows], reduction="sum").backward()
        gradient = torch.cat([p.grad.reshape(-1) for p in network.parameters()])
        total += gradient * min(1.0, bound / float(gradient.norm()))
    return total


groupings = st.lists(st.integers(0, 5), min_size=1, max_size=12)


@settings(max_examples=40, deadline=None)
@given(
    patients=groupings,
    gone=st.integers(0, 5),
    bound=st.sampled_from([1e-3, 0.7, 50.0]),
    microbatch=st.sampled_from([1, 2, 3, None]),
    spatial_dims=st.sampled_from([2, 3]),
    seed=st.integers(0, 1000),
)
def test_removing_a_patient_moves_the_sum_by_at_most_the_bound(patients, gone, bound, microbatch, spatial_dims, seed):
    network = make_network(spatial_dims)
    index = torch.tensor(patients)
    inputs, targets = make_batch(len(patients), spatial_dims, seed)
    kept = index != gone

    def summed(rows: Tensor) -> Tensor:
        result = clipped_gradient_sum(
            network, LOSS, (inputs[rows], targets[rows]), index[rows], bound, max_physical_batch_size=microbatch
        )
        return flat(result.gradients)

    moved = summed(torch.ones_like(kept)) - summed(kept)
    assert float(moved.double().norm()) <= bound * (1 + 1e-4)


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("microbatch", [1, 2, None])
def test_equals_one_patient_at_a_time(spatial_dims, microbatch):
    network = make_network(spatial_dims).double()
    inputs, targets = make_batch(9, spatial_dims)
    batch = (inputs.double(), targets)
    patients = torch.tensor([4, 0, 4, 7, 0, 4, 9, 9, 2])
    result = clipped_gradient_sum(network, LOSS, batch, patients, 0.5, max_physical_batch_size=microbatch)
    expected = one_patient_at_a_time(network, batch, patients, 0.5)
    torch.testing.assert_close(flat(result.gradients), expected, rtol=1e-12, atol=1e-12)


def test_norms_are_those_before_clipping():
    network = make_network().double()
    inputs, targets = make_batch(3)
    result = clipped_gradient_sum(network, LOSS, (inputs.double(), targets), torch.tensor([1, 0, 1]), 1e-6)
    huge = clipped_gradient_sum(network, LOSS, (inputs[1:2].double(), targets[1:2]), torch.tensor([0]), 1e12)
    assert float(result.norms[0]) == pytest.approx(float(flat(huge.gradients).norm()), rel=1e-12)
    assert len(result.norms) == 2


def test_rows_of_a_patient_are_clipped_once():
    network = make_network()
    inputs, targets = make_batch(1)
    crops = (inputs.repeat(4, 1, 1, 1), targets.repeat(4))
    result = clipped_gradient_sum(network, LOSS, crops, torch.zeros(4, dtype=torch.int64), 1e-3)
    assert float(flat(result.gradients).norm()) == pytest.approx(1e-3, rel=1e-4)


def test_row_weights_give_the_mean():
    network = make_network()
    inputs, targets = make_batch(1)
    four = (inputs.repeat(4, 1, 1, 1), targets.repeat(4))
    patients = torch.zeros(4, dtype=torch.int64)
    mean = clipped_gradient_sum(network, LOSS, four, patients, 1e9, row_weights=torch.full((4,), 0.25))
    one = clipped_gradient_sum(network, LOSS, (inputs, targets), patients[:1], 1e9)
    torch.testing.assert_close(flat(mean.gradients), flat(one.gradients), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_patient_with_a_gradient_that_is_not_finite_counts_as_zero(bad):
    network = make_network()
    inputs, targets = make_batch(4)
    inputs[1, 0, 0, 0] = bad
    patients = torch.tensor([0, 1, 1, 2])
    result = clipped_gradient_sum(network, LOSS, (inputs, targets), patients, 1.0)
    others = torch.tensor([0, 3])
    expected = clipped_gradient_sum(network, LOSS, (inputs[others], targets[others]), patients[others], 1.0)
    torch.testing.assert_close(flat(result.gradients), flat(expected.gradients))
    assert not torch.isfinite(result.norms[1])


def test_no_rows_give_zeros_and_do_not_call_the_network():
    class Refuses(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, inputs):
            raise AssertionError("called")

    nothing = (torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.int64))
    result = clipped_gradient_sum(Refuses(), LOSS, nothing, torch.zeros(0, dtype=torch.int64), 1.0)
    assert flat(result.gradients).tolist() == [0, 0, 0]
    assert len(result.norms) == 0


def test_frozen_parameters_are_left_out_and_unused_ones_are_zero():
    network = make_network()
    network[0].weight.requires_grad_(False)
    network.register_module("unused", nn.Linear(2, 2))
    network.forward = lambda x: nn.Sequential.forward(nn.Sequential(*list(network)[:5]), x)
    result = clipped_gradient_sum(network, LOSS, make_batch(2), torch.tensor([0, 1]), 1.0)
    names = [name for name, p in network.named_parameters() if p.requires_grad]
    shapes = [p.shape for p in network.parameters() if p.requires_grad]
    assert [g.shape for g in result.gradients] == shapes
    by_name = dict(zip(names, result.gradients, strict=True))
    assert not by_name["unused.weight"].any()
    assert by_name["4.weight"].any()


def test_only_the_parameters_asked_for_enter_the_norm():
    network = make_network()
    head = list(network[4].parameters())
    result = clipped_gradient_sum(network, LOSS, make_batch(3), torch.tensor([0, 1, 2]), 1e-3, parameters=head)
    assert len(result.gradients) == 2
    one = clipped_gradient_sum(network, LOSS, make_batch(1), torch.tensor([0]), 1e-3, parameters=head)
    assert float(flat(one.gradients).norm()) == pytest.approx(1e-3, rel=1e-4)


def test_leaves_gradients_and_parameters_alone():
    network = make_network()
    before = [p.detach().clone() for p in network.parameters()]
    clipped_gradient_sum(network, LOSS, make_batch(3), torch.tensor([0, 1, 1]), 1.0)
    assert all(p.grad is None for p in network.parameters())
    assert all(torch.equal(p, old) for p, old in zip(network.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("patients", "message"),
    [
        (torch.tensor([0, 1]), "3 inputs, 3 targets and 2 patients"),
        (torch.tensor([0.0, 1.0, 1.0]), "must be one integer"),
        (torch.tensor([[0], [1], [1]]), "must be one integer"),
    ],
)
def test_refuses_rows_of_unknown_patients(patients, message):
    with pytest.raises(ValueError, match=message):
        clipped_gradient_sum(make_network(), LOSS, make_batch(3), patients, 1.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_same_sum_on_cuda():
    network = make_network().double()
    inputs, targets = make_batch(6)
    patients = torch.tensor([0, 1, 1, 2, 2, 2])
    here = clipped_gradient_sum(network, LOSS, (inputs.double(), targets), patients, 1.0)
    there = clipped_gradient_sum(network.cuda(), LOSS, (inputs.double().cuda(), targets.cuda()), patients, 1.0)
    torch.testing.assert_close(flat(there.gradients).cpu(), flat(here.gradients), rtol=1e-9, atol=1e-12)
