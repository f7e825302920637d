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

"""The layer that a folded batch norm becomes."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from monai_privacy.networks import FoldedBatchNorm, convert_batch_norm


def fold(network: nn.Module) -> nn.Module:
    return convert_batch_norm(network, method="fold", statistics_are_public=True)


def trained(*, dtype: torch.dtype = torch.float32, channels: int = 4) -> nn.Module:
    """Return a batch norm with statistics and weights as training would leave them."""
    layer = nn.BatchNorm3d(channels).to(dtype)
    with torch.no_grad():
        for tensor in (layer.running_mean, layer.weight, layer.bias):
            tensor.normal_(generator=torch.Generator().manual_seed(0))
        layer.running_var.fill_(2)
    return layer


def test_folded_layer_survives_every_kind_of_copy() -> None:
    folded = fold(trained())
    x = torch.randn(2, 4, 3, 3, 3)
    expected = folded(x)
    fresh = FoldedBatchNorm(4)
    fresh.load_state_dict(folded.state_dict())
    buffer = io.BytesIO()
    torch.save(folded.state_dict(), buffer)
    buffer.seek(0)
    saved = FoldedBatchNorm(4)
    saved.load_state_dict(torch.load(buffer, weights_only=True))
    for twin in (fresh, saved, copy.deepcopy(folded), pickle.loads(pickle.dumps(folded))):
        assert torch.equal(twin(x), expected)
    assert set(folded.state_dict()) == {"weight", "bias"}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 5), (3, 4, 5, 5), (3, 4, 5, 5, 5)])
def test_folded_layer_scripts(shape: tuple[int, ...]) -> None:
    folded = fold(trained())
    scripted = torch.jit.script(folded)
    x = torch.randn(shape)
    assert torch.equal(scripted(x), folded(x))
    with pytest.raises(torch.jit.Error, match="channels"):
        scripted(torch.randn(3, 5))


@pytest.mark.parametrize("shape", [(4,), (2, 5), (2, 1, 4), (2, 5, 4)])
def test_folded_layer_refuses_other_channels(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="4 channels"):
        FoldedBatchNorm(4)(torch.zeros(shape))


def test_folded_layer_keeps_the_dtype_of_its_input() -> None:
    folded = fold(trained())
    assert folded(torch.zeros(1, 4, 2, 2, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("strict", [True, False])
def test_folded_layer_refuses_the_state_of_the_batch_norm(strict: bool) -> None:
    network = nn.Sequential(nn.Conv3d(4, 4, 1), trained())
    folded = fold(network)
    before = copy.deepcopy(folded.state_dict())
    with pytest.raises(RuntimeError, match=r"1 is a folded batch norm.*before folding"):
        folded.load_state_dict(network.state_dict(), strict=strict)
    assert torch.equal(folded[1].weight, before["1.weight"])


def test_folded_layer_gradients() -> None:
    folded = fold(trained(dtype=torch.float64, channels=3))
    x = torch.randn(2, 3, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, w, b: torch.func.functional_call(folded, {"weight": w, "bias": b}, x), (x, folded.weight, folded.bias)
    )
