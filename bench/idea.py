"""The figures that explain absorption and the op, drawn by ``python -m bench.idea``.

They are written to bench/results: absorption.png is a sketch, idea.png is drawn from a real call.
"""

from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from topk_ortho import topk_pairs

_N, _M, _TILE = 192, 48, 48
_BLUE, _GREY, _RED = "#2a6fbb", "#999999", "#c44e52"
_RESULTS = Path(__file__).resolve().parent / "results"


def main() -> None:
    """Draw both."""
    absorption().savefig(_RESULTS / "absorption.png", dpi=150)
    idea().savefig(_RESULTS / "idea.png", dpi=150)


def absorption() -> Figure:
    """Directions and activity of two features as they should be, with one absorbed, and as near-duplicates."""
    figure = Figure(figsize=(12, 2.4), layout="constrained")
    names, none = ("“starts with s”", "“short”"), "#444444"
    for axes, angle, labels, active, note, color, title in zip(
        figure.subplots(1, 3),
        (0, 45, 80),
        (names, names, ("“starts with s”", "the same")),
        (((1, 0), (1, 0), (1, 1)), ((1, 0), (1, 0), (0, 1)), ((1, 0), (0, 1), (1, 0))),
        ("both active", "silent, though\nit starts with s", "one or\nthe other"),
        (none, _BLUE, none),
        (
            "two features, one for each meaning",
            "absorbed: one stands for both meanings",
            "near-duplicates of one meaning",
        ),
        strict=True,
    ):
        _directions(axes, np.deg2rad(angle), labels, active)
        axes.text(2.06, 0.18, note, fontsize=8, va="center", color=color)
        axes.set_title(title, fontsize=9, loc="left")
    return figure


def _directions(axes: Axes, turn: float, labels: tuple[str, str], active: tuple[tuple[int, int], ...]) -> None:
    """Two decoder directions, the second turned towards the first, and which feature is active on which word."""
    for end, color in (((1.0, 0.0), _BLUE), ((np.sin(turn), np.cos(turn)), _RED)):
        axes.annotate("", end, (0, 0), arrowprops={"arrowstyle": "-|>", "color": color, "linewidth": 2.2})
    axes.text(0.62, -0.13, labels[0], color=_BLUE, fontsize=9, ha="center")
    axes.text(np.sin(turn) / 2 - 0.05, np.cos(turn) / 2 + 0.08, labels[1], color=_RED, fontsize=9, ha="right")
    axes.text(0.1, 1.08, f"cosine {np.sin(turn):.1f}", color="#444444", fontsize=9)
    axes.text(1.3, 0.98, "active on", fontsize=9, color="#444444")
    for row, (word, is_active) in enumerate(zip(("sun", "sea", "short"), active, strict=True)):
        y = 0.72 - 0.27 * row
        axes.text(1.62, y, word, fontsize=9, ha="right", va="center")
        for at, (color, filled) in enumerate(zip((_BLUE, _RED), is_active, strict=True)):
            axes.scatter(1.75 + 0.16 * at, y, s=70, facecolors=color if filled else "none", edgecolors=color)
    axes.set(xlim=(-0.45, 2.75), ylim=(-0.22, 1.2), aspect="equal")
    axes.set_axis_off()


def idea() -> Figure:
    """Left: the tiles and the selected pairs. Right: all cosines, the threshold, and a guess at rank 1.35 k."""
    x = torch.randn(_M, _N, generator=torch.Generator().manual_seed(0))
    x[:, 1::6] += 0.9 * x[:, ::6]  # some features lean on others
    pairs, everything = topk_pairs(x, 0.01), topk_pairs(x, 1.0)
    cosines = everything.values.abs().numpy()
    figure = Figure(figsize=(9, 3.7), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.35))

    matrix = np.full((_N, _N), np.nan)
    matrix[everything.rows, everything.cols] = cosines
    left.imshow(matrix, cmap="Blues", vmax=0.8)
    left.scatter(pairs.cols, pairs.rows, s=9, facecolors="none", edgecolors=_RED, linewidths=0.8)
    tiles = [(row, col) for row in range(0, _N, _TILE) for col in range(row, _N, _TILE)]
    for number, (row, col) in enumerate(tiles):
        left.add_patch(Rectangle((col - 0.5, row - 0.5), _TILE, _TILE, fill=False, edgecolor=_GREY, linewidth=0.7))
        left.text(col + 3, row + 11, str(number + 1), fontsize=8, color="#444444")
    left.set_title("1. one tile of cosines at a time, upper triangle only", fontsize=9, loc="left")
    left.text(3, _N - 50, "red: the pairs kept\nall else is forgotten", fontsize=8, color=_RED)
    left.set_axis_off()

    threshold = f"k-th |cosine|, exact: {pairs.k} pairs from here on,\n"
    threshold += f"certified because more than {pairs.k} exceed the guess"
    right.hist(cosines, bins=np.linspace(0, 0.85, 120), color=_GREY, alpha=0.6)
    right.hist(cosines[: pairs.k], bins=np.linspace(0, 0.85, 120), color=_RED)
    right.set_yscale("log")
    for at, text, color, offset, align in (
        (cosines[int(1.35 * pairs.k)], "guess, from a sample\nor the last step", _BLUE, -4, "right"),
        (cosines[pairs.k - 1], threshold, _RED, 5, "left"),
    ):
        right.axvline(at, color=color, linewidth=1.2)
        style = {"textcoords": "offset points", "va": "top", "fontsize": 8, "color": color, "ha": align}
        right.annotate(text, (at, right.get_ylim()[1]), xytext=(offset, -4), **style)
    right.set(xlabel="|cosine| of a pair", ylabel="pairs")
    right.spines[["top", "right"]].set_visible(False)
    right.set_title("2. keep what exceeds the guess, select among those", fontsize=9, loc="left")
    return figure


if __name__ == "__main__":
    main()
