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

"""MONAI's networks, as small as they come, and the path on which clipping should take each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from monai.losses import DiceLoss
from monai.networks import nets
from monai.networks.nets.swin_unetr import SwinTransformer
from torch import Tensor, nn

from monai_privacy.networks import ResNet9, convert_batch_norm


class Logits(nn.Module):
    """What a network gives besides logits, left out."""

    def __init__(self, network: nn.Module, choose: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.network, self.choose = network, choose

    def forward(self, inputs: Tensor) -> Tensor:
        """The logits."""
        return self.choose(self.network(inputs))


def backbone() -> nn.Module:
    """A small network of images to 16 features, as MILModel takes it."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
        nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip


def vit(classification: bool, spatial_dims: int = 2) -> nn.Module:
    network = nets.ViT(
        in_channels=1, img_size=16, patch_size=8, hidden_size=24, mlp_dim=32, num_layers=2, num_heads=4,
        classification=classification, num_classes=2, spatial_dims=spatial_dims,
    )  # fmt: skip
    return Logits(network, lambda out: out[0] if classification else out[0].mean(1)[:, :2])


def swin(spatial_dims: int) -> nn.Module:
    network = SwinTransformer(
        in_chans=1, embed_dim=6, window_size=(2,) * spatial_dims, patch_size=(2,) * spatial_dims, depths=(2, 1, 1, 1),
        num_heads=(1, 1, 1, 1), spatial_dims=spatial_dims,
    )  # fmt: skip
    return Logits(network, lambda out: out[-1].flatten(2).mean(2)[:, :2])


def unet(spatial_dims: int) -> nn.Module:
    return nets.UNet(
        spatial_dims=spatial_dims, in_channels=1, out_channels=2, channels=(4, 8, 16), strides=(2, 2), num_res_units=1,
        norm="instance",
    )  # fmt: skip


def dyn_unet(spatial_dims: int) -> nn.Module:
    return nets.DynUNet(
        spatial_dims=spatial_dims, in_channels=1, out_channels=2, kernel_size=[3, 3, 3], strides=[1, 2, 2],
        upsample_kernel_size=[2, 2], filters=[4, 8, 8],
    )  # fmt: skip


def unetr(spatial_dims: int) -> nn.Module:
    return nets.UNETR(
        in_channels=1, out_channels=2, img_size=16, feature_size=4, hidden_size=24, mlp_dim=32, num_heads=4,
        spatial_dims=spatial_dims,
    )  # fmt: skip


def basic_unet(spatial_dims: int) -> nn.Module:
    return nets.BasicUNet(spatial_dims=spatial_dims, in_channels=1, out_channels=2, features=(4, 4, 8, 8, 8, 4))


def attention_unet(spatial_dims: int) -> nn.Module:
    return nets.AttentionUnet(
        spatial_dims=spatial_dims, in_channels=1, out_channels=2, channels=(4, 8, 16), strides=(2, 2)
    )


def seg_resnet(spatial_dims: int) -> nn.Module:
    return nets.SegResNet(
        spatial_dims=spatial_dims, in_channels=1, out_channels=2, blocks_down=(1, 1, 1), blocks_up=(1, 1)
    )


def mil(mode: str) -> nn.Module:
    return nets.MILModel(num_classes=2, mil_mode=mode, pretrained=False, backbone=backbone(), backbone_num_features=16)


def efficient_net(spatial_dims: int) -> nn.Module:
    return nets.EfficientNetBN(
        "efficientnet-b0", pretrained=False, spatial_dims=spatial_dims, in_channels=1, num_classes=2
    )


@dataclass(frozen=True)
class Case:
    """A network, the shape of its images and what the engine should say of it.

    Args:
        make: makes the network; batch norm is converted afterwards.
        shape: of one image, channels first.
        fault: the parameter for which patients go through one at a time; empty for the fast path.
        masks: whether targets are masks.
        slow: whether it takes more than five seconds.
        needs: a package without which it is skipped.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    fault: str = ""
    masks: bool = False
    slow: bool = False
    needs: str = "monai"


FLAT, DEEP = (1, 32, 32), (1, 32, 32, 32)
SMALL, TINY = (1, 16, 16, 16), (1, 8, 8, 8)
CASES = {
    "ResNet9": Case(lambda: ResNet9(2, 1, 2), FLAT),
    "ResNet9 3D": Case(lambda: ResNet9(3, 1, 2, widths=(8, 16, 16, 16), num_groups=4), DEEP),
    "DenseNet121": Case(lambda: nets.DenseNet121(spatial_dims=2, in_channels=1, out_channels=2), FLAT),
    "DenseNet121 3D": Case(lambda: nets.DenseNet121(spatial_dims=3, in_channels=1, out_channels=2), DEEP, slow=True),
    "DenseNet169": Case(lambda: nets.DenseNet169(spatial_dims=2, in_channels=1, out_channels=2), FLAT),
    "resnet18": Case(lambda: nets.resnet18(spatial_dims=2, n_input_channels=1, num_classes=2), FLAT),
    "resnet18 3D": Case(lambda: nets.resnet18(spatial_dims=3, n_input_channels=1, num_classes=2), TINY, slow=True),
    "resnet50": Case(lambda: nets.resnet50(spatial_dims=2, n_input_channels=1, num_classes=2), (1, 16, 16)),
    "resnet50 3D": Case(lambda: nets.resnet50(spatial_dims=3, n_input_channels=1, num_classes=2), TINY, slow=True),
    "SEResNet50": Case(lambda: nets.SEResNet50(spatial_dims=2, in_channels=1, num_classes=2), FLAT),
    "EfficientNet": Case(lambda: efficient_net(2), FLAT),
    "EfficientNet 3D": Case(lambda: efficient_net(3), DEEP, slow=True),
    "HighResNet": Case(lambda: nets.HighResNet(spatial_dims=2, in_channels=1, out_channels=2), (1, 8, 8), masks=True),
    "HighResNet 3D": Case(
        lambda: nets.HighResNet(spatial_dims=3, in_channels=1, out_channels=2), (1, 5, 5, 5), masks=True
    ),
    "Classifier": Case(lambda: nets.Classifier(FLAT, 2, channels=(4, 8), strides=(2, 2)), FLAT),
    "Classifier 3D": Case(lambda: nets.Classifier(SMALL, 2, channels=(4, 8), strides=(2, 2)), SMALL),
    "ViT": Case(lambda: vit(True), (1, 16, 16)),
    "ViT 3D": Case(lambda: vit(True, 3), SMALL),
    "ViT, features": Case(lambda: vit(False), (1, 16, 16)),
    "Swin": Case(lambda: swin(2), FLAT, "network.layers1.0.blocks.0.attn.relative_position_bias_table"),
    "Swin 3D": Case(lambda: swin(3), DEEP, "network.layers1.0.blocks.0.attn.relative_position_bias_table"),
    "MIL, mean": Case(lambda: mil("mean"), (3, 1, 16, 16)),
    "MIL, max": Case(lambda: mil("max"), (3, 1, 16, 16)),
    "MIL, attention": Case(lambda: mil("att"), (3, 1, 16, 16)),
    "MIL, transformer": Case(lambda: mil("att_trans"), (3, 1, 16, 16), "transformer.layers.0.self_attn.in_proj_weight"),
    "torchvision": Case(
        lambda: nets.TorchVisionFCModel("resnet18", num_classes=2, use_conv=False, pool=("avg", {"kernel_size": 1})),
        (3, 32, 32),
        needs="torchvision",
    ),
    "UNet": Case(lambda: unet(2), FLAT, masks=True),
    "UNet 3D": Case(lambda: unet(3), SMALL, masks=True),
    "BasicUNet": Case(lambda: basic_unet(2), FLAT, masks=True),
    "BasicUNet 3D": Case(lambda: basic_unet(3), (1, 32, 16, 16), masks=True),
    "SegResNet": Case(lambda: seg_resnet(2), (1, 16, 16), masks=True),
    "SegResNet 3D": Case(lambda: seg_resnet(3), TINY, masks=True),
    "DynUNet": Case(lambda: dyn_unet(2), FLAT, masks=True),
    "DynUNet 3D": Case(lambda: dyn_unet(3), SMALL, masks=True),
    "UNETR": Case(lambda: unetr(2), (1, 16, 16), masks=True),
    "UNETR 3D": Case(lambda: unetr(3), SMALL, masks=True),
    "AttentionUnet": Case(lambda: attention_unet(2), FLAT, masks=True),
    "AttentionUnet 3D": Case(lambda: attention_unet(3), SMALL, masks=True),
}


def make(case: Case) -> nn.Module:
    """The network in float64 and in training mode, but for what is drawn at random there."""
    torch.manual_seed(0)
    network = convert_batch_norm(case.make()).double().train()
    for module in network.modules():
        if isinstance(module, nn.Dropout | nn.Dropout1d | nn.Dropout2d | nn.Dropout3d):
            module.p = 0.0
        if hasattr(module, "drop_connect_rate"):
            setattr(module, "drop_connect_rate", 0.0)  # noqa: B010
    return network


def batch(case: Case, rows: int) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A loss, and synthetic images and targets in float64."""
    inputs = torch.randn(rows, *case.shape, dtype=torch.float64)
    if case.masks:
        masks = torch.randint(0, 2, (rows, 1, *case.shape[1:])).double()
        return DiceLoss(to_onehot_y=True, softmax=True), (inputs, masks)
    return nn.CrossEntropyLoss(), (inputs, torch.arange(rows) % 2)
