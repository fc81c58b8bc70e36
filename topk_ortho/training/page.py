"""What all HTML reports share: the look of charts, images that the page holds itself, and values in words.

The frame and the style of a page are in page.html.jinja, tables and figures in macros.html.jinja.
"""

import base64
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from topk_ortho.training.config import flatten
from topk_ortho.training.metric_table import is_number

BLUE, ORANGE, RED, PURPLE, GREY = "#2a6fbb", "#dd8452", "#c44e52", "#8c2d5a", "#888888"
THOUSANDS = FuncFormatter(lambda number, _: f"{number:,.0f}")
WIDTH = 5.6  # inches: type of 10 points is 15 pixels high where the figure is shown 600 pixels wide
_STYLE: Any = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "savefig.dpi": 200,
}


class Image(NamedTuple):
    """A figure as a page shows it."""

    source: str
    """The image itself, as a data URL"""
    alt: str
    """The alternative text"""


def save_figure(draw: Callable[[Figure], str], *paths: Path) -> Image | None:
    """Draw a figure and save it, in the format that the suffix of each path names; the first is for the page, a PNG.

    `draw` returns the alternative text, or an empty string if it has nothing to show. Nothing is saved then, and the
    result is None.
    """
    with rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
        alternative_text = draw(figure)
        if not alternative_text:
            return None
        for path in paths:
            figure.savefig(path)
    data = base64.b64encode(paths[0].read_bytes()).decode()
    return Image(f"data:image/png;base64,{data}", alternative_text)


def label_steps(axes: Axes) -> None:
    """Let the horizontal axis show training steps."""
    axes.set_xlabel("training step")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(THOUSANDS)


def add_legend(figure: Figure, **options: Any) -> None:
    """Put the legend below the axes."""
    figure.legend(loc="outside lower center", **{"ncols": 3} | options)


def render(template: Path, **values: Any) -> str:
    """The page that a template makes of some values; it may extend page.html.jinja."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=jinja2.ChainableUndefined,  # any setting may be missing
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": _number, "duration": _duration}
    environment.tests["number"] = is_number  # jinja's own takes NaN for one
    return environment.get_template(template.name).render(values)


def readable(tree: Mapping[str, Any], *, missing: str) -> dict[str, str]:
    """Nested values as text, by their dotted names; what is null or not finite is called `missing`."""

    def as_text(value: Any) -> str:
        if isinstance(value, str):
            return value
        if is_number(value):
            return f"{value:,}"
        return missing if value is None or isinstance(value, float) else json.dumps(value)

    return {name: as_text(value) for name, value in flatten(tree).items()}


def _number(value: Any) -> str:
    """A number as it stands in a sentence: a count in full, anything else to four digits."""
    if not is_number(value):
        return "an unknown number of"
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.4g}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
