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

"""Seconds of whole epochs of the chest X-ray bundle, with and without privacy: loader, handlers and ε included.

python -m benchmarks.epoch --data kermany_xray_96.npz
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events

from monai_privacy.bundle import train_bundle
from monai_privacy.data import read_chest_xrays, write_datalist, write_synthetic_chest_xrays

BUNDLES = Path(__file__).parents[1] / "bundles"
ROOT = BUNDLES / "chest_xray_classification"


class EpochTimes:
    """A handler that notes the seconds of each epoch."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def attach(self, engine: Engine) -> None:
        """Hear where epochs begin and end; handlers that were attached before are inside."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._begin)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._end)

    def _begin(self) -> None:
        self._start = time.perf_counter()

    def _end(self) -> None:
        self.seconds.append(time.perf_counter() - self._start)


def epochs(configs: Sequence[Path], data: Path, output: Path, number: int, **changes: Any) -> list[float]:
    """Seconds of each epoch of one training, without validation."""
    times = EpochTimes()
    common = {"bundle_root": str(ROOT), "dataset_dir": str(data), "output_dir": str(output), "seed": 0}
    train_bundle(configs, common | {"epochs": number, "val_interval": number + 1, **changes}, handlers=[times])
    return times.seconds


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="X-rays with patients; SYNTHETIC ones where not given")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3, help="trainings of each kind, in turns")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = options.data or write_synthetic_chest_xrays(folder / "synthetic", num_patients=900)
        write_datalist(read_chest_xrays(images), folder / "data", seed=0)
        ratios = []
        for number in range(options.rounds):
            plain = epochs([ROOT / "configs" / "train.yaml"], folder / "data", folder / "plain", options.epochs)
            private = epochs(
                [ROOT / "configs" / "train.yaml", BUNDLES / "overlays" / "dp_sgd.yaml"],
                folder / "data", folder / "private", options.epochs, epsilon=3.0,
                ledger_file=str(folder / f"ledger_{number}.jsonl"),
            )  # fmt: skip
            for kind, seconds in (("without privacy", plain), ("private", private)):
                print(f"{kind:16s} {' '.join(f'{one:.2f}' for one in seconds)}", flush=True)
            # In the first two the network is probed and methods are tried.
            ratios.append(statistics.median(private[2:]) / statistics.median(plain[2:]))
    print(f"private over plain, from the third epoch on: {' '.join(f'{one:.2f}' for one in ratios)}")


if __name__ == "__main__":
    main()
