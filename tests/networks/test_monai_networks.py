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

"""MONAI's networks, as they are shipped, through conversion and both checks."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from monai.networks.blocks import ADN, Convolution
from monai.networks.nets import (
    AttentionUnet,
    BasicUNet,
    DenseNet,
    DynUNet,
    EfficientNetBN,
    ResNet,
    SegResNet,
    SEResNet50,
    UNet,
)
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from monai_privacy.networks import (
    check_network,
    convert_batch_norm,
    find_updated_buffers,
    require_privately_trainable,
)

# Each takes spatial_dims. Small, but of the shipped structure: every kind of place a batch norm has in MONAI.
NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "ADN": lambda d: ADN(in_channels=1, act="relu", norm="batch", norm_dim=d),
    "Convolution": lambda d: Convolution(d, 1, 8, norm="batch"),
    "DenseNet": lambda d: DenseNet(d, 1, 2, init_features=8, growth_rate=4, block_config=(2, 2)),
    "ResNet-basic": lambda d: ResNet("basic", [1] * 4, [8, 8, 16, 16], d, n_input_channels=1, num_classes=2),
    "ResNet-bottleneck": lambda d: ResNet("bottleneck", [1] * 4, [8] * 4, d, n_input_channels=1, num_classes=2),
    "SEResNet50": lambda d: SEResNet50(spatial_dims=d, in_channels=1, num_classes=2, layers=(1, 1, 1, 1)),
    "EfficientNet-B0": lambda d: EfficientNetBN("efficientnet-b0", pretrained=False, spatial_dims=d, in_channels=1),
    "UNet": lambda d: UNet(d, 1, 2, channels=(8, 16, 32), strides=(2, 2), num_res_units=1, norm="batch"),
    "AttentionUnet": lambda d: AttentionUnet(d, 1, 2, channels=(8, 16, 32), strides=(2, 2)),
    "SegResNet": lambda d: SegResNet(
        d, init_filters=8, in_channels=1, blocks_down=(1, 2), blocks_up=(1,), norm="batch"
    ),
    "BasicUNet": lambda d: BasicUNet(d, 1, 2, features=(8, 8, 16, 16, 32, 8), norm="batch"),
    "DynUNet": lambda d: DynUNet(d, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], filters=[8, 16, 32], norm_name="batch"),
}
CASES = pytest.mark.parametrize(
    ("name", "spatial_dims"), [(name, dims) for name in NETWORKS for dims in (2, 3)], ids=lambda case: str(case)
)


def build(name: str, spatial_dims: int) -> nn.Module:
    """Return the network in float64, without its random layers, so that two calls can be compared."""
    torch.manual_seed(0)
    network = NETWORKS[name](spatial_dims).double()
    for module in network.modules():
        if hasattr(module, "drop_connect_rate"):
            module.drop_connect_rate = None
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return network


def images(rows: int, name: str, spatial_dims: int) -> Tensor:
    # EfficientNet pads for images of 224 voxels: its convolutions do not fit into fewer than 32.
    size = 16 if spatial_dims == 3 and name != "EfficientNet-B0" else 32
    return torch.randn(rows, 1, *[size] * spatial_dims, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def with_statistics(network: nn.Module, x: Tensor) -> nn.Module:
    """Give the batch norms the statistics of some data, and weights that are not the initial ones."""
    network.train()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, _BatchNorm):
                module.momentum = 0.5
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
        network(x)
    return network


def count_batch_norms(network: nn.Module) -> int:
    return sum(isinstance(module, _BatchNorm) for module in network.modules())


@CASES
def test_group_leaves_a_network_in_which_rows_are_alone(name: str, spatial_dims: int) -> None:
    network = build(name, spatial_dims)
    before = copy.deepcopy(network.state_dict())
    x = images(2, name, spatial_dims)

    converted = convert_batch_norm(network)

    assert count_batch_norms(network) > 0
    assert count_batch_norms(converted) == 0
    assert check_network(converted) == ()
    require_privately_trainable(converted)
    converted.train()
    with torch.no_grad():
        together = converted(x)
        alone = torch.cat([converted(x[:1]), converted(x[1:])])
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-9)
    assert together.std() > 0
    # The caller's network is as it was.
    assert network.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


@CASES
def test_fold_does_what_evaluation_did(name: str, spatial_dims: int) -> None:
    network = with_statistics(build(name, spatial_dims), images(4, name, spatial_dims))
    x = images(1, name, spatial_dims)

    folded = convert_batch_norm(network, method="fold", statistics_are_public=True)

    assert count_batch_norms(folded) == 0
    assert check_network(folded) == ()
    with torch.no_grad():
        expected = network.eval()(x)
        torch.testing.assert_close(folded.eval()(x), expected, rtol=1e-12, atol=1e-12)
        # Immune to the network.train() of every trainer.
        torch.testing.assert_close(folded.train()(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("name", ["DenseNet", "ResNet-basic", "UNet"])
def test_both_checks_see_each_batch_norm(name: str, spatial_dims: int) -> None:
    network = build(name, spatial_dims).eval().requires_grad_(False)
    next(network.parameters()).requires_grad_(True)
    norms = [key for key, module in network.named_modules() if isinstance(module, _BatchNorm)]
    x = images(2, name, spatial_dims)

    assert [(p.name, p.kind) for p in check_network(network)] == [(key, "batch_norm") for key in norms]
    with pytest.raises(ValueError, match="convert_batch_norm") as error:
        require_privately_trainable(network)
    assert all(key in str(error.value) for key in norms)
    assert "\n" not in str(error.value)
    written = {f"{key}.{b}" for key in norms for b in ("running_mean", "running_var", "num_batches_tracked")}
    assert set(find_updated_buffers(network, lambda: network(x))) == written
    converted = convert_batch_norm(network)
    assert find_updated_buffers(converted, lambda: converted(x)) == ()
