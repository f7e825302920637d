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


"""What a run was made of, as SHA-256, so that a report can name it: code, configs, and the model that came out."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn


@lru_cache(maxsize=1)
def code_digest() -> str:
    """Of all Python files of this package, in the order of their names."""
    root, total = Path(__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        total.update(f"{path.relative_to(root).as_posix()} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()


def file_digests(paths: Iterable[str | os.PathLike[str]]) -> dict[str, str]:
    """Of each file, by its name.

    Raises:
        ValueError: where a file cannot be read.
    """
    found: dict[str, str] = {}
    for path in paths:
        try:
            found[f"config {Path(path).name}"] = file_digest(path)
        except OSError as error:
            raise ValueError(
                f"config file {path} cannot be read: {error.strerror}. Name the files of this run."
            ) from error
    return found


def file_digest(path: str | os.PathLike[str]) -> str:
    """Of one file's bytes; an OSError where it cannot be read."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@torch.no_grad()
def network_digest(network: nn.Module) -> str:
    """Of every parameter and buffer; see :func:`state_digest`."""
    return state_digest(network.state_dict())


def state_digest(state: Mapping[str, object]) -> str:
    """Of every tensor of a state dict: name, type, shape and bytes, in its order. Not of the file that holds it."""
    total = hashlib.sha256()
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            plain = value.detach().cpu().contiguous()
            total.update(f"{name} {plain.dtype} {tuple(plain.shape)}\n".encode())
            total.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
