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


"""The report's pictures, as SVG that follows the page's colours: no library draws text that stays text."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup, escape

from monai_privacy.report.numbers import rounded_up, rounded_up_percent
from monai_privacy.report.values import PrivacyReport

_WIDTH, _HEIGHT = 560, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 20, 16, 52


def risk_picture(report: PrivacyReport) -> Markup:
    """The best attacker's true-positive rate over the false-positive rate, on a logarithmic axis below."""
    smallest = report.risk_curve[0][0]

    def x(rate: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (1 - math.log10(rate) / math.log10(smallest))

    def y(rate: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - rate)

    def path(points: Sequence[tuple[float, float]]) -> str:
        return "M" + " L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in points)

    parts = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(share):.1f}" y2="{y(share):.1f}"/>'
        )
        parts.append(f'<text class="tick" x="{_LEFT - 8}" y="{y(share) + 4:.1f}" text-anchor="end">{share:.0%}</text>')
    for power in range(round(math.log10(smallest)), 1):
        rate = 10.0**power
        parts.append(
            f'<text class="tick" x="{x(rate):.1f}" y="{_HEIGHT - _BOTTOM + 20}" text-anchor="middle">'
            f"{100 * rate:g}%</text>"
        )
    chance = [(rate, rate) for rate, _ in report.risk_curve]
    filled = path([*report.risk_curve, *reversed(chance)]) + " Z"
    parts.append(f'<path class="band" d="{filled}"/>')
    parts.append(f'<path class="chance" d="{path(chance)}"/>')
    parts.append(f'<path class="bound" d="{path(report.risk_curve)}"/>')
    for name, share in report.risk.items():
        rate = float(name)
        parts.append(f'<circle class="point" cx="{x(rate):.1f}" cy="{y(share):.1f}" r="4.5"/>')
        above = y(share) - 10 if share < 0.9 else y(share) + 20
        parts.append(
            f'<text class="label" x="{x(rate) - 8:.1f}" y="{above:.1f}" text-anchor="end">'
            f"{escape(rounded_up_percent(share))}</text>"
        )
    parts.append(f'<text class="tick" x="{x(0.9):.1f}" y="{y(0.05):.1f}" text-anchor="end">blind guessing</text>')
    parts.append(
        f'<text class="axis" x="{(_LEFT + _WIDTH - _RIGHT) / 2:.0f}" y="{_HEIGHT - 10}" text-anchor="middle">'
        f"{report.unit}s not used, wrongly suspected</text>"
    )
    parts.append(
        f'<text class="axis" transform="translate(14 {(_TOP + _HEIGHT - _BOTTOM) / 2:.0f}) rotate(-90)" '
        f'text-anchor="middle">{report.unit}s used, recognised</text>'
    )
    words = f"At most this share of the {report.unit}s used is recognised. {report.risk_in_words}"
    return _svg(_WIDTH, _HEIGHT, words, parts)


def budget_picture(report: PrivacyReport) -> Markup:
    """ε spent and reserved within the budget, or over the runs where there is no budget."""
    spent = report.epsilon or 0.0
    reserved = max(spent, report.epsilon_reserved or 0.0)
    whole = report.budget["epsilon"] if report.budget else max(reserved, 1e-9)
    width, left, top, high = 560, 2, 34, 30
    scale = (width - 2 * left) / max(whole, reserved)
    parts = [
        f'<rect class="free" x="{left}" y="{top}" width="{whole * scale:.1f}" height="{high}" rx="4"/>',
        f'<rect class="reserved" x="{left}" y="{top}" width="{reserved * scale:.1f}" height="{high}" rx="4"/>',
        f'<rect class="spent" x="{left}" y="{top}" width="{spent * scale:.1f}" height="{high}" rx="4"/>',
        f'<text class="label" x="{left}" y="{top - 12}">ε {rounded_up(spent, 2)} spent</text>',
    ]
    words = f"ε {rounded_up(spent, 2)} spent"
    if report.budget:
        words += f" of a budget of ε {whole:g}"
        parts.append(
            f'<text class="tick" x="{width - left}" y="{top - 12}" text-anchor="end">budget ε {whole:g}</text>'
        )
    if reserved > spent * 1.001:
        words += f", {rounded_up(reserved, 2)} with what open runs reserved"
        parts.append(
            f'<text class="tick" x="{left}" y="{top + high + 22}">ε {rounded_up(reserved, 2)} with what open runs reserved'
            "</text>"
        )
    return _svg(width, top + high + 30, words + ".", parts)


def _svg(width: int, height: int, words: str, parts: Sequence[str]) -> Markup:
    inside = "\n".join(parts)
    return Markup(
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(words)}" '
        f'xmlns="http://www.w3.org/2000/svg">\n{inside}\n</svg>'
    )
