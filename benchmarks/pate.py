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

"""Time and memory of votes and of what they cost, at the size of a large consortium.

    python -m benchmarks.pate [--reference <tensorflow/privacy>/research/pate_2018]

Writes results/pate.json and prints a table. 250 teachers, 10,000 queries, 14 labels or 10 classes, made up. Each task runs
in a process of its own, whose peak of memory above the imports is taken; the median of ``--repeats`` runs counts. With
``--reference``, the published analysis of the same votes (Papernot et al. 2018, not part of this project) runs beside
ours: the data-dependent bound of every query at its own orders, and the smooth sensitivity of the first 200 queries.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.held_out import machine

RESULTS = Path(__file__).parent / "results" / "pate.json"
TEACHERS, QUERIES, LABELS, CLASSES = 250, 10_000, 14, 10
ORDERS = np.concatenate([np.arange(2, 100, 0.5), np.logspace(2, 3, 100)])
NOISE, ORDER = 40.0, 20.0
SMOOTH_QUERIES = 200


def class_votes() -> np.ndarray:
    """Counts (queries, classes): most queries nearly unanimous, some split."""
    rng = np.random.default_rng(0)
    certainty = rng.beta(6, 1, QUERIES)
    chances = (1 - certainty)[:, None] / CLASSES + certainty[:, None] * np.eye(CLASSES)[
        rng.integers(CLASSES, size=QUERIES)
    ]
    return np.stack([rng.multinomial(TEACHERS, row) for row in chances])


def votes_on_labels() -> None:
    """Scores of one teacher after another become counts of 14 labels, at most two yes each."""
    import torch

    from monai_privacy.mechanisms.voting import limit_positives

    total = torch.zeros(QUERIES, LABELS, dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    for _ in range(TEACHERS):
        total += limit_positives(torch.rand(QUERIES, LABELS, generator=generator), 0.5, 2)


def answers_on_labels() -> None:
    """All 10,000 queries answered: charged, drawn, remembered."""
    import torch

    from monai_privacy.accounting.ledger import PrivacyLedger
    from monai_privacy.mechanisms.voting import LabelVoting
    from monai_privacy.pate.labelling import VoteLabeller

    votes = torch.randint(0, 40, (QUERIES, LABELS), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        labeller = VoteLabeller(
            LabelVoting(200.0, LABELS, 2), PrivacyLedger(Path(folder) / "ledger.jsonl"), num_teachers=TEACHERS,
            answers=Path(folder) / "answers.jsonl", max_queries=QUERIES, delta=1e-5,
        )  # fmt: skip
        labeller.label([f"query {number}" for number in range(QUERIES)], votes)


def epsilon_of_answers() -> None:
    """ε of 10,000 questions and 7,000 answers, exact."""
    from monai_privacy.accounting import epsilon, gnmax_event, vote_threshold_event
    from monai_privacy.accounting.events import composed

    parts = [vote_threshold_event(noise_std=150.0, questions=QUERIES), gnmax_event(noise_std=NOISE, answers=7_000)]
    epsilon(composed(parts), 1e-5)


def data_dependent() -> None:
    """The data-dependent bound of every query at all orders."""
    from monai_privacy.accounting.vote_costs import gnmax_log_q, gnmax_rdp

    gnmax_rdp(gnmax_log_q(class_votes(), NOISE), NOISE, ORDERS).sum(axis=0)


def smooth() -> None:
    """Smooth sensitivity of some queries."""
    from monai_privacy.accounting.vote_sensitivity import gnmax_local_sensitivity, smooth_sensitivity

    smooth_sensitivity(gnmax_local_sensitivity(class_votes()[:SMOOTH_QUERIES], TEACHERS, NOISE, ORDER), 0.02)


def reference_data_dependent(folder: Path) -> None:
    """The same by the published script."""
    core = _module(folder / "core.py", "core")
    total = np.zeros(len(ORDERS))
    for row in class_votes():
        total += core.rdp_gaussian(core.compute_logq_gaussian(row, NOISE), NOISE, ORDERS)


def reference_smooth(folder: Path) -> None:
    """The same by the published script."""
    _module(folder / "core.py", "core")
    published = _module(folder / "smooth_sensitivity.py", "smooth_sensitivity")
    total = np.zeros(TEACHERS)
    for row in class_votes()[:SMOOTH_QUERIES]:
        total += published.compute_local_sensitivity_bounds_gnmax(row, TEACHERS, NOISE, ORDER)
    published.compute_discounted_max(0.02, total)


def _module(path: Path, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is no Python file. Name the folder of the published scripts.")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _child(task: Callable[..., None], arguments: tuple[Any, ...], warm: Callable[[], None], pipe: Any) -> None:
    warm()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    task(*arguments)
    pipe.send((time.perf_counter() - start, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024))


def _imports() -> None:
    import torch

    for name in ("scipy.stats", "monai_privacy.accounting.vote_sensitivity", "monai_privacy.pate.labelling"):
        importlib.import_module(name)
    torch.set_num_threads(1)


def measured(task: Callable[..., None], *arguments: Any) -> tuple[float, float]:
    """Seconds, and megabytes above the imports."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(task, arguments, _imports, there))
    process.start()
    there.close()
    found: tuple[float, float] = here.recv()
    process.join()
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, help="folder of the published scripts, research/pate_2018")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    tasks: list[tuple[str, Callable[..., None], tuple[Any, ...]]] = [
        (f"votes of {TEACHERS} teachers on {QUERIES} queries with {LABELS} labels", votes_on_labels, ()),
        (f"{QUERIES} queries with {LABELS} labels answered, on the disk", answers_on_labels, ()),
        ("exact ε of 10,000 questions and 7,000 answers", epsilon_of_answers, ()),
        (f"data-dependent bound, {QUERIES} queries, {len(ORDERS)} orders", data_dependent, ()),
        (f"smooth sensitivity, {SMOOTH_QUERIES} queries", smooth, ()),
    ]
    if options.reference is not None:
        where = (options.reference.absolute(),)
        tasks += [
            ("published script: the same data-dependent bound", reference_data_dependent, where),
            ("published script: the same smooth sensitivity", reference_smooth, where),
        ]
    console, rows = Console(), []
    console.print("| | median s | MB above imports |\n|---|---|---|", soft_wrap=True)
    for name, task, arguments in tasks:
        runs = [measured(task, *arguments) for _ in range(options.repeats)]
        seconds, megabytes = (statistics.median(values) for values in zip(*runs, strict=True))
        rows.append({"task": name, "seconds": seconds, "megabytes": megabytes})
        console.print(f"| {name} | {seconds:.2f} | {megabytes:.0f} |", soft_wrap=True)
    RESULTS.write_text(json.dumps(machine("python -m benchmarks.pate", 1) | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
