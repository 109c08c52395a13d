"""Charts of rows, as HTML with SVG: a label, a track with bars, and a value. A chart takes any list of rows.

Horizontal positions are percentages of the track, and letters have a size of their own. Therefore a chart has the width
of its page on a phone, on a screen and on paper. Colors are classes, which the page defines for light and dark.
"""

import html
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_MOST_TICKS = 7
_SMALLEST = 1.0  # percent: an axis of less would make noise look large


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A row of `difference_chart`, in percent.

    Args:
        kind: The class of its color, such as `"lowered"`.
        interval: Of the value, `(low, high)`.
        control: The interval that the same measurement gives for two equal sides.
        is_real: Whether the difference is larger than the control; the bar of another one is pale.
        reference: A value to mark, such as the paper's.
    """

    label: str
    kind: str
    value: float
    interval: tuple[float, float]
    control: tuple[float, float]
    is_real: bool = True
    reference: float | None = None


@dataclass(frozen=True, kw_only=True)
class Stack:
    """A row of `stack_chart`: two bars of parts, before and after, with a text.

    Args:
        before, after: `{part: value}`, in the order of the parts.
    """

    label: str
    before: Mapping[str, float]
    after: Mapping[str, float]
    value: str
    remark: str = ""


def difference_chart(rows: Sequence[Difference]) -> str:
    """Bars from zero, each with its interval as a line and its control as an area."""
    values = [x for row in rows for x in (row.value, *row.interval, *row.control, row.reference or 0.0)]
    low, high = min(0.0, *values), max(0.0, *values)
    high = max(high, low + _SMALLEST)
    axis = _Axis(low=low - 0.03 * (high - low), high=high + 0.03 * (high - low))
    ticks = _ticks(low, high)
    lines = [_row(row.label, _percent(row.value), _range(*row.interval), _difference(row, axis, ticks)) for row in rows]
    digits = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9))
    numbers = (
        f'<text x="{axis(tick)}" y="70%">{typeset(f"{tick:+.{digits}f} %") if tick else 0}</text>' for tick in ticks
    )
    return f'<div class="chart">{"".join(lines)}{_row("", "", "", "".join(numbers), kind="axis")}</div>'


def stack_chart(rows: Sequence[Stack]) -> str:
    """For each row a thin bar, before, and below it a thick one, after: each a stack of parts."""
    totals = [sum(side.values()) for row in rows for side in (row.before, row.after)]
    axis = _Axis(low=0.0, high=max(*totals, 1e-9))
    lines = (
        _row(row.label, row.value, row.remark, _stack(row.before, axis, 12, 18) + _stack(row.after, axis, 38, 46))
        for row in rows
    )
    return f'<div class="chart">{"".join(lines)}</div>'


def legend(entries: Mapping[str, str]) -> str:
    """The key of a chart: `{class of the sign: its meaning}`."""
    signs = (f'<span><i class="{kind}"></i>{html.escape(text)}</span>' for kind, text in entries.items())
    return f'<p class="legend">{" ".join(signs)}</p>'


def typeset(text: str) -> str:
    """HTML of a text: numbers have the minus sign of print, and stay with their percent sign."""
    return re.sub(r"(?<!\w)-(?=\d)", "\N{MINUS SIGN}", html.escape(text)).replace(" %", "\N{NO-BREAK SPACE}%")


@dataclass(frozen=True, kw_only=True)
class _Axis:
    """From a value to its position on the track."""

    low: float
    high: float

    def __call__(self, value: float) -> str:
        return self.width(value - self.low)

    def width(self, length: float) -> str:
        return f"{100 * length / (self.high - self.low):.2f}%"


def _ticks(low, high):
    """Round values from `low` to `high`, with zero among them, at most `_MOST_TICKS`."""
    power = 10.0 ** math.floor(math.log10((high - low) / _MOST_TICKS))
    step = next(step for step in (power, 2 * power, 5 * power, 10 * power) if (high - low) / step < _MOST_TICKS)
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _difference(row, axis, ticks):
    marks = [_area("control", axis, *row.control, top=0, height=100)]
    marks += [_line("zero" if tick == 0 else "grid", axis(tick), axis(tick), 0, 100) for tick in ticks]
    kind = f"bar {row.kind}" if row.is_real else f"bar {row.kind} unreal"
    marks.append(_area(kind, axis, *sorted((0.0, row.value)), top=26, height=48))
    if row.reference is not None:
        marks.append(_line("reference", axis(row.reference), axis(row.reference), 0, 100))
    low, high = map(axis, row.interval)
    ends = (_line("interval", end, end, 36, 64) for end in (low, high))
    return "".join([*marks, _line("interval", low, high, 50, 50), *ends])


def _stack(parts, axis, top, height):
    marks, start = [], 0.0
    for part, value in parts.items():
        if value:
            marks.append(_area(f"part {part}", axis, start, start + value, top=top, height=height))
        start += value
    return "".join(marks)


def _row(label, value, remark, marks, *, kind="row"):
    return (
        f'<div class="{kind}"><span class="label">{html.escape(label)}</span>'
        f'<span class="value"><b>{typeset(value)}</b> <small>{typeset(remark)}</small></span>'
        f'<div class="track"><svg aria-hidden="true">{marks}</svg></div></div>'
    )


def _area(kind, axis, low, high, *, top, height):
    place = f'x="{axis(low)}" width="{axis.width(high - low)}" y="{top}%" height="{height}%"'
    return f'<rect class="{kind}" {place}/>'


def _line(kind, x1, x2, y1, y2):
    return f'<line class="{kind}" x1="{x1}" x2="{x2}" y1="{y1}%" y2="{y2}%"/>'


def _percent(value):
    return f"{value:+.1f} %"


def _range(low, high):
    return f"{_percent(low)} to {_percent(high)}" if high - low > 1e-3 else "exact"  # as counts are
