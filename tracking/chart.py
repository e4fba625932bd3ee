"""Line charts as inline SVG, drawn twice: on a linear and, where it can be, on a logarithmic axis."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise

_WIDTH, _HEIGHT = 640, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 12, 34
_MOST_POINTS = 1000
_MARKED_POINTS = 60
_MEANS = 150
# Beyond these, powers of ten are no floats.
_LEAST, _MOST = 1e-300, 1e300

#: A point of a curve: optimizer step, and value; NaN is a gap.
Point = tuple[int, float]


@dataclass
class Series:
    """One metric over the run: ``steps`` ascending, one value each; what is not finite, or as good as, is a gap."""

    name: str
    steps: array[int] = field(default_factory=lambda: array("q"))
    values: array[float] = field(default_factory=lambda: array("d"))
    not_finite: int = 0

    def add(self, step: int, value: float) -> None:
        if not abs(value) < _MOST:
            self.not_finite += 1
            value = math.nan
        self.steps.append(step)
        self.values.append(value)

    def finite(self) -> list[float]:
        return [value for value in self.values if value == value]

    def last(self) -> float:
        """The last value, NaN when that is not finite."""
        return self.values[-1]


@dataclass(frozen=True)
class Axis:
    """The visible range of values, and how a value is mapped before it is placed in it."""

    name: str
    low: float
    high: float
    ticks: tuple[float, ...]
    scale: Callable[[float], float]

    def place(self, value: float) -> float:
        """Where ``value`` lies, from 0 at the low end to 1 at the high end; NaN where it cannot be shown."""
        if not (math.isfinite(value) and (self.name == "linear" or value > 0)):
            return math.nan
        low, high = self.scale(self.low), self.scale(self.high)
        return (self.scale(value) - low) / (high - low)


def thin(series: Series, most: int = _MOST_POINTS) -> list[Point]:
    """At most about ``most`` points of a series: of each stretch its smallest and its largest value, in order."""
    points = list(zip(series.steps, series.values, strict=True))
    if len(points) <= most:
        return points
    stretch = math.ceil(2 * len(points) / most)
    thinned: list[Point] = []
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        finite = [point for point in part if point[1] == point[1]]
        if finite:
            thinned += sorted({min(finite, key=lambda point: point[1]), max(finite, key=lambda point: point[1])})
        else:
            thinned.append(part[0])
    return thinned


def smooth(series: Series, most: int = _MEANS) -> list[Point]:
    """The means of about ``most`` stretches of a series, each at its middle step; none where the series is no noisier.

    Noisier means that its thinned curve goes three times as far up and down as the means do.
    """
    stretch = len(series.values) // most
    if stretch < 2:
        return []
    means: list[Point] = []
    for start in range(0, len(series.values), stretch):
        finite = [value for value in series.values[start : start + stretch] if value == value]
        middle = series.steps[min(start + stretch // 2, len(series.steps) - 1)]
        means.append((middle, math.fsum(finite) / len(finite) if finite else math.nan))
    return means if _travel(thin(series)) > 3 * _travel(means) else []


def draw(title: str, series: Sequence[Series], *, colors: Sequence[int], key: str) -> str:
    """A figure: legend with the last values, toggle for the logarithmic axis, curves, and the points for the reader.

    Args:
        series: those with at least one finite value are drawn.
        colors: index into the page's palette, one for each series.
        key: an HTML id that no other figure of the page has.
    """
    curves = [thin(one) for one in series]
    means = [smooth(one) for one in series]
    values = [value for curve in curves for _, value in curve if value == value]
    steps = _step_axis(series)
    axes = [_linear_axis(values)]
    if _LEAST < min(values) < max(values) < _MOST:
        axes.append(_log_axis(values))
    toggle = ""
    if len(axes) > 1:
        toggle = f'<input type="checkbox" id="{key}-log" class="log-toggle"><label for="{key}-log">log</label>'
    legend = "".join(
        f'<li class="c{color}"><span class="name">{escape(one.name)}</span> <b>{number(one.last())}</b></li>'
        for one, color in zip(series, colors, strict=True)
    )
    layers = "".join(_layer(axis, steps, curves, means, colors) for axis in axes)
    data = {
        "box": [_LEFT, _WIDTH - _RIGHT, _TOP, _HEIGHT - _BOTTOM],
        "steps": [steps.low, steps.high],
        "axes": {axis.name: [axis.low, axis.high] for axis in axes},
        "curves": [[[step, None if value != value else value] for step, value in curve] for curve in curves],
    }
    return (
        f'<figure id="{key}"><figcaption>{escape(title)}</figcaption>{toggle}<ul class="legend">{legend}</ul>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)} over steps">'
        f"{_step_labels(steps)}{layers}"
        f'<line class="cursor" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/></svg>'
        f'<script type="application/json">{_json(data)}</script></figure>'
    )


def number(value: float) -> str:
    """A value as people read it: four significant digits, or whole where it is large, and an exponent if very large."""
    if value != value:
        return "NaN"
    if 1e3 <= abs(value) < 1e9 or (abs(value) < 1e3 and value == int(value)):
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _travel(curve: Sequence[Point]) -> float:
    values = [value for _, value in curve if value == value]
    return math.fsum(abs(b - a) for a, b in pairwise(values))


def _layer(
    axis: Axis, steps: Axis, curves: Sequence[list[Point]], means: Sequence[list[Point]], colors: Sequence[int]
) -> str:
    grid = "".join(
        f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>'
        f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_tick(tick)}</text>'
        for tick in axis.ticks
        if (y := _y(axis.place(tick))) == y
    )
    paths = "".join(
        f'<path class="curve c{color}{" noisy" if mean else ""}" d="{_path(curve, axis, steps)}"/>'
        + (f'<path class="curve c{color}" d="{_path(mean, axis, steps)}"/>' if mean else "")
        + (_marks(curve, axis, steps, color) if len(curve) <= _MARKED_POINTS else "")
        for curve, mean, color in zip(curves, means, colors, strict=True)
    )
    return f'<g class="{axis.name}">{grid}{paths}</g>'


def _path(curve: Sequence[Point], axis: Axis, steps: Axis) -> str:
    parts: list[str] = []
    pen = "M"
    for x, y in _pixels(curve, axis, steps):
        if y != y:
            pen = "M"
            continue
        # A line of no length has round ends all the same: a value between two gaps is seen.
        parts.append(f"{pen}{x:.1f} {y:.1f}" + ("h0" if pen == "M" else ""))
        pen = "L"
    return "".join(parts)


def _marks(curve: Sequence[Point], axis: Axis, steps: Axis, color: int) -> str:
    return "".join(
        f'<circle class="c{color}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in _pixels(curve, axis, steps) if y == y
    )


def _pixels(curve: Sequence[Point], axis: Axis, steps: Axis) -> Iterator[tuple[float, float]]:
    for step, value in curve:
        yield _x(steps.place(step)), _y(axis.place(value))


def _x(share: float) -> float:
    return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)


def _y(share: float) -> float:
    return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)


def _step_labels(steps: Axis) -> str:
    labels = "".join(
        f'<text x="{_x(steps.place(tick)):.1f}" y="{_HEIGHT - 16}" text-anchor="middle">{_tick(tick)}</text>'
        for tick in steps.ticks
    )
    return f'{labels}<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 3}" text-anchor="end">step</text>'


def _step_axis(series: Sequence[Series]) -> Axis:
    low, high = min(one.steps[0] for one in series), max(one.steps[-1] for one in series)
    if low == high:
        return Axis("linear", low - 1, high + 1, (low,), float)
    ticks = tuple(tick for tick in _nice_ticks(low, high, 6) if tick == int(tick))
    return Axis("linear", low, high, ticks, float)


def _linear_axis(values: Sequence[float]) -> Axis:
    low, high = min(values), max(values)
    margin = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    low, high = low - margin, high + margin
    return Axis("linear", low, high, tuple(_nice_ticks(low, high, 5)), float)


def _log_axis(values: Sequence[float]) -> Axis:
    low, high = min(values) / 1.15, max(values) * 1.15
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = math.ceil(len(decades) / 7)
    ticks = [10.0**decade for decade in decades[::every] if low <= 10.0**decade <= high]
    if len(ticks) < 3:
        ticks = [digit * 10.0**decade for decade in decades for digit in (1, 2, 5)]
    if sum(low <= tick <= high for tick in ticks) < 2:
        ticks = [tick for tick in _nice_ticks(low, high, 4) if tick > 0]
    return Axis("log", low, high, tuple(tick for tick in ticks if low <= tick <= high), math.log10)


def _nice_ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers from ``low`` to ``high``: multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / about
    if not _LEAST < rough < _MOST:
        return [low]
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * digit for digit in (1, 2, 5, 10) if power * digit >= rough)
    first = math.ceil(low / step)
    return [count * step for count in range(first, first + 2 * about + 2) if count * step <= high]


def _tick(value: float) -> str:
    size = abs(value)
    if size >= 1e6 or (0 < size < 1e-3):
        mantissa, _, exponent = f"{value:.3g}".partition("e")
        return f"{mantissa}e{int(exponent)}" if exponent else mantissa
    return f"{value:,.6g}" if size < 1e4 else f"{value / 1000:,.6g}k"


def _json(data: object) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
