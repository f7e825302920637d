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

"""Take batch norm out of a network: replace it by group norm, or fold its public statistics into an affine layer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from monai_privacy.mechanisms.clipping.calls import channel_affine
from monai_privacy.networks.check import is_quantized, unregistered_modules

__all__ = ["FoldedBatchNorm", "convert_batch_norm"]

# Normalising n values with no spatial extent leaves n - 2 degrees of freedom: one gives zero, two give a sign. Wu and
# He (2018, table 3) found 16 channels a group as good as 32 groups, so it is the floor where a layer may see vectors.
_MIN_CHANNELS_PER_VECTOR_GROUP = 16
_KNOWN_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward, _InstanceNorm.forward)


class FoldedBatchNorm(nn.Module):
    """Batch norm with fixed statistics, as what it then is: ``y = x * weight + bias`` for each channel.

    It has no buffers and does the same in training as in evaluation, so that nothing a patient does to a batch can
    reach the statistics or another row, whatever ``network.train()`` is called on.

    Args:
        num_features: number of channels C.
        device: of the parameters.
        dtype: of the parameters.

    Shape: (N, C) or (N, C, *spatial) in, the same out, of the dtype of the input. Unbatched input is not supported.
    """

    def __init__(
        self, num_features: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.weight = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift each channel.

        Raises:
            ValueError: where ``x`` has not ``num_features`` channels in its second dimension. A single channel would
                broadcast over them otherwise.
        """
        if x.dim() < 2 or x.shape[1] != self.num_features:
            raise ValueError(f"input has shape {x.shape}, not {self.num_features} channels. Pass (N, C, *spatial).")
        # In the input's dtype, as batch norm does: float32 weights would turn bfloat16 activations into float32.
        return channel_affine(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """Return what ``repr`` shows."""
        return f"{self.num_features}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # With strict=False a batch norm's weight would load here without its mean and variance: a wrong network.
        if f"{prefix}running_mean" in state_dict:
            error_msgs: list[str] = args[-1]
            error_msgs.append(
                f"{prefix[:-1]} is a folded batch norm, the state is that of the batch norm before folding. Load the "
                "state first, then call convert_batch_norm."
            )
            return
        super()._load_from_state_dict(state_dict, prefix, *args)


def convert_batch_norm(
    network: nn.Module,
    *,
    method: Literal["group", "fold"] = "group",
    num_groups: int = 32,
    min_channels_per_group: int = 2,
    statistics_are_public: bool = False,
    freeze_folded: bool = False,
) -> nn.Module:
    """Return a copy of a network without batch norm, for training with DP-SGD.

    Batch norm mixes the rows of a batch, so that clipping each patient's gradient bounds nothing, and keeps un-noised
    statistics of the patients. Two ways out:

    - ``"group"``: each batch norm becomes a group norm with its affine weights and eps. The running statistics are
      dropped, so a pretrained network has to be trained again. For training from scratch.
    - ``"fold"``: each batch norm becomes a :class:`FoldedBatchNorm` that does what the batch norm did in evaluation.
      The network keeps what it learnt, but the statistics become part of the released weights, so they must be public.

    Instance norms with ``track_running_stats=True`` lose their running statistics (``"group"``) or are folded as well
    (``"fold"``). All other layers are copied as they are. A layer used at two places stays one layer.

    Args:
        network: any network; not changed.
        method: ``"group"`` or ``"fold"``.
        num_groups: most groups of a group norm. The number taken is the largest divisor of the channels up to this
            that leaves ``min_channels_per_group`` channels in each group; one group where none does.
        min_channels_per_group: fewest channels in a group. Layers that may see vectors (N, C), that is all but
            ``BatchNorm2d`` and ``BatchNorm3d``, get at least 16 all the same: a group of one channel without spatial
            extent normalises to zero, one of two to a sign.
        statistics_are_public: for ``"fold"``, your declaration that the running means and variances were computed on
            public data. Statistics of private patients were never noised.
        freeze_folded: for ``"fold"``, make weight and bias of the folded layers constants. Otherwise they are trained
            as those of the batch norm were: frozen ones stay frozen, and where there were none (``affine=False``)
            the folded ones are constants too. Parameters that two layers shared become separate.

    Returns:
        The converted copy, on the same devices, of the same dtypes, with the same training flags and with
        ``requires_grad`` carried over. Convert before building the optimizer, and load pretrained weights before
        converting.

    Raises:
        ValueError: where an option is out of range, where ``"fold"`` is asked for without
            ``statistics_are_public=True``, and where a layer cannot be converted without changing what it does
            silently: TorchScript, compiled, quantised or lazy modules; batch norms with hooks, parametrizations or a
            ``forward`` of their own; batch norms held outside ``modules()``; batch norms on fewer than three channels
            that may see vectors (``"group"``); batch norms that have no statistics or have never seen data
            (``"fold"``).

    Reference: Wu and He, "Group Normalization", ECCV 2018.
    """
    _check_options(method, num_groups, min_channels_per_group, statistics_are_public)
    _refuse_unconvertible(network)

    def convert(layer: _NormBase) -> nn.Module:
        if method == "fold":
            return _folded(layer, freeze=freeze_folded)
        if isinstance(layer, _InstanceNorm):
            return _without_running_statistics(layer)
        return _group_norm(layer, num_groups=num_groups, min_channels_per_group=min_channels_per_group)

    return _replace(copy.deepcopy(network), convert)


def _replace(network: nn.Module, convert: Callable[[_NormBase], nn.Module]) -> nn.Module:
    """Put the conversion of each layer in its place, everywhere it is registered, in ``network`` itself."""
    replacements: dict[int, nn.Module] = {}
    for name, module in network.named_modules():
        if not _is_converted(module):
            continue
        try:
            replacements[id(module)] = convert(module).train(module.training)
        except ValueError as error:
            raise ValueError(f"{_label(name, module)} cannot be converted: {error}") from None
    if id(network) in replacements:
        return replacements[id(network)]
    for module in network.modules():
        # Not named_children, which names a child that is registered twice only once.
        for name, child in module._modules.items():
            if id(child) in replacements:
                module._modules[name] = replacements[id(child)]
    return network


def _is_converted(module: nn.Module | None) -> bool:
    return isinstance(module, _BatchNorm) or (isinstance(module, _InstanceNorm) and module.track_running_stats)


def _group_norm(layer: _NormBase, *, num_groups: int, min_channels_per_group: int) -> nn.GroupNorm:
    channels = layer.num_features
    if not isinstance(layer, nn.BatchNorm2d | nn.BatchNorm3d):
        min_channels_per_group = max(min_channels_per_group, _MIN_CHANNELS_PER_VECTOR_GROUP)
        if channels < 3:
            raise ValueError(
                f"it has {channels} channels and may see vectors (N, C), which a group norm of so few channels turns "
                "into zeros or signs. Remove it, use method='fold', or make it a BatchNorm2d or 3d if it sees images."
            )
    groups = _group_count(channels, num_groups=num_groups, min_channels_per_group=min_channels_per_group)
    norm = nn.GroupNorm(groups, channels, eps=layer.eps, affine=False)
    # The very parameters, so that dtype, device, requires_grad and ties to other layers come with them.
    norm.affine = layer.affine
    norm.weight = layer.weight
    norm.bias = layer.bias
    return norm


def _group_count(channels: int, *, num_groups: int, min_channels_per_group: int) -> int:
    """Return the largest divisor of ``channels`` up to ``num_groups`` whose groups are large enough, else 1."""
    candidates = range(min(num_groups, channels // min_channels_per_group), 0, -1)
    return next((groups for groups in candidates if channels % groups == 0), 1)


def _without_running_statistics(layer: _InstanceNorm) -> _InstanceNorm:
    # In place, in the copy: it keeps its class, and in training it never read the statistics.
    layer.track_running_stats = False
    layer.running_mean = None
    layer.running_var = None
    layer.num_batches_tracked = None
    return layer


@torch.no_grad()
def _folded(layer: _NormBase, *, freeze: bool) -> FoldedBatchNorm:
    scale, shift = _evaluation_affine(layer)
    like = layer.running_mean if layer.weight is None else layer.weight
    assert like is not None  # _evaluation_affine refuses a layer without statistics
    folded = FoldedBatchNorm(layer.num_features, device=like.device, dtype=like.dtype)
    for parameter, value, source in ((folded.weight, scale, layer.weight), (folded.bias, shift, layer.bias)):
        parameter.copy_(value)
        parameter.requires_grad_(not freeze and source is not None and source.requires_grad)
    return folded


def _evaluation_affine(layer: _NormBase) -> tuple[Tensor, Tensor]:
    """Return (C,) scale and shift, in float64 on the CPU, of what the layer does to a channel in evaluation."""
    mean, var = layer.running_mean, layer.running_var
    if mean is None or var is None:
        raise ValueError("it has track_running_stats=False, so there are no statistics to fold. Use method='group'.")
    # In float64, so that folding adds one rounding; on the CPU, since MPS has no float64.
    mean, var = mean.detach().double().cpu(), var.detach().double().cpu()
    # Not num_batches_tracked == 0: instance norm never counts, and weights saved by old versions have no count.
    if bool((mean == 0).all()) and bool((var == 1).all()):
        raise ValueError(
            "its statistics are as initialised, mean 0 and variance 1: it has never seen data. Load the pretrained "
            "weights before converting, or use method='group'."
        )
    scale = (var + layer.eps).rsqrt()
    if layer.weight is not None:
        scale = scale * layer.weight.detach().double().cpu()
    shift = -mean * scale
    if layer.bias is not None:
        shift = shift + layer.bias.detach().double().cpu()
    if not bool(torch.isfinite(scale).all() and torch.isfinite(shift).all()):
        raise ValueError("its statistics or weights are not finite or its variance is negative. Use other weights.")
    return scale, shift


def _check_options(method: str, num_groups: int, min_channels_per_group: int, statistics_are_public: bool) -> None:
    if method not in ("group", "fold"):
        raise ValueError(f"method is {method!r}, which is not known. Use 'group' or 'fold'.")
    for name, value in (("num_groups", num_groups), ("min_channels_per_group", min_channels_per_group)):
        if value < 1:
            raise ValueError(
                f"{name} is {value}: a group norm needs one group and one channel at least. Pass 1 or more."
            )
    if method == "fold" and statistics_are_public is not True:
        raise ValueError(
            f"method is 'fold' and statistics_are_public is {statistics_are_public!r}: the running mean and variance "
            "become released weights, and those of a network trained on private patients were never noised. Pass "
            "statistics_are_public=True if they were computed on public data, else use method='group'."
        )


def _refuse_unconvertible(network: nn.Module) -> None:
    """Refuse networks in which replacing a layer would do nothing, or would silently drop something."""
    for name, module in network.named_modules():
        reason = _opaque(module) or (_special(module) if _is_converted(module) else "")
        if reason:
            raise ValueError(f"{_label(name, module)} cannot be converted: {reason}.")
    for name, module in unregistered_modules(network):
        if _is_converted(module):
            raise ValueError(
                f"{_label(name, module)} cannot be converted: it is in a plain attribute, where modules() does not "
                "find it. Keep it in a ModuleList or ModuleDict."
            )


def _opaque(module: nn.Module) -> str:
    """Say why the layers inside a module cannot be replaced."""
    if isinstance(module, torch.jit.ScriptModule):
        return "TorchScript fixes its layers. Convert the Python network, then script it"
    # By name: importing torch._dynamo takes seconds.
    if type(module).__name__ == "OptimizedModule":
        return "the compiled code refers to the old layers. Convert the network, then call torch.compile"
    if is_quantized(module):
        return "quantised layers read the batch norm's attributes. Convert the float network, then quantise it"
    return ""


def _special(layer: nn.Module) -> str:
    """Say what of a layer that is to be converted would be lost."""
    if any(is_lazy(tensor) for tensor in (*layer.parameters(), *layer.buffers())):
        return "it is lazy and has no shape yet. Run the network once on a synthetic batch in eval mode"
    if is_parametrized(layer):
        return "its parametrization would be lost. Call torch.nn.utils.parametrize.remove_parametrizations"
    hooks = [key for key, value in vars(layer).items() if key.endswith("_hooks") and value]
    if hooks:
        return f"its hooks ({', '.join(hooks)}) would be lost. Remove them, convert, and register them again"
    if type(layer).forward not in _KNOWN_FORWARDS:
        return "it has a forward of its own, which would be lost. Replace it by a plain torch batch norm"
    return ""


def _label(name: str, module: nn.Module) -> str:
    return f"{name or 'the network itself'} ({type(module).__name__})"
