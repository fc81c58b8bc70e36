"""The figure that explains the op, drawn from a real call: python -m bench.idea bench/results/idea.png."""

import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from topk_ortho import topk_pairs

_N, _M, _FRACTION, _TILE = 192, 48, 0.01, 48
_BLUE, _GREY, _RED = "#2a6fbb", "#999999", "#c44e52"


def main(path: Path) -> None:
    """Left: the tiles and the selected pairs. Right: all cosines, the threshold, and a guess at rank 1.35 k."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_M, _N, generator=generator)
    x[:, 1::6] += 0.9 * x[:, ::6]  # some features lean on others
    pairs = topk_pairs(x, _FRACTION)
    x_hat = torch.nn.functional.normalize(x, dim=0)
    magnitude = (x_hat.T @ x_hat).abs()

    matplotlib.rcParams |= {"font.size": 9}
    figure = Figure(figsize=(9, 3.7), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.35))
    left.imshow(np.ma.masked_array(magnitude, np.tri(_N, dtype=bool)), cmap="Blues", vmax=0.8)
    left.scatter(pairs.cols, pairs.rows, s=9, facecolors="none", edgecolors=_RED, linewidths=0.8)
    tiles = [(row, col) for row in range(0, _N, _TILE) for col in range(row, _N, _TILE)]
    for number, (row, col) in enumerate(tiles):
        left.add_patch(Rectangle((col - 0.5, row - 0.5), _TILE, _TILE, fill=False, edgecolor=_GREY, linewidth=0.7))
        left.text(col + 3, row + 11, str(number + 1), fontsize=8, color="#444444")
    left.set_title("1. one tile of cosines at a time, upper triangle only", fontsize=9, loc="left")
    left.text(3, _N - 50, "red: the pairs kept\nall else is forgotten", fontsize=8, color=_RED)
    left.set_xticks([])
    left.set_yticks([])
    left.spines[:].set_visible(False)

    upper = magnitude[tuple(torch.triu_indices(_N, _N, 1))]
    threshold = pairs.threshold.item()
    guess = upper.sort(descending=True).values[int(1.35 * pairs.k)].item()
    right.hist(upper, bins=np.linspace(0, 0.85, 120), color=_GREY, alpha=0.6)
    right.hist(pairs.values.abs().detach(), bins=np.linspace(0, 0.85, 120), color=_RED)
    right.axvline(guess, color=_BLUE, linewidth=1.2)
    right.axvline(threshold, color=_RED, linewidth=1.2)
    right.set_yscale("log")
    top = right.get_ylim()[1]
    label = {"textcoords": "offset points", "va": "top", "fontsize": 8}
    text = "guess, from a sample\nor the last step"
    right.annotate(text, (guess, top), xytext=(-4, -4), ha="right", color=_BLUE, **label)
    text = (
        f"k-th |cosine|, exact: {pairs.k} pairs from here on,\ncertified because more than {pairs.k} exceed the guess"
    )
    right.annotate(text, (threshold, top), xytext=(5, -4), color=_RED, **label)
    right.set_xlabel("|cosine| of a pair")
    right.set_ylabel("pairs")
    right.spines[["top", "right"]].set_visible(False)
    right.set_title("2. keep what exceeds the guess, select among those", fontsize=9, loc="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
