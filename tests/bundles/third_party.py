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
"""Small bundles in the style of the public model zoo, one for each habit, written by nobody who knew of privacy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from monai.networks.nets import DenseNet

PATIENTS, IMAGES_EACH, SIDE = 12, 2, 16
Config = dict[str, Any]


def write_images(folder: Path, *, first_patient: int = 0, patients: int = PATIENTS) -> None:
    """``p07_1.npy``: the second image of patient 7; its label is the parity of the patient's number."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(first_patient)
    for patient in range(first_patient, first_patient + patients):
        for image in range(IMAGES_EACH):
            picture = rng.normal(patient % 2, 1.0, size=(SIDE, SIDE)).astype(np.float32)
            np.save(folder / f"p{patient:02d}_{image}.npy", picture)


def _transforms(*more: Config) -> Config:
    steps = [
        {"_target_": "LoadImaged", "keys": "image"},
        {"_target_": "EnsureChannelFirstd", "keys": "image"},
        {"_target_": "ScaleIntensityd", "keys": "image"},
        *more,
        {"_target_": "EnsureTyped", "keys": "image"},
    ]
    return {"_target_": "Compose", "transforms": steps}


def nested(root: Path) -> Config:
    """A zoo classifier: everything under train and validate, sums for a loss, a fixed seed."""
    return {
        "imports": ["$import glob", "$import os", "$import torch"],
        "bundle_root": str(root),
        "ckpt_dir": "$@bundle_root + '/models'",
        "dataset_dir": "$@bundle_root + '/data'",
        "images": "$sorted(glob.glob(@dataset_dir + '/train/*.npy'))",
        "labels": "$[int(os.path.basename(name)[1:3]) % 2 for name in @images]",
        "val_images": "$sorted(glob.glob(@dataset_dir + '/val/*.npy'))",
        "val_labels": "$[int(os.path.basename(name)[1:3]) % 2 for name in @val_images]",
        "device": "$torch.device('cpu')",
        "max_epochs": 2,
        "network_def": {
            "_target_": "DenseNet", "spatial_dims": 2, "in_channels": 1, "out_channels": 2, "init_features": 8,
            "growth_rate": 4, "block_config": [2, 2],
        },
        "network": "$@network_def.to(@device)",
        "loss": {"_target_": "torch.nn.CrossEntropyLoss", "reduction": "sum"},
        "optimizer": {"_target_": "torch.optim.Adam", "params": "$@network.parameters()", "lr": 0.001},
        "train": {
            "preprocessing": _transforms(),
            "dataset": {
                "_target_": "CacheDataset",
                "data": "$[{'image': i, 'label': l} for i, l in zip(@images, @labels)]",
                "transform": "@train#preprocessing",
                "progress": False,
            },
            "dataloader": {
                "_target_": "DataLoader", "dataset": "@train#dataset", "batch_size": 4, "shuffle": True, "num_workers": 0,
            },
            "inferer": {"_target_": "SimpleInferer"},
            "handlers": [
                {"_target_": "ValidationHandler", "validator": "@validate#evaluator", "epoch_level": True, "interval": 1},
                {
                    "_target_": "StatsHandler",
                    "tag_name": "train_loss",
                    "output_transform": "$monai.handlers.from_engine(['loss'], first=True)",
                },
                {
                    "_target_": "CheckpointSaver", "save_dir": "@ckpt_dir", "save_dict": {"model": "@network"},
                    "save_final": True, "final_filename": "model.pt",
                },
            ],
            "key_metric": {
                "train_acc": {
                    "_target_": "ignite.metrics.Accuracy",
                    "output_transform": "$monai.handlers.from_engine(['pred', 'label'])",
                },
            },
            "trainer": {
                "_target_": "SupervisedTrainer",
                "max_epochs": "@max_epochs",
                "device": "@device",
                "train_data_loader": "@train#dataloader",
                "network": "@network",
                "loss_function": "@loss",
                "optimizer": "@optimizer",
                "inferer": "@train#inferer",
                "key_train_metric": "@train#key_metric",
                "train_handlers": "@train#handlers",
            },
        },
        "validate": {
            "dataset": {
                "_target_": "Dataset",
                "data": "$[{'image': i, 'label': l} for i, l in zip(@val_images, @val_labels)]",
                "transform": "%train#preprocessing",
            },
            "dataloader": {"_target_": "DataLoader", "dataset": "@validate#dataset", "batch_size": 4},
            "handlers": [
                {"_target_": "StatsHandler", "iteration_log": False},
                {
                    "_target_": "CheckpointSaver", "save_dir": "@ckpt_dir", "save_dict": {"model": "@network"},
                    "save_key_metric": True, "key_metric_filename": "best.pt",
                },
            ],
            "evaluator": {
                "_target_": "SupervisedEvaluator",
                "device": "@device",
                "val_data_loader": "@validate#dataloader",
                "network": "@network",
                "inferer": {"_target_": "SimpleInferer"},
                "postprocessing": {"_target_": "Activationsd", "keys": "pred", "softmax": True},
                "key_val_metric": {
                    "loss": {
                        "_target_": "ignite.metrics.Loss",
                        "loss_fn": "$lambda pred, label: torch.mean(pred)",
                        "output_transform": "$lambda rows: (torch.stack([r['pred'] for r in rows]), torch.zeros(len(rows)))",
                    },
                },
                "val_handlers": "@validate#handlers",
            },
        },
        "initialize": ["$monai.utils.set_determinism(seed=123)"],
        "run": ["$@train#trainer.run()"],
    }  # fmt: skip


def flat(root: Path) -> Config:
    """An older layout: everything at the top, class weights, no validation, ``initialize`` missing."""
    whole = nested(root)
    config = {
        name: whole[name]
        for name in ("imports", "bundle_root", "ckpt_dir", "dataset_dir", "images", "labels", "device", "max_epochs")
    }
    return config | {
        "net": {
            "_target_": "Classifier", "in_shape": [1, SIDE, SIDE], "classes": 2, "channels": [4, 8], "strides": [2, 2],
            "norm": "BATCH",
        },
        "lossfn": {"_target_": "torch.nn.CrossEntropyLoss", "weight": "$torch.tensor([1.0, 3.0])"},
        "opt": {"_target_": "torch.optim.SGD", "params": "$@net.parameters()", "lr": 0.01},
        "preprocessing": _transforms(
            {"_target_": "NormalizeIntensityd", "keys": "image", "subtrahend": 0.4, "divisor": 0.2}
        ),
        "train_ds": {
            "_target_": "Dataset",
            "data": "$[{'image': i, 'label': l} for i, l in zip(@images, @labels)]",
            "transform": "@preprocessing",
        },
        "train_loader": {"_target_": "DataLoader", "dataset": "@train_ds", "batch_size": 4, "shuffle": True},
        "train_handlers": [
            {
                "_target_": "CheckpointSaver", "save_dir": "@ckpt_dir", "save_dict": {"model": "@net"},
                "save_final": True, "final_filename": "model.pt",
            },
        ],
        "trainer": {
            "_target_": "monai.engines.SupervisedTrainer",
            "max_epochs": "@max_epochs",
            "device": "@device",
            "train_data_loader": "@train_loader",
            "network": "@net",
            "loss_function": "@lossfn",
            "optimizer": "@opt",
            "train_handlers": "@train_handlers",
        },
        "run": ["$@trainer.run()"],
    }  # fmt: skip


INFERENCE: Config = {
    "imports": ["$import glob", "$import torch"],
    "device": "$torch.device('cpu')",
    "network_def": nested(Path())["network_def"],
    "network": "$@network_def.to(@device)",
    "ckpt_dir": "$@bundle_root + '/models'",
    "preprocessing": _transforms(),
    "dataset": {
        "_target_": "Dataset",
        "data": "$[{'image': i} for i in sorted(glob.glob(@bundle_root + '/data/val/*.npy'))]",
        "transform": "@preprocessing",
    },
    "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1},
    "handlers": [
        {"_target_": "CheckpointLoader", "load_path": "$@ckpt_dir + '/model.pt'", "load_dict": {"model": "@network"}}
    ],
    "evaluator": {
        "_target_": "SupervisedEvaluator",
        "device": "@device",
        "val_data_loader": "@dataloader",
        "network": "@network",
        "inferer": {"_target_": "SimpleInferer"},
        "val_handlers": "@handlers",
    },
    "run": ["$@evaluator.run()"],
}


#: Comes after the nested bundle's training config, and changes things inside of it.
EVALUATE: Config = {
    "validate#handlers": [
        {"_target_": "CheckpointLoader", "load_path": "$@ckpt_dir + '/model.pt'", "load_dict": {"model": "@network"}}
    ],
    "initialize": ["$monai.utils.set_determinism(seed=123)"],
    "run": ["$@validate#evaluator.run()"],
}


MULTI_GPU: Config = {
    "+imports": ["$import torch.distributed as dist"],
    "network": {
        "_target_": "torch.nn.parallel.DistributedDataParallel",
        "module": "$@network_def.to(@device)",
    },
    "train#sampler": {
        "_target_": "DistributedSampler", "dataset": "@train#dataset", "even_divisible": True, "shuffle": True,
    },
    "train#dataloader#sampler": "@train#sampler",
    "train#dataloader#shuffle": False,
    "train#trainer#train_handlers": "$@train#handlers[: -2 if dist.get_rank() > 0 else None]",
    "validate#sampler": {
        "_target_": "DistributedSampler", "dataset": "@validate#dataset", "even_divisible": False, "shuffle": False,
    },
    "validate#dataloader#sampler": "@validate#sampler",
    "validate#evaluator#val_handlers": "$None if dist.get_rank() > 0 else @validate#handlers",
    "initialize": ["$dist.init_process_group(backend='gloo')", "$monai.utils.set_determinism(seed=123)"],
    "finalize": ["$dist.destroy_process_group()"],
}  # fmt: skip


def write_bundle(
    root: Path,
    make: Callable[[Path], Config] = nested,
    *,
    suffix: str = ".json",
    change: Callable[[Config], object] = lambda config: None,
) -> Path:
    """A bundle's folder, with images."""
    write_images(root / "data" / "train")
    write_images(root / "data" / "val", first_patient=50, patients=4)
    (root / "configs").mkdir()
    config = make(root)
    change(config)
    for name, content in (
        ("train", config), ("inference", {"bundle_root": str(root)} | INFERENCE), ("multi_gpu_train", MULTI_GPU)
    ):  # fmt: skip
        text = json.dumps(content, indent=4) if suffix == ".json" else yaml.safe_dump(content, sort_keys=False)
        (root / "configs" / f"{name}{suffix}").write_text(text, encoding="utf-8")
    (root / "configs" / "metadata.json").write_text('{"version": "0.1.0"}', encoding="utf-8")
    return root


def pretrained(root: Path) -> Path:
    """Weights of the nested bundle's network whose batch norms have seen (public) data."""
    torch.manual_seed(0)
    arguments = {key: value for key, value in nested(root)["network_def"].items() if key != "_target_"}
    network = DenseNet(**arguments)
    network.train()
    for _ in range(3):
        network(torch.randn(8, 1, SIDE, SIDE) + 0.5)
    path = root / "models" / "model.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": network.state_dict()}, path)
    return path
