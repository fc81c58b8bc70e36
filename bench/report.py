"""Tables and figures from results.

On a GPU, from the time of topk_ortho and its useful operations, N(N-1)/2 * 2M,

    Tflop/s        = useful operations / time
    of model       = floor of `bench.roofline` / time
    / cuBLAS       = time / that of as many operations at the rate of the full square product of this dtype and M
"""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from bench.cases import FRACTION, Case
from bench.results import Result, latest
from bench.roofline import HARDWARE, floor_of_call
from topk_ortho.definitions import k_from_fraction, n_pairs

Curves = dict[tuple[str, str | int], tuple[str, str, str]]
"""Label, color and line of curves, by provider and mode, or by provider and N where x is the density."""

PAGE = Path(__file__).resolve().parent.parent / "docs/benchmarks.md"
"""The page of the documentation that has the tables"""
_PASS = {"forward": "forward", "forward_backward": "forward + backward"}
_DENSE = {  # provider: label, color; in the order of the table
    "topk_ortho_warm": ("topk_ortho, warm", "#7fb2e5"),
    "topk_ortho": ("topk_ortho", "#2a6fbb"),
    "topk_ortho_failed": ("topk_ortho, after a failed guess", "#1b3f66"),
    "tiled": ("topk_ortho, plain torch", "#55a868"),
    "half_gemm": ("matrix products only", "#888888"),
    "cublas": ("a full square product", "#444444"),
    "chunked": ("row blocks, merged torch.topk", "#dd8452"),
    "naive": ("matmul + torch.topk", "#c44e52"),
    "naive_autograd": ("the same, autograd through the matrix", "#8c2d5a"),
    "naive_compiled": ("the same, torch.compile", "#e39aa0"),
}
_SHORT = {  # provider: label; what the page shows of a GPU, in the order of its table
    "topk_ortho_warm": "topk_ortho",
    "topk_ortho_failed": "after a failed guess",
    "half_gemm": "matrix products only",
    "chunked": "row blocks, merged torch.topk",
    "naive_compiled": "matmul + torch.topk, torch.compile",
}
_SPARSE: Curves = {  # in the order of the table, which leaves out the last
    ("sparse", "forward"): ("loss, forward", "#7fb2e5", "-"),
    ("sparse", "forward_backward"): ("loss, forward + backward", "#2a6fbb", "-"),
    ("sparse", "pairs_fixed_k"): ("pairs listed, k fixed", "#2a6fbb", "--"),
    ("scipy", "pairs_fixed_k"): ("scipy, k fixed", "#888888", "--"),
    ("sparse", "pairs"): ("pairs listed, k = 0.1%", "#2a6fbb", ":"),
    ("scipy", "pairs"): ("scipy, k = 0.1%", "#888888", ":"),
    ("dense", "forward_backward"): ("dense route, forward + backward", "#8c2d5a", "-"),
    ("dense", "forward"): ("dense route, forward", "#c44e52", "-"),
}
_DENSITY: Curves = {
    ("sparse", 4096): ("dense x, sparse route, N = 4,096", "#7fb2e5", "-"),
    ("dense", 4096): ("dense x, dense route, N = 4,096", "#7fb2e5", "--"),
    ("auto", 4096): ('dense x, backend="auto", N = 4,096', "#7fb2e5", ":"),
    ("sparse", 16384): ("dense x, sparse route, N = 16,384", "#2a6fbb", "-"),
    ("dense", 16384): ("dense x, dense route, N = 16,384", "#2a6fbb", "--"),
    ("auto", 16384): ('dense x, backend="auto", N = 16,384', "#2a6fbb", ":"),
}
_TRAINING = {
    "saelens": "SAELens",
    "saelens_sparse": "SAELens, sparse activations without rescaling (its fastest setting)",
    "topk_ortho": "topk_ortho",
    "topk_ortho_decoder": "topk_ortho, with the penalty on the decoder",
    "topk_ortho_topk": "topk_ortho, TopK",
    "topk_ortho_topk_activations": "topk_ortho, TopK, with the penalty on activations",
}
_TEXT_COLUMNS = ("dtype", "pass", "a BatchTopK step", "commit")
_NUMBERS = {  # column of a table: how its numbers are written; all others are texts
    "M": "{:,}",
    "N": "{:,}",
    "time / products": "{:.2f}",
    "memory / naive": "{:.2%}",
    "Tflop/s": "{:.1f}",
    "of model": "{:.0%}",
    "/ cuBLAS": "{:.2f}",
    "time": "{:.0f} ms",
    "SAELens / this": "{:.1f}",
}


def tables_of(results: list[Result]) -> dict[str, str]:
    """The table of each family of benchmarks, by its name."""
    families = _families(results).items()
    return {name: "not measured\n" if measured.empty else _FAMILIES[name][1](measured) for name, measured in families}


def write_report(results: list[Result], out: Path, page: Path | None) -> None:
    """Draw the figures beside the results file, and write the tables of what was measured into a page."""
    for name, measured in _families(results).items():
        marker, table, draw = _FAMILIES[name]
        if measured.empty:
            continue
        if measured.iloc[-1]["environment"].get("gpu"):
            marker, table = f"gpu-{marker}", short_table if name == "dense" else table
        if draw is not None:
            draw(measured, out.with_name(f"{out.stem}{'' if name == 'dense' else f'-{name}'}.png"))
        if page is not None:
            begin, end = f"<!-- {marker}: begin -->\n", f"<!-- {marker}: end -->"
            before, rest = page.read_text().split(begin)
            page.write_text(before + begin + table(measured) + end + rest.split(end)[1])


def _families(results: list[Result]) -> dict[str, pd.DataFrame]:
    """What was measured last of each case, a row each with the oldest first, by the family of its benchmark."""
    rows = [r._asdict() | r.case._asdict() | r.measurement._asdict() | {"cell": _cell(r)} for r in latest(results)]
    numbers = ["time_s", "peak_extra_bytes", "rounds"]  # NaN where there is none
    frame = pd.DataFrame(rows, columns=[*Case._fields, *numbers, "status", "cell", "setting", "environment", "utc"])
    frame = frame.astype(dict.fromkeys(["L0", *numbers], float)).sort_values("utc", kind="stable")
    return {name: frame[frame["benchmark"].str.startswith(name)] for name in _FAMILIES}


def _cell(result: Result) -> str:
    """Time and memory, or why there is neither."""
    time_s, n_bytes = result.measurement.time_s, result.measurement.peak_extra_bytes
    if time_s is None or n_bytes is None:
        return result.measurement.status
    is_gpu = bool(result.environment.get("gpu"))
    time = time_s * (1e3 if is_gpu else 1)
    digits = 3 if time < 0.1 else 2 if time < 10 else 1
    return f"{time:.{digits}f} {'ms' if is_gpu else 's'}, {n_bytes / 1e6:,.0f} MB"


def dense_table(measured: pd.DataFrame) -> str:
    """Markdown: a row for every shape and mode, with time and peak memory of every provider, and ratios."""
    cells, time_s, memory = (
        measured.pivot(index=["dtype", "M", "N", "mode"], columns="provider", values=field).reindex(columns=[*_DENSE])
        for field in ("cell", "time_s", "peak_extra_bytes")
    )
    ours = "topk_ortho_warm" if (measured["provider"] == "topk_ortho_warm").any() else "topk_ortho"
    speedups = time_s[["naive", "naive_autograd"]].div(time_s[ours], axis="index").to_numpy()
    table = cells.dropna(axis="columns", how="all").rename(columns={name: label for name, (label, _) in _DENSE.items()})
    table["time / products"] = time_s[ours] / time_s["half_gemm"]
    table["faster than naive / autograd"] = [" / ".join(f"{x:.1f} x" for x in row if x > 0) for row in speedups]
    table["memory / naive"] = memory[ours] / memory["naive"]
    last = measured.iloc[-1]
    if gpu := last["environment"].get("gpu"):
        table = table.join(_gpu_figures(gpu, time_s[ours], measured[measured["provider"] == "cublas"]))
    table = _with_commits(table, measured)
    table = table.rename(index=_PASS, level="mode").rename_axis(index={"mode": "pass"}).reset_index()
    setting = ""
    if len(table[["dtype", "M"]].drop_duplicates()) == 1:
        table, setting = table.drop(columns=["dtype", "M"]), f"M = {last['M']:,}, {last['dtype']}, "
    note = (
        "Median time, and peak memory beyond x; forward + backward holds a gradient as large as x. "
        f"{setting}k = {last['setting']['fraction']:.1%} of the pairs. {_machines(measured)}"
    )
    return _markdown(table, note)


def short_table(measured: pd.DataFrame) -> str:
    """Markdown: on a GPU the time of the op with a warm start, beside that of the products and of other good ways."""
    index = ["dtype", "M", "N", "mode"]
    cells, time_s = (
        measured.pivot(index=index, columns="provider", values=field).reindex(columns=[*_SHORT])
        for field in ("cell", "time_s")
    )
    ours = time_s["topk_ortho_warm"]
    table = cells.rename(columns=_SHORT)
    table["time / products"] = ours / time_s["half_gemm"]
    others = time_s[["chunked", "naive_compiled"]].min(axis="columns")
    table["faster than the best other"] = (others / ours).map("{:.1f} x".format, na_action="ignore")
    table = _with_commits(table, measured)
    table = table[ours.notna()].rename(index=_PASS, level="mode").rename_axis(index={"mode": "pass"}).reset_index()
    setting = ""
    if table["M"].nunique() == 1:
        setting, table = f"M = {table['M'].iloc[0]:,}, ", table.drop(columns="M")
    note = f"Median time, and peak memory beyond x. {setting}k = {FRACTION:.1%} of the pairs. {_machines(measured)}"
    return _markdown(table, note)


def _with_commits(table: pd.DataFrame, measured: pd.DataFrame) -> pd.DataFrame:
    """The table, with a column for the commit of each row if they are not all the same."""
    commits = measured.assign(commit=[environment["commit"] for environment in measured["environment"]])
    of_rows = commits.groupby(list(table.index.names))["commit"].last()
    return table.join(of_rows) if of_rows.nunique() > 1 else table


def _gpu_figures(gpu: str, time_s: pd.Series, squares: pd.DataFrame) -> pd.DataFrame:
    """What the docstring of the module defines, as far as it can be told; `squares` are full square products."""
    hardware, rows = HARDWARE.get(gpu), []
    entry_s = (squares["time_s"] / squares["N"] ** 2).set_axis(list(zip(squares["dtype"], squares["M"], strict=True)))
    for (dtype, m, n, mode), s in time_s.items():
        floor_s = floor_of_call(hardware, m, n, k_from_fraction(n, FRACTION), dtype, mode) if hardware else math.nan
        square_s = entry_s.get((dtype, m), math.nan) * n_pairs(n)
        rows.append((2 * m * n_pairs(n) / s / 1e12, floor_s / s, s / square_s))
    return pd.DataFrame(rows, time_s.index, ["Tflop/s", "of model", "/ cuBLAS"])


def sparse_table(measured: pd.DataFrame) -> str:
    """Markdown: one row for every N of the first sweep, then the density at which the routes take equal time."""
    sweep, columns = measured[measured["benchmark"] == "sparse_n"], list(_SPARSE)[:-1]
    cells, time_s = (
        sweep.pivot(index="N", columns=["provider", "mode"], values=field).reindex(columns=columns)
        for field in ("cell", "time_s")
    )
    cells.columns = [_SPARSE[column][0] for column in columns]
    shape = (measured if sweep.empty else sweep).iloc[0]
    note = (
        f"{shape['M']:,} rows of {shape['L0']:.0f} active features, {shape['dtype']}; k is 0.1% of the pairs "
        f"or, where it is fixed, {shape['setting']['fixed_k']:,}. Median time and peak extra memory. "
    )
    both_s = time_s["sparse", "forward_backward"]
    if len(both_s) > 1 and both_s.iloc[[0, -1]].notna().all():
        ratio, (first, *_, last) = both_s.iloc[-1] / both_s.iloc[0], both_s.index
        note += f"Loss and gradient at N = {last:,} take {ratio:.2f} times as long as at N = {first:,}. "
    sweep = measured[measured["benchmark"] == "sparse_density"]
    crossings = {n: crossover(measured, n) for n in sorted(set(sweep["N"]))}
    if found := [f"{density:.1%} at N = {n:,}" for n, density in crossings.items() if density is not None]:
        note += f"For a dense x of {sweep['M'].iloc[0]:,} rows the two routes take equal time at a density of "
        note += f"{', '.join(found)}. "
    return _markdown(cells.dropna(axis="columns", how="all").reset_index(), note + _machines(measured))


def crossover(measured: pd.DataFrame, n_features: int) -> float | None:
    """Density at which both routes take equally long, between two that were measured; None if there is none."""
    sweep = measured[(measured["benchmark"] == "sparse_density") & (measured["N"] == n_features)]
    by_l0 = sweep.pivot(index="L0", columns="provider", values="time_s").reindex(columns=["sparse", "dense"])
    dense_s = by_l0["dense"].max()  # it was measured at one density, because it takes equally long at all
    for (l0, time_s), (next_l0, next_time_s) in itertools.pairwise(by_l0["sparse"].dropna().items()):
        if time_s <= dense_s < next_time_s:
            share = math.log(dense_s / time_s) / math.log(next_time_s / time_s)
            return float(l0 / n_features * (next_l0 / l0) ** share)
    return None


def training_table(measured: pd.DataFrame) -> str:
    """Markdown: the time of a step of every provider that was measured."""
    time_s, last = measured.groupby("provider")["time_s"].last().reindex([*_TRAINING]).dropna(), measured.iloc[-1]
    table = pd.DataFrame({"a BatchTopK step": time_s.index.map(_TRAINING), "time": 1e3 * time_s.to_numpy()})
    table["SAELens / this"] = time_s.get("saelens", math.nan) / time_s.to_numpy()
    note = (
        f"Median of {measured['rounds'].max():.0f} alternating steps, d_in = {last['setting']['d_in']:,}, "
        f"{last['N']:,} features, L0 = {last['L0']:.0f}, batch {last['M']:,}, {last['dtype']}, "
        f"SAELens {last['environment']['sae_lens']}. {_machines(measured)}"
    )
    return _markdown(table, note)


def _machines(measured: pd.DataFrame) -> str:
    """A sentence for each environment that results come from, with the time of the last of them."""
    lines = {}
    for machine, utc in measured[["environment", "utc"]].itertuples(index=False):
        if machine.get("gpu"):
            name = f"{machine['gpu']}, driver {machine['driver']}, CUDA {machine['cuda']}, Triton {machine['triton']}"
        else:
            name = f"{machine['cores']} cores of {machine['cpu']} ({machine['capability']}), "
            name += f"{machine['memory_bytes'] / 2**30:.0f} GiB"
        lines[str(machine)] = f"{name}, torch {machine['torch']}, commit {machine['commit']}, {utc} UTC."
    return " ".join(lines.values())


def _markdown(table: pd.DataFrame, note: str) -> str:
    """A table of texts, and of numbers as `_NUMBERS` says, and a note under it."""
    if table.empty:
        return f"{note}\n"
    ruler = "|" + "".join("---|" if name in _TEXT_COLUMNS else "--:|" for name in table)
    formats = [_NUMBERS.get(name, "{}") for name in table]
    rows = [
        ["" if pd.isna(value) else spec.format(value) for spec, value in zip(formats, row, strict=True)]
        for row in table.itertuples(index=False)
    ]
    header, *lines = ["| " + " | ".join(cells) + " |" for cells in [list(table), *rows]]
    return "\n".join([header, ruler, *lines, "", note, ""])


def _draw_dense(measured: pd.DataFrame, path: Path) -> None:
    """Time and memory against N for each dtype, at the M that most cases have."""
    mine = measured[(measured["M"] == measured["M"].mode()[0]) & (measured["provider"] != "cublas")]
    curves: Curves = {(provider, mode): (*style, "-") for provider, style in _DENSE.items() for mode in _PASS}
    panels = [
        (f"{dtype}, {_PASS[mode]}", mine[(mine["dtype"] == dtype) & (mine["mode"] == mode)], curves, field, "N")
        for dtype in sorted(set(mine["dtype"]))
        for mode, field in (("forward", "time_s"), ("forward_backward", "time_s"), ("forward", "peak_extra_bytes"))
    ]
    _draw(panels, path, n_columns=3)


def _draw_sparse(measured: pd.DataFrame, path: Path) -> None:
    """Time and memory against N, time against L0, and time against the density of a dense x."""
    sweeps = {name: measured[measured["benchmark"] == name] for name in ("sparse_n", "sparse_l0", "sparse_density")}
    panels = [
        ("L0 = 64", sweeps["sparse_n"], _SPARSE, "time_s", "N"),
        ("L0 = 64", sweeps["sparse_n"], _SPARSE, "peak_extra_bytes", "N"),
        ("N = 65,536", sweeps["sparse_l0"], _SPARSE, "time_s", "L0"),
        ("dense x, forward", sweeps["sparse_density"], _DENSITY, "time_s", "density"),
    ]
    _draw(panels, path, n_columns=4)


def _draw(panels: list[tuple[Any, ...]], path: Path, n_columns: int) -> None:
    """Panels, each by the arguments of `_draw_panel`, in rows, with one legend for all curves."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}
    n_rows = len(panels) // n_columns
    figure = Figure(figsize=(3.2 * n_columns, 3.9 * n_rows), layout="constrained")
    labels: dict[str, Any] = {}
    for panel, axes in zip(panels, figure.subplots(n_rows, n_columns, squeeze=False).flat, strict=True):
        _draw_panel(axes, *panel)
        handles, names = axes.get_legend_handles_labels()
        labels |= dict(zip(names, handles, strict=True))
    figure.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def _draw_panel(axes: Any, title: str, measured: pd.DataFrame, curves: Curves, field: str, x: str) -> None:
    """Curves of a field against x, which is N, L0 or density; what ran out of memory is a cross at the top."""
    top, is_density = axes.get_xaxis_transform(), x == "density"
    name, unit = ("seconds", 1.0) if field == "time_s" else ("peak extra memory, MB", 1e6)
    key = ["provider", "N" if is_density else "mode"]
    measured = measured.assign(density=measured["L0"] / measured["N"])
    values = measured.pivot(index=x, columns=key, values=field).reindex(columns=list(curves)) / unit
    if is_density:
        values["dense"] = values["dense"].ffill().bfill()  # it takes equally long at every density
    for (label, color, line), (_, points) in zip(curves.values(), values.items(), strict=True):
        if points.notna().any():
            axes.plot(points.dropna(), line, marker="o", markersize=4, color=color, label=label)
    for *curve, at in measured.loc[measured["status"] == "out of memory", [*key, x]].itertuples(index=False):
        color = curves[curve[0], curve[1]][1]
        axes.plot(at, 0.97, "x", color=color, transform=top)
        style = {"ha": "right", "va": "center", "fontsize": 8, "color": color}
        axes.annotate("out of memory", (at, 0.97), (-6, 0), xycoords=top, textcoords="offset points", **style)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.grid(alpha=0.25)
    axes.set_xticks(values.index, [f"{at:.1%}" if is_density else f"{at:,.0f}" for at in values.index], rotation=30)
    axes.set_ylim(top=2.5 * axes.get_ylim()[1])  # room for the crosses
    axes.set_title(f"{title}: {name}", fontsize=9, loc="left")
    axes.set_xlabel(x)


# the benchmarks whose names begin so: marker in the page, table, figure
_FAMILIES: dict[str, tuple[str, Callable[[pd.DataFrame], str], Callable[[pd.DataFrame, Path], None] | None]] = {
    "dense": ("bench", dense_table, _draw_dense),
    "sparse": ("sparse-bench", sparse_table, _draw_sparse),
    "training": ("training-bench", training_table, None),
}
