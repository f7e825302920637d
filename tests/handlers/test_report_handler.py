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
"""The report's handler: kept up to date, at little cost."""

from __future__ import annotations

import pytest
from conftest import make_trainer

from monai_privacy import PrivacyReportHandler
from monai_privacy.handlers import report


@pytest.mark.parametrize(("share", "written"), [(0.0, 4), (1e9, 1)])
def test_short_epochs_do_not_each_wait_for_a_report(tmp_path, monkeypatch, share, written):
    monkeypatch.setattr(report, "_SHARE", share)
    made = []
    monkeypatch.setattr(
        PrivacyReportHandler, "_write", lambda self, engine, html: made.append((engine.state.epoch, html))
    )
    trainer = make_trainer(tmp_path / "ledger", max_epochs=4)
    PrivacyReportHandler(str(tmp_path / "report")).attach(trainer)
    trainer.run()
    assert made == [*((epoch, False) for epoch in range(1, written + 1)), (4, True)]
