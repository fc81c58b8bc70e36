"""The figure that explains the op, drawn from a real call: python -m bench.idea bench/results/idea.png."""

import sys

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from topk_ortho import topk_pairs

_N, _M, _TILE = 192, 48, 48
_BLUE, _GREY, _RED = "#2a6fbb", "#999999", "#c44e52"


def main(path: str) -> None:
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
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main(sys.argv[1])
