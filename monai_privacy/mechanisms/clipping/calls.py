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

"""Which torch functions the clipping engine sees, and what operation each call is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import handle_torch_function, has_torch_function

from monai_privacy.mechanisms.clipping.bare import AddRule, ExpandRule
from monai_privacy.mechanisms.clipping.convolution import ConvolutionRule
from monai_privacy.mechanisms.clipping.linear import EmbeddingRule, LinearRule
from monai_privacy.mechanisms.clipping.normalization import ChannelAffineRule, GroupNormRule, LayerNormRule, PReLURule
from monai_privacy.mechanisms.clipping.operation import OperationRule

Number = int | Sequence[int] | str


class Call(NamedTuple):
    """One call of an operation that may have trained parameters."""

    operation: OperationRule
    x: Tensor
    weight: Tensor | None
    bias: Tensor | None = None


def channel_affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Scale and shift each channel: (R, C, *spatial) times (C,) plus (C,), in the dtype of ``x``.

    A function of its own, so that the clipping engine sees one operation with two parameters.
    """
    if has_torch_function((x, weight, bias)):
        return handle_torch_function(channel_affine, (x, weight, bias), x, weight, bias)  # type: ignore[no-any-return]
    shape = [1, x.shape[1]] + [1] * (x.dim() - 2)
    return (x * weight.view(shape) + bias.view(shape)).to(x.dtype)


def read_call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    """The call as an operation; None for functions without parameters or forms that are not known.

    What is not known runs as torch runs it. A parameter in it then receives a gradient of its own, and that is noticed.
    """
    reader = _READERS.get(function)
    return None if reader is None else reader(*args, **kwargs)


def _convolution(dims: int) -> Callable[..., Call | None]:
    def read(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Number = 1,
        padding: Number = 0,
        dilation: Number = 1,
        groups: int = 1,
    ) -> Call | None:
        if input.dim() != dims + 2:  # one image without a batch dimension
            return None
        steps = _sizes(dilation, dims)
        if isinstance(padding, str):
            total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(steps, weight.shape[2:], strict=True)]
            if any(n % 2 for n in total):
                return None
            padding = [n // 2 for n in total]
        operation = ConvolutionRule(_sizes(stride, dims), _sizes(padding, dims), steps, groups)
        return Call(operation, input, weight, bias)

    return read


def _transposed(dims: int) -> Callable[..., Call | None]:
    def read(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Number = 1,
        padding: Number = 0,
        output_padding: Number = 0,
        groups: int = 1,
        dilation: Number = 1,
    ) -> Call | None:
        if input.dim() != dims + 2:
            return None
        operation = ConvolutionRule(
            _sizes(stride, dims),
            _sizes(padding, dims),
            _sizes(dilation, dims),
            groups,
            transposed=True,
            output_padding=_sizes(output_padding, dims),
        )
        return Call(operation, input, weight, bias)

    return read


def _sizes(value: Any, dims: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Call | None:
    return Call(LinearRule(), input, weight, bias) if input.dim() >= 2 and weight.dim() == 2 else None


def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Call | None:
    return Call(GroupNormRule(num_groups, eps), input, weight, bias)


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Call | None:
    if running_mean is not None or running_var is not None or not use_input_stats or input.dim() < 3:
        return None
    return Call(GroupNormRule(input.shape[1], eps, name="instance_norm"), input, weight, bias)


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Call | None:
    if input.dim() <= len(normalized_shape):
        return None
    return Call(LayerNormRule(tuple(normalized_shape), eps), input, weight, bias)


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Call | None:
    if max_norm is not None or scale_grad_by_freq or sparse or input.dim() < 1:
        return None
    return Call(EmbeddingRule(padding_idx), input, weight)


def _channel_affine(x: Tensor, weight: Tensor, bias: Tensor) -> Call | None:
    return Call(ChannelAffineRule(), x, weight, bias)


def _prelu(input: Tensor, weight: Tensor) -> Call | None:
    return Call(PReLURule(), input, weight) if input.dim() >= 2 or weight.numel() == 1 else None


def _add(input: Any, other: Any, *, alpha: Any = 1, out: Tensor | None = None) -> Call | None:
    # Most sums have no parameter: this must be quick.
    if (type(input) is nn.Parameter) is (type(other) is nn.Parameter):
        return None
    x, bias = (other, input) if type(input) is nn.Parameter else (input, other)
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 1 or alpha != 1 or out is not None:
        return None
    same_for_each_row = bias.dim() < x.dim() or (bias.dim() == x.dim() and bias.shape[0] == 1)
    if not same_for_each_row or torch.broadcast_shapes(x.shape, bias.shape) != x.shape:
        return None
    return Call(AddRule(), x, None, bias)


def _expand(input: Tensor, *sizes: Any, **kwargs: Any) -> Call | None:
    wanted = tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
    if (
        type(input) is not nn.Parameter
        or len(wanted) != input.dim()
        or input.dim() < 2
        or input.shape[0] != 1
        or kwargs
    ):
        return None
    rows, *shape = (size if asked == -1 else asked for size, asked in zip(input.shape, wanted, strict=True))
    return Call(ExpandRule(tuple(shape)), input.new_empty((rows, 0)), input)


_READERS: dict[Any, Callable[..., Call | None]] = {
    functional.linear: _linear,
    functional.group_norm: _group_norm,
    functional.instance_norm: _instance_norm,
    functional.layer_norm: _layer_norm,
    functional.embedding: _embedding,
    functional.prelu: _prelu,
    torch.prelu: _prelu,
    channel_affine: _channel_affine,
    torch.add: _add,
    Tensor.add: _add,
    Tensor.__add__: _add,
    Tensor.__radd__: _add,
    Tensor.expand: _expand,
    functional.conv1d: _convolution(1),
    functional.conv2d: _convolution(2),
    functional.conv3d: _convolution(3),
    functional.conv_transpose1d: _transposed(1),
    functional.conv_transpose2d: _transposed(2),
    functional.conv_transpose3d: _transposed(3),
}
