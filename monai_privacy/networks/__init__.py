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

"""Networks that can be trained privately: conversion of batch norm, checks, a small ResNet, linear heads."""

from __future__ import annotations

from .batch_norm import FoldedBatchNorm, convert_batch_norm
from .check import LayerProblem, check_network, find_updated_buffers, require_privately_trainable
from .conversion import converted_network, load_matching_weights
from .gradient_histograms import FixedFeatureClassifier, GradientHistograms
from .linear_head import fit_linear_head
from .radial_profile import RadialProfile
from .resnet9 import ResNet9

__all__ = [
    "FixedFeatureClassifier",
    "FoldedBatchNorm",
    "GradientHistograms",
    "LayerProblem",
    "RadialProfile",
    "ResNet9",
    "check_network",
    "convert_batch_norm",
    "converted_network",
    "find_updated_buffers",
    "fit_linear_head",
    "load_matching_weights",
    "require_privately_trainable",
]
