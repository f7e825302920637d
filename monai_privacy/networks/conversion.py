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
"""Networks as bundles make them, ready for private training: public weights first, then the conversion."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn

from monai_privacy.networks.batch_norm import convert_batch_norm

__all__ = ["converted_network", "load_matching_weights"]

_logger = logging.getLogger(__name__)

_STATE_KEYS = ("model", "state_dict", "network")


def converted_network(
    network: nn.Module,
    *,
    method: Literal["group", "fold"] = "group",
    public_weights: str | os.PathLike[str] | None = None,
    statistics_are_public: bool = False,
) -> nn.Module:
    """Load public weights into a network, where there are any, and convert its batch norm; for config files.

    The same lines serve training, evaluation, inference and export, so that the private checkpoint finds the layers that
    it was saved from.

    Args:
        network: as the bundle makes it.
        method: see ``convert_batch_norm``.
        public_weights: a checkpoint of the network as the bundle makes it: a state dict, or one under "model",
            "state_dict" or "network". Loaded without running code from it.
        statistics_are_public: see ``convert_batch_norm``.

    Raises:
        FileNotFoundError: where there is no such checkpoint.
        ValueError: where it does not fit the network, and whatever ``convert_batch_norm`` raises.
    """
    if public_weights is not None:
        network.load_state_dict(_fitting_state(network, public_weights))
    return convert_batch_norm(network, method=method, statistics_are_public=statistics_are_public)


def load_matching_weights(
    network: nn.Module, path: str | os.PathLike[str], *, missing_ok: bool = False
) -> tuple[str, ...]:
    """Begin with the weights of a network that was trained for something else; for config files.

    MONAI's ``CheckpointLoader(strict_shape=False)`` loads nothing from a file that holds one state dict, without a word
    (1.6.1), which is why this is here.

    Args:
        network: gets every entry of the checkpoint that it has under the same name, in the same shape.
        path: a state dict, or one under "model", "state_dict" or "network". Loaded without running code from it. Weights
            that were trained on private patients without privacy void the claim of whatever begins with them.
        missing_ok: leave the network as it is where there is no such file.

    Returns:
        The entries that the network has and did not get.

    Raises:
        FileNotFoundError: where there is no such checkpoint.
        ValueError: where not one entry matches.
    """
    if missing_ok and not os.path.isfile(path):
        _logger.warning("initial weights: %s does not exist, so training begins with random ones", path)
        return tuple(network.state_dict())
    found, own = _state_of(path, "weights"), network.state_dict()
    matching = {name: value for name, value in found.items() if name in own and own[name].shape == value.shape}
    if not matching:
        raise ValueError(f"weights {path} have no entry of this network. Name the checkpoint of a network like it.")
    network.load_state_dict(matching, strict=False)
    left = tuple(name for name in own if name not in matching)
    _logger.info("initial weights: %d of %d entries from %s", len(matching), len(own), path)
    return left


def _fitting_state(network: nn.Module, path: str | os.PathLike[str]) -> Mapping[str, Any]:
    found = _state_of(path, "public_weights")
    own = set(network.state_dict())
    missing, foreign = sorted(own - set(found)), sorted(set(found) - own)
    if missing or foreign:
        raise ValueError(
            f"public_weights {path} are not this network's: {len(missing)} of its entries are missing"
            f"{f' ({missing[0]})' if missing else ''}, and {len(foreign)} are foreign"
            f"{f' ({foreign[0]})' if foreign else ''}. Name the checkpoint of the network as the bundle makes it."
        )
    return found


def _state_of(path: str | os.PathLike[str], name: str) -> Mapping[str, Any]:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{name} {path} does not exist. Download or train it first, or correct the path.")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and pickle raise many kinds
        raise ValueError(f"{name} {path} cannot be read ({' '.join(str(error).split())[:120]}).") from error
    for key in _STATE_KEYS:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
            break
    if not (isinstance(found, Mapping) and all(isinstance(value, torch.Tensor) for value in found.values())):
        raise ValueError(f"{name} {path} hold no state dict. Save network.state_dict().")
    return found
