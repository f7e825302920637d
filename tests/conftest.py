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

"""What several tests share: small data, small networks, one thread."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

# Tests run side by side: threads of one would wait for those of the other. Processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fast tests first; then the slow ones, longest first, so that no process waits for another one's last test."""

    def place(item: pytest.Item) -> tuple[bool, float]:
        slow = item.get_closest_marker("slow")
        return slow is not None, -float(slow.kwargs.get("seconds", 10)) if slow else 0.0

    items.sort(key=place)


def make_records(*, patients: int, images: int = 2, side: int = 8, spatial_dims: int = 2) -> list[dict]:
    """Records of ``patients`` patients with ``images`` images each, of noise whose mean tells the label."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, *[side] * spatial_dims)
    return [
        {
            "image": torch.randn(shape, generator=generator) + (patient % 2),
            "label": patient % 2,
            "patient_id": f"patient-{patient}",
        }
        for patient in range(patients)
        for _ in range(images)
    ]


def make_network(spatial_dims: int = 2, side: int = 8) -> nn.Module:
    """A convolution, an in-place activation, a group norm and a linear head."""
    convolution = nn.Conv2d if spatial_dims == 2 else nn.Conv3d
    torch.manual_seed(0)
    return nn.Sequential(
        convolution(1, 4, 3, stride=2, padding=1),
        nn.GroupNorm(2, 4),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(4 * (side // 2) ** spatial_dims, 2),
    )


@pytest.fixture
def records() -> list[dict]:
    return make_records(patients=20)


@pytest.fixture
def network() -> nn.Module:
    return make_network()


@pytest.fixture
def real_data() -> Path:
    """The folder of real images; a test that needs it is skipped where there is none."""
    folder = os.environ.get("MONAI_PRIVACY_DATA")
    if not folder:
        pytest.skip("MONAI_PRIVACY_DATA does not name a folder of real images")
    return Path(folder)


def make_trainer(
    ledger: object,
    *,
    records: list[dict] | None = None,
    network: nn.Module | None = None,
    plan: object | None = None,
    transform: object = None,
    learning_rate: float = 0.1,
    max_epochs: int = 2,
    loss_function: object = None,
    batch_size: int = 4,
    **options: object,
):
    """A private trainer on small data; ``ledger`` is a ledger or the path of one."""
    from monai.data import DataLoader, Dataset
    from monai.transforms import EnsureTyped

    from monai_privacy import DPSGDPlan, DPSupervisedTrainer, PrivacyLedger

    records = make_records(patients=20) if records is None else records
    network = make_network() if network is None else network
    if plan is None:
        plan = DPSGDPlan.for_epochs(
            num_patients=20, expected_batch_size=5, epochs=max_epochs, delta=1e-3, noise_multiplier=1.0
        )
    settings = {
        "device": "cpu",
        "max_epochs": max_epochs,
        "train_data_loader": DataLoader(Dataset(records, transform or EnsureTyped("image")), batch_size=batch_size),
        "network": network,
        "optimizer": torch.optim.SGD(network.parameters(), learning_rate),
        "loss_function": loss_function or nn.CrossEntropyLoss(),
    }
    if not isinstance(ledger, PrivacyLedger):
        ledger = PrivacyLedger(ledger)
    return DPSupervisedTrainer(plan=plan, ledger=ledger, **(settings | options))


def weights(network: nn.Module) -> torch.Tensor:
    """All parameters as one detached copy."""
    return torch.cat([p.detach().reshape(-1) for p in network.parameters()]).clone()
