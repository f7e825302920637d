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

from __future__ import annotations

import copy

import pytest
import torch
from monai.bundle.config_item import ComponentLocator
from torch import nn

from monai_privacy import networks
from monai_privacy.networks import ResNet9, check_network, find_updated_buffers

SMALL = {"widths": (8, 8, 16, 16), "num_groups": 4}


def test_parameter_count_is_the_published_one() -> None:
    network = ResNet9(spatial_dims=2, in_channels=3, out_channels=8)
    assert sum(p.numel() for p in network.parameters()) == 4_909_896


@pytest.mark.parametrize("spatial_dims", [1, 2, 3])
def test_structure(spatial_dims: int) -> None:
    network = ResNet9(spatial_dims, 1, 2)
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[spatial_dims]
    norms = [m for m in network.modules() if isinstance(m, nn.GroupNorm)]
    convolutions = [m for m in network.modules() if isinstance(m, conv)]
    # Stem, two for each of four blocks, three shortcuts; a norm after each.
    assert len(convolutions) == len(norms) == 12
    assert all(norm.num_groups == 32 for norm in norms)
    assert [norm.num_channels for norm in norms] == [c.out_channels for c in convolutions]
    assert all(c.bias is None for c in convolutions)
    assert sum(type(m).__name__ == "Mish" for m in network.modules()) == 5
    assert list(network.buffers()) == []


@pytest.mark.parametrize("spatial_dims", [1, 2, 3])
@pytest.mark.parametrize("size", [32, 45])
def test_rows_are_alone_in_training(spatial_dims: int, size: int) -> None:
    torch.manual_seed(0)
    network = ResNet9(spatial_dims, 2, 3, **SMALL).double().train()
    x = torch.randn(2, 2, *[size] * spatial_dims, dtype=torch.float64)
    out = network(x)
    assert out.shape == (2, 3)
    torch.testing.assert_close(out, torch.cat([network(x[:1]), network(x[1:])]), rtol=1e-10, atol=1e-10)
    assert check_network(network) == ()
    assert find_updated_buffers(network, lambda: network(x)) == ()
    out.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_scripts_and_copies(spatial_dims: int) -> None:
    network = ResNet9(spatial_dims, 1, 2, **SMALL).eval()
    x = torch.randn(1, 1, *[32] * spatial_dims)
    torch.testing.assert_close(torch.jit.script(network)(x), network(x))
    assert torch.equal(copy.deepcopy(network)(x), network(x))
    other = ResNet9(spatial_dims, 1, 2, **SMALL).eval()
    other.load_state_dict(network.state_dict())
    assert torch.equal(other(x), network(x))


def test_activation_can_be_chosen() -> None:
    network = ResNet9(2, 1, 2, **SMALL, act=("relu", {"inplace": True}))
    assert sum(isinstance(m, nn.ReLU) for m in network.modules()) == 5
    network(torch.randn(1, 1, 32, 32)).sum().backward()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"spatial_dims": 4}, "spatial_dims is 4"),
        ({"widths": (32, 64)}, "widths has 2 entries"),
        ({"widths": (32, 64, 96, 100)}, "num_groups is 32, which does not divide the width 100"),
        ({"num_groups": 0}, "num_groups is 0"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        ResNet9(**{"spatial_dims": 2, "in_channels": 1, "out_channels": 2} | arguments)  # type: ignore[arg-type]


# It imports all of MONAI, parts of which use torch.jit.script.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", networks.__all__)
def test_no_public_name_is_one_of_monai(name: str) -> None:
    # As bundles look names up: by short name, through every module that begins with "monai".
    found = LOCATOR.get_component_module_name(name)
    modules = [found] if isinstance(found, str) else found
    assert modules
    assert all(module.startswith("monai_privacy.") for module in modules)


LOCATOR = ComponentLocator()
