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

"""Two processes make one private step: one draw, one noise, one ledger line."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import make_network, make_records, make_trainer, weights
from scipy import stats

from monai_privacy import PrivacyLedger
from monai_privacy.distributed import ProcessGroup

FALSE_ALARM = 1e-7
PREAMBLE = f"""
import sys, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from conftest import make_network, make_records, make_trainer, weights
from test_engines import NoGradient, everybody
from monai_privacy import DPSGDPlan
dist.init_process_group("gloo")
rank, folder = dist.get_rank(), Path(sys.argv[1])
"""


def run_two(script: str, folder: Path, *, fails: bool = False) -> None:
    """Run ``script`` in two processes under torchrun."""
    path = folder / "script.py"
    path.write_text(PREAMBLE + textwrap.dedent(script) + "\ndist.destroy_process_group()\n", encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(path),
        str(folder),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert (done.returncode != 0) == fails, done.stderr[-3000:]


@pytest.mark.slow(seconds=20)
def test_noise_is_added_once_and_weights_agree_and_empty_shares_stay_in_step(tmp_path):
    run_two(
        """
        network = DistributedDataParallel(NoGradient())
        plan = DPSGDPlan(num_patients=20, expected_batch_size=2, steps=4, delta=1e-3, noise_multiplier=1.5)
        before = weights(network)
        trainer = make_trainer(folder / "ledger", network=network, plan=plan, learning_rate=1.0, max_epochs=1,
                               epoch_length=4)
        trainer.run()
        torch.save(before - weights(network), folder / f"rank{rank}.pt")
        """,
        tmp_path,
    )
    moved = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    assert torch.equal(*moved)
    (entry,) = PrivacyLedger(tmp_path / "ledger").entries
    assert entry.steps == 4
    # Four steps at rate 1, each of noise 1.5 * C / 2: twice the variance would mean that both processes added noise.
    statistic = float((moved[0].double() / (1.5 / 2 * 2)).square().sum())
    count = moved[0].numel()
    assert 2 * min(stats.chi2.cdf(statistic, count), stats.chi2.sf(statistic, count)) > FALSE_ALARM


@pytest.mark.slow(seconds=20)
def test_the_step_is_that_of_one_process(tmp_path):
    run_two(
        """
        network = DistributedDataParallel(make_network())
        before = weights(network)
        make_trainer(folder / "ledger", network=network, plan=everybody(20), learning_rate=1.0, max_epochs=1).run()
        torch.save(before - weights(network), folder / f"rank{rank}.pt")
        """,
        tmp_path,
    )
    from test_engines import everybody

    network = make_network()
    before = weights(network)
    make_trainer(
        tmp_path / "alone", network=network, plan=everybody(20), learning_rate=1.0, max_epochs=1,
        records=make_records(patients=20),
    ).run()  # fmt: skip
    torch.testing.assert_close(torch.load(tmp_path / "rank1.pt"), before - weights(network), rtol=1e-3, atol=1e-6)


@pytest.mark.slow(seconds=20)
def test_refusals_reach_every_process(tmp_path):
    run_two(
        """
        def tell(kind, error):  # a file each: the lines of two processes may mix on one standard output
            (folder / f"{kind}{rank}.txt").write_text(str(error))

        records = make_records(patients=20)[rank * 20 : rank * 20 + 20]
        try:
            make_trainer(folder / "ledger", records=records)
        except ValueError as error:
            tell("refused", error)
        from monai_privacy import PrivacyBudget, PrivacyBudgetError, PrivacyLedger
        plan = everybody(20, steps=2, noise_multiplier=1.0)
        ledger = PrivacyLedger(folder / "small", budget=PrivacyBudget(plan.epsilon(steps=1) * 0.5, 1e-3))
        try:
            make_trainer(ledger, plan=plan).run()
        except PrivacyBudgetError as error:
            tell("budget", error)
        """,
        tmp_path,
    )
    for rank in (0, 1):
        assert (tmp_path / f"refused{rank}.txt").read_text().startswith("the 2 processes have different datasets")
        assert "is spent" in (tmp_path / f"budget{rank}.txt").read_text()


@pytest.mark.slow(seconds=20)
def test_a_report_that_only_the_first_process_writes_holds_nobody_up(tmp_path):
    run_two(
        """
        from monai_privacy import PrivacyReportHandler
        network = DistributedDataParallel(make_network())
        plan = DPSGDPlan(num_patients=20, expected_batch_size=5, steps=4, delta=1e-3, noise_multiplier=1.5)
        trainer = make_trainer(folder / "ledger", network=network, plan=plan, max_epochs=1)
        if rank == 0:
            PrivacyReportHandler(str(folder / "report")).attach(trainer)
        trainer.run()
        dist.barrier()
        """,
        tmp_path,
    )
    (entry,) = PrivacyLedger(tmp_path / "ledger").entries
    assert (entry.state, entry.steps) == ("committed", 4)
    assert "model" in entry.artifacts
    assert "committed" in (tmp_path / "report" / "privacy_report.md").read_text(encoding="utf-8")


@pytest.mark.slow(seconds=10)
@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="the turns of threads can be set on Linux alone")
def test_a_process_that_ends_right_after_we_spoke_ends_well(tmp_path):
    """No thread of gloo needs the interpreter when that is gone, also where the network holds the group to the end."""
    run_two(
        """
        import os
        from monai_privacy.distributed import ProcessGroup
        network = DistributedDataParallel(make_network())
        group = ProcessGroup.current()
        assert group.all_agree(3)
        # Other threads run only where this one waits.
        processor = {sorted(os.sched_getaffinity(0))[-rank]}
        for thread in map(int, os.listdir("/proc/self/task")):
            os.sched_setaffinity(thread, processor)
            if thread != os.getpid():
                os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))
        assert group.first_says(lambda: 4) == 4
        """,
        tmp_path,
    )


def test_gradients_are_added_up_in_one_order_of_memory(monkeypatch):
    """A sum over processes is one of memory: in one of them a gradient may lie channels-last."""
    laid = []
    monkeypatch.setattr("monai_privacy.distributed.dist.all_reduce", lambda t: laid.append((t.stride(), t.clone())))
    values = torch.arange(24.0).reshape(1, 3, 2, 4)
    found = ProcessGroup(0, 2).sum([values, values.to(memory_format=torch.channels_last)])
    assert len({stride for stride, _ in laid}) == 1
    assert all(torch.equal(one, values) for one in found)
