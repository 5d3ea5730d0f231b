"""Plots of a report as SVG to be put into a page. Only here is matplotlib used."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable
from html import escape
from itertools import pairwise
from typing import TYPE_CHECKING, Final, NamedTuple

from privfl.reporting.numbers import plain, up
from privfl.reporting.schema import Account, Epsilon, Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Width and height in inches: a plot is as wide as a phone, so that its letters can be read there.
_SIZE: Final = (4.6, 2.75)
_INK, _LINE, _FILL, _GRID, _LIMIT = "#1f2328", "#1c4f7c", "#d3e2ef", "#d9dee3", "#8a3800"
# In the page these colours are variables, so that they change on a dark screen; the colours above
# remain where there are none.
_VARIABLES: Final = {_INK: "ink", _LINE: "line", _FILL: "fill", _GRID: "grid", _LIMIT: "limit"}
_SETTINGS: Final = {
    "svg.fonttype": "none",
    "svg.hashsalt": "privfl",
    "font.size": 9.5,
    "text.parse_math": False,
    "axes.unicode_minus": False,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "grid.color": _GRID,
    "grid.linewidth": 0.7,
}
# With more runs than this bars become steps: their numbers would not fit.
_BARS = 9


class Spent(NamedTuple):
    """What all runs up to this one cost together."""

    number: int
    epsilon: Epsilon


def after_runs(account: Account, numbers: dict[str, int]) -> list[Spent]:
    """Epsilon after each run that charged the account; where the curve is thinned out, its next
    point, which is not below the truth.
    """
    points, curve = [], account.curve
    for run in dict.fromkeys(charge.run for charge in account.charges):
        inside = [i for i, point in enumerate(curve) if point.run == run]
        if inside:
            last = inside[-1]
            exact = last + 1 == len(curve) or curve[last + 1].charge == curve[last].charge + 1
            points.append(Spent(numbers[run], curve[last if exact else last + 1].epsilon))
        elif curve:
            later = [point for point in curve if numbers[point.run] > numbers[run]]
            points.append(Spent(numbers[run], (later or curve[-1:])[0].epsilon))
    return points


def curve_plot(
    account: Account, numbers: dict[str, int], budget: float | None, site: str, key: str
) -> str:
    """Epsilon after each charge, with the places where runs begin, as one SVG element; all ids
    in it begin with ``key``.
    """
    curve = account.curve
    begins = [curve[0], *(b for a, b in pairwise(curve) if a.run != b.run)]
    text = (
        f"Epsilon is {up(curve[0].epsilon)} after charge {curve[0].charge} and {up(account.spent)} "
        f"after charge {curve[-1].charge}, the last. {_limit(budget)} Runs begin at charge: "
        f"{', '.join(str(point.charge) for point in begins)}."
    )

    def draw(axes: Axes) -> None:
        top = _frame(axes, [point.epsilon for point in curve], budget)
        charges, values = (
            [0, *(p.charge for p in curve)],
            [0.0, *(_finite(p.epsilon, top) for p in curve)],
        )
        axes.fill_between(charges, values, step="post", facecolor=_FILL, linewidth=0)
        axes.plot(charges, values, drawstyle="steps-post", color=_LINE, linewidth=1.8)
        axes.plot(charges[-1:], values[-1:], "o", color=_LINE, markersize=4.5, clip_on=False)
        axes.set_xlim(0, charges[-1] * 1.04 + 0.5)
        axes.set_xlabel("charge")
        _whole(axes)
        _mark_runs(axes, begins, numbers, charges[-1])
        _end(axes, charges[-1], values[-1], up(account.spent), top, budget)

    return _svg(
        draw, key, f"Site {site}, {account.account} records: epsilon after each charge", text
    )


def runs_plot(
    account: Account, numbers: dict[str, int], budget: float | None, site: str, key: str
) -> str:
    """Epsilon of all runs so far, after each run, as one SVG element; all ids in it begin with
    ``key``.
    """
    spent = after_runs(account, numbers)
    text = " ".join(
        f"After run {number} it is {up(epsilon)}."
        for number, epsilon in (spent if len(spent) <= _BARS else _ends(spent))
    )

    def draw(axes: Axes) -> None:
        top = _frame(axes, [epsilon for _, epsilon in spent], budget)
        values = [_finite(epsilon, top) for _, epsilon in spent]
        places = list(range(1, len(spent) + 1))
        if len(spent) <= _BARS:
            axes.bar(
                places,
                values,
                width=0.62 if len(spent) < 6 else 0.84,
                facecolor=_FILL,
                edgecolor=_LINE,
                linewidth=1.4,
            )
            for place, value, (_, epsilon) in zip(places, values, spent, strict=True):
                inside = value > 0.14 * top
                axes.annotate(
                    up(epsilon),
                    (place, value),
                    xytext=(0, -4 if inside else 4),
                    textcoords="offset points",
                    ha="center",
                    va="top" if inside else "bottom",
                    fontsize=9.5 if len(spent) < 6 else 7.5,
                )
            # A few bars are not made as wide as many.
            middle, half = (len(spent) + 1) / 2, max(0.56 * len(spent), 1.4) + 0.1
            axes.set_xlim(middle - half, middle + half)
            axes.set_xticks(places, [str(number) for number, _ in spent])
        else:
            ends, steps = [0, *places], [0.0, *values]
            axes.fill_between(ends, steps, step="post", facecolor=_FILL, linewidth=0)
            axes.plot(ends, steps, drawstyle="steps-post", color=_LINE, linewidth=1.8)
            axes.plot(ends[-1:], steps[-1:], "o", color=_LINE, markersize=4.5, clip_on=False)
            every = [places[i] for i in range(0, len(places), math.ceil(len(places) / 8))]
            axes.set_xlim(0, len(spent) * 1.04)
            axes.set_xticks(every, [str(spent[place - 1].number) for place in every])
            _end(axes, ends[-1], steps[-1], up(spent[-1].epsilon), top, budget)
        axes.set_xlabel("run")

    return _svg(
        draw,
        key,
        f"Site {site}, {account.account} records: epsilon of all runs together, after each run",
        f"{text} {_limit(budget)}",
    )


def _ends(spent: list[Spent]) -> list[Spent]:
    return [spent[0], spent[-1]]


def _limit(budget: float | None) -> str:
    return "There is no budget." if budget is None else f"The budget is {plain(budget)}."


def _finite(epsilon: Epsilon, top: float) -> float:
    return top if isinstance(epsilon, str) or not math.isfinite(epsilon) else epsilon


def _frame(axes: Axes, epsilons: Iterable[Epsilon], budget: float | None) -> float:
    """Draws what all plots have, and returns the height of the axes, where infinite values are
    put.
    """
    from matplotlib.ticker import MaxNLocator

    values = [value for value in epsilons if not isinstance(value, str) and math.isfinite(value)]
    top = 1.16 * max([*values, budget or 0.0]) or 1.0
    axes.set_ylim(0, top)
    axes.set_ylabel("epsilon")
    axes.set_axisbelow(True)
    axes.grid(axis="y")
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    axes.tick_params(length=3, width=0.8)
    if not values and budget is None:
        # All of it is infinite: a scale would say something.
        axes.set_yticks([])
    if budget is not None:
        axes.axhline(budget, color=_LIMIT, linewidth=1.4, linestyle=(0, (5, 3)))
        place = (0.015, budget)
        axes.annotate(
            f"budget {plain(budget)}",
            place,
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            color=_LIMIT,
        )
    return top


def _whole(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def _mark_runs(axes: Axes, begins: list[Point], numbers: dict[str, int], last: int) -> None:
    """A mark for every run, and a line with its number where there is room."""
    places = [0.0, *(point.charge - 0.5 for point in begins[1:])]
    named, free = [], 0.0
    for place, point in zip(places, begins, strict=True):
        # Near the end the number stands before its mark.
        late = place > 0.9 * last
        if place - (0.14 * last if late else 0.0) >= free:
            named.append(place)
            axes.annotate(
                f"run {numbers[point.run]}",
                (place, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(-2 if late else 2, 3),
                textcoords="offset points",
                ha="right" if late else "left",
                fontsize=8.5,
            )
            free = place + 0.14 * last
    height = axes.get_xaxis_transform()
    axes.vlines(places, 0.955, 1.0, transform=height, color=_INK, linewidth=0.9)
    axes.vlines(
        named[1:], 0.0, 1.0, transform=height, color=_INK, linewidth=0.8, linestyle=(0, (1, 2))
    )


def _end(axes: Axes, x: float, y: float, text: str, top: float, budget: float | None) -> None:
    """The last number: above the curve, which rises, or well below it where the line of the
    budget is in the way.
    """
    above = budget is None or abs(budget - y) > 0.15 * top or budget < y
    axes.annotate(
        text,
        (x, y),
        xytext=(4, 5) if above else (0, -15),
        textcoords="offset points",
        ha="right",
        va="bottom" if above else "top",
        fontweight="bold",
    )


# -- from matplotlib's file to an element ----------------------------------------------------------


def _svg(draw: Callable[[Axes], None], key: str, title: str, text: str) -> str:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=_SIZE)
        figure.patch.set_visible(False)
        axes = figure.add_axes((0.115, 0.165, 0.865, 0.745))
        axes.patch.set_visible(False)
        draw(axes)
        file = io.StringIO()
        FigureCanvasSVG(figure).print_svg(
            file, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    return _element(file.getvalue(), key, title, text)


def _element(file: str, key: str, title: str, text: str) -> str:
    """The element without prolog, style sheet and sizes, with ids of its own and a text
    alternative.
    """
    body = file[file.index("<svg") :]
    box = re.search(r'viewBox="([^"]*)"', body)
    body = re.sub(
        r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>",
        "",
        body[body.index(">") + 1 :],
        flags=re.S,
    )
    # The page's own letters; older versions of matplotlib write size and family in one.
    body = re.sub(
        r'\bfont: (?:(\d+) )?([\d.]+px) [^;"]*',
        lambda m: f"font-weight: {m[1] or 400}; font-size: {m[2]}",
        body,
    )
    body = re.sub(r'\bfont-family: [^;"]*;? ?', "", body)
    body = body.replace("xlink:href", "href")
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', body))
    body = re.sub(r' id="([^"]*)"', lambda m: f' id="{key}-{m[1]}"' if m[1] in used else "", body)
    body = re.sub(r'(href="#|url\(#)', rf"\g<1>{key}-", body)
    for colour, name in _VARIABLES.items():
        body = body.replace(colour, f"var(--plot-{name}, {colour})")
    body = re.sub(r" ?\n *", " ", body)
    return (
        f'<svg role="img" viewBox="{box[1] if box else "0 0 331 216"}" '
        f'aria-labelledby="{key}-title {key}-text">'
        f'<title id="{key}-title">{escape(title)}</title><desc '
        f'id="{key}-text">{escape(text)}</desc>{body.strip()}'
    )
