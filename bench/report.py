"""Tables and figures from results.

On a GPU, from the time of topk_ortho and its useful operations, N(N-1)/2 * 2M,

    Tflop/s        = useful operations / time
    of model       = floor of `bench.roofline` / time
    / cuBLAS       = time / that of as many operations at the rate of the full square product of this dtype and M
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from bench.cases import FRACTION, Case
from bench.measurement import Measurement
from bench.results import Result, latest
from bench.roofline import floor_of_call, hardware_of
from topk_ortho.definitions import k_from_fraction, n_pairs

Measured = dict[Case, Result]
Curves = dict[tuple[str, str], tuple[str, str, str]]
"""Label, color and line of each curve of a figure."""

README = Path(__file__).resolve().parent.parent / "README.md"
_DENSE = {  # provider: label, color; in the order of the table
    "topk_ortho_warm": ("topk_ortho, warm", "#7fb2e5"),
    "topk_ortho": ("topk_ortho", "#2a6fbb"),
    "tiled": ("topk_ortho, plain torch", "#55a868"),
    "half_gemm": ("the products alone", "#888888"),
    "cublas": ("a full square product", "#444444"),
    "chunked": ("row blocks, merged torch.topk", "#dd8452"),
    "naive": ("matmul + torch.topk", "#c44e52"),
    "naive_autograd": ("the same, autograd through the matrix", "#8c2d5a"),
    "naive_compiled": ("the same, torch.compile", "#e39aa0"),
}
_SPARSE: Curves = {  # by provider and mode; in the order of the table, which leaves out the last
    ("sparse", "forward"): ("loss, forward", "#7fb2e5", "-"),
    ("sparse", "forward_backward"): ("loss, forward + backward", "#2a6fbb", "-"),
    ("sparse", "pairs_fixed_k"): ("pairs listed, k fixed", "#2a6fbb", "--"),
    ("scipy", "pairs_fixed_k"): ("scipy, k fixed", "#888888", "--"),
    ("sparse", "pairs"): ("pairs listed, k = 0.1%", "#2a6fbb", ":"),
    ("scipy", "pairs"): ("scipy, k = 0.1%", "#888888", ":"),
    ("dense", "forward_backward"): ("dense route, forward + backward", "#8c2d5a", "-"),
    ("dense", "forward"): ("dense route, forward", "#c44e52", "-"),
}
_DENSITY: Curves = {  # by provider and N
    (provider, str(n)): (f"dense x, {label}, N = {n:,}", color, line)
    for n, color in ((4096, "#7fb2e5"), (16384, "#2a6fbb"))
    for provider, label, line in (
        ("sparse", "sparse route", "-"), ("dense", "dense route", "--"), ("auto", 'backend="auto"', ":"),
    )
}  # fmt: skip
_TRAINING = {
    "saelens": "SAELens",
    "saelens_sparse": "SAELens, sparse activations without rescaling (its fastest setting)",
    "topk_ortho": "topk_ortho",
    "topk_ortho_decoder": "topk_ortho, with the penalty on the decoder",
    "topk_ortho_topk": "topk_ortho, TopK",
    "topk_ortho_topk_activations": "topk_ortho, TopK, with the penalty on activations",
}
_PASS = {"forward": "forward", "forward_backward": "forward + backward"}
_TEXT_COLUMNS = ("dtype", "pass", "a BatchTopK step")


def tables_of(results: list[Result]) -> dict[str, str]:
    """The table of each family of benchmarks, by its name."""
    families = _families(results).items()
    return {name: _FAMILIES[name][1](measured) if measured else "not measured\n" for name, measured in families}


def write_report(results: list[Result], out: Path, readme: Path | None) -> None:
    """Draw the figures beside the results file, and write the tables of what was measured into the README."""
    for name, measured in _families(results).items():
        marker, table, panels_of = _FAMILIES[name]
        if measured and panels_of is not None:
            _draw(panels_of(measured), out.with_name(f"{out.stem}{'' if name == 'dense' else f'-{name}'}.png"))
        if measured and readme is not None:
            begin, end = f"<!-- {marker}: begin -->\n", f"<!-- {marker}: end -->"
            before, rest = readme.read_text().split(begin)
            readme.write_text(before + begin + table(measured) + end + rest.split(end)[1])


def _families(results: list[Result]) -> dict[str, Measured]:
    last = latest(results)
    return {name: {r.case: r for r in last if r.case.benchmark.startswith(name)} for name in _FAMILIES}


def dense_table(measured: Measured) -> str:
    """Markdown: a row for every shape and mode, with time and peak memory of every provider, and ratios."""
    last = _last(measured)
    providers = [provider for provider in _DENSE if any(case.provider == provider for case in measured)]
    ours = "topk_ortho_warm" if "topk_ortho_warm" in providers else "topk_ortho"
    is_gpu, several = bool(last.environment.get("gpu")), len({(case.M, case.dtype) for case in measured}) > 1
    rows = []
    shapes = {case._replace(provider="") for case in measured}
    for shape in sorted(shapes, key=lambda case: (case.dtype, case.M, case.N, case.mode)):
        at = {provider: measured.get(shape._replace(provider=provider)) for provider in _DENSE}
        peers = [_ratio(at[peer], at[ours]) for peer in ("naive", "naive_autograd")]
        row = {"dtype": shape.dtype, "M": f"{shape.M:,}"} if several else {}
        row |= {"N": f"{shape.N:,}", "pass": _PASS[shape.mode]}
        row |= {_DENSE[provider][0]: _cell(at[provider], is_milliseconds=is_gpu) for provider in providers}
        row |= {
            "time / products": _shown(_ratio(at[ours], at["half_gemm"]), ".2f"),
            "faster than naive / autograd": " / ".join(f"{speedup:.1f} x" for speedup in peers if speedup is not None),
            "memory / naive": _shown(_ratio(at[ours], at["naive"], "peak_extra_bytes"), ".2%"),
        }
        rows.append(row | _gpu_figures(at[ours], measured) if is_gpu else row)
    setting = "" if several else f"M = {last.case.M:,}, {last.case.dtype}, "
    note = (
        "Median time, and peak memory beyond x; forward + backward holds a gradient as large as x. "
        f"{setting}k = {last.setting['fraction']:.1%} of the pairs. {_machines(measured)}"
    )
    return _markdown(rows, note)


def _gpu_figures(result: Result | None, measured: Measured) -> dict[str, str]:
    """What the docstring of the module defines, as far as it can be told."""
    tflops = share = to_cublas = None
    if result is not None and (time_s := result.measurement.time_s):
        (_, _, mode, dtype, m, n, _), hardware = result.case, hardware_of(result.environment["gpu"])
        tflops = 2 * m * n_pairs(n) / time_s / 1e12
        share = hardware and floor_of_call(hardware, m, n, k_from_fraction(n, FRACTION), dtype, mode) / time_s
        for other, square in measured.items():
            if (other.provider, other.dtype, other.M) == ("cublas", dtype, m) and square.measurement.time_s:
                to_cublas = time_s / square.measurement.time_s * other.N**2 / n_pairs(n)
    return {"Tflop/s": _shown(tflops, ".1f"), "of model": _shown(share, ".0%"), "/ cuBLAS": _shown(to_cublas, ".2f")}


def sparse_table(measured: Measured) -> str:
    """Markdown: one row for every N of the first sweep, then the density at which the routes take equal time."""
    by_n = {(c.N, c.provider, c.mode): result for c, result in measured.items() if c.benchmark == "sparse_n"}
    sizes = sorted({n for n, *_ in by_n})
    columns = {key: label for key, (label, *_) in list(_SPARSE.items())[:-1]}
    rows = [{"N": f"{n:,}"} | {label: _cell(by_n.get((n, *key))) for key, label in columns.items()} for n in sizes]
    last = _last(measured)
    shape = next((case for case in measured if case.benchmark == "sparse_n"), last.case)
    note = (
        f"{shape.M:,} rows of {shape.L0} active features, {shape.dtype}; k is 0.1% of the pairs "
        f"or, where it is fixed, {last.setting['fixed_k']:,}. Median time and peak extra memory. "
    )
    ends = [by_n.get((n, "sparse", "forward_backward")) for n in (sizes[:1] + sizes[-1:])]
    if len(sizes) > 1 and (ratio := _ratio(ends[1], ends[0])):
        note += f"Loss and gradient at N = {sizes[-1]:,} take {ratio:.2f} times as long as at N = {sizes[0]:,}. "
    sweep = [case for case in measured if case.benchmark == "sparse_density"]
    crossings = {n: crossover(measured, n) for n in sorted({case.N for case in sweep})}
    if found := [f"{density:.1%} at N = {n:,}" for n, density in crossings.items() if density is not None]:
        note += f"For a dense x of {sweep[0].M:,} rows the two routes take equal time at a density of "
        note += f"{', '.join(found)}. "
    return _markdown(rows, note + _machines(measured))


def crossover(measured: Measured, n_features: int) -> float | None:
    """Density at which both routes take equally long, between two that were measured; None if there is none."""
    mine = [
        (case.provider, (case.L0 or 0) / n_features, result.measurement.time_s)
        for case, result in measured.items()
        if (case.benchmark, case.N) == ("sparse_density", n_features) and result.measurement.time_s is not None
    ]
    dense = next((time_s for provider, _, time_s in mine if provider == "dense"), None)
    points = sorted((density, time_s) for provider, density, time_s in mine if provider == "sparse")
    for (density, time_s), (next_density, next_time) in itertools.pairwise(points):
        if dense is not None and time_s <= dense < next_time:
            share = math.log(dense / time_s) / math.log(next_time / time_s)
            return float(density * (next_density / density) ** share)
    return None


def training_table(measured: Measured) -> str:
    """Markdown: the time of a step of every provider that was measured."""
    times = {case.provider: result.measurement.time_s for case, result in measured.items()}
    reference, last, rows = times.get("saelens"), _last(measured), []
    for provider, label in _TRAINING.items():
        if time_s := times.get(provider):
            ratio = _shown(reference and reference / time_s, ".1f")
            rows.append({"a BatchTopK step": label, "time": f"{1e3 * time_s:.0f} ms", "SAELens / this": ratio})
    note = (
        f"Median of {last.measurement.rounds} alternating steps, d_in = {last.setting['d_in']:,}, "
        f"{last.case.N:,} features, L0 = {last.case.L0}, batch {last.case.M:,}, {last.case.dtype}, "
        f"SAELens {last.environment['sae_lens']}. {_machines(measured)}"
    )
    return _markdown(rows, note)


def _machines(measured: Measured) -> str:
    """A sentence for each environment that results come from, with the time of the last of them."""
    lines = {}
    for result in sorted(measured.values(), key=lambda result: result.utc):
        machine = result.environment
        if machine.get("gpu"):
            name = f"{machine['gpu']}, driver {machine['driver']}, CUDA {machine['cuda']}, Triton {machine['triton']}"
        else:
            name = f"{machine['cores']} cores of {machine['cpu']} ({machine['capability']}), "
            name += f"{machine['memory_bytes'] / 2**30:.0f} GiB"
        lines[str(machine)] = f"{name}, torch {machine['torch']}, commit {machine['commit']}, {result.utc} UTC."
    return " ".join(lines.values())


def _last(measured: Measured) -> Result:
    """The last result, if possible one with a time."""
    return max(measured.values(), key=lambda result: (result.measurement.time_s is not None, result.utc))


def _markdown(rows: list[dict[str, str]], note: str) -> str:
    """A table of rows, each of which has a cell for every heading, and a note under it."""
    if not rows:
        return f"{note}\n"
    ruler = "|" + "".join("---|" if heading in _TEXT_COLUMNS else "--:|" for heading in rows[0])
    header, *lines = ["| " + " | ".join(cells) + " |" for cells in [rows[0], *(row.values() for row in rows)]]
    return "\n".join([header, ruler, *lines, "", note, ""])


def _cell(result: Result | None, *, is_milliseconds: bool = False) -> str:
    """Time and memory, or why there is neither."""
    if result is None:
        return ""
    measurement = result.measurement
    if measurement.time_s is None or measurement.peak_extra_bytes is None:
        return measurement.status
    time = measurement.time_s * (1e3 if is_milliseconds else 1)
    digits = 3 if time < 0.1 else 2 if time < 10 else 1
    return f"{time:.{digits}f} {'ms' if is_milliseconds else 's'}, {measurement.peak_extra_bytes / 1e6:,.0f} MB"


def _shown(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)


def _ratio(one: Result | None, other: Result | None, field: str = "time_s") -> float | None:
    values = [getattr(result.measurement, field) for result in (one, other) if result is not None]
    return values[0] / values[1] if len(values) == 2 and all(values) else None


class _Panel(NamedTuple):
    """A diagram of a field of what was measured."""

    title: str
    results: list[Result]
    curves: Curves
    field: str = "time_s"
    x: str = "N"
    """What the field is drawn against: "N", "L0" or "density"."""


def _dense_panels(measured: Measured) -> list[_Panel]:
    """Time and memory against N for each dtype, at the M that most cases have."""
    shapes = [case.M for case in measured]
    m = max(set(shapes), key=shapes.count)
    curves = {(provider, mode): (*style, "-") for provider, style in _DENSE.items() for mode in _PASS}
    panels = []
    for dtype in sorted({case.dtype for case in measured}):
        mine = [r for case, r in measured.items() if (case.dtype, case.M) == (dtype, m) and case.provider != "cublas"]
        for mode, field in (("forward", "time_s"), ("forward_backward", "time_s"), ("forward", "peak_extra_bytes")):
            of_mode = [result for result in mine if result.case.mode == mode]
            panels.append(_Panel(f"{dtype}, {_PASS[mode]}", of_mode, curves, field))
    return panels


def _sparse_panels(measured: Measured) -> list[_Panel]:
    """Time and memory against N, time against L0, and time against the density of a dense x."""
    by_n, by_l0, by_density = (
        [result for case, result in measured.items() if case.benchmark == name]
        for name in ("sparse_n", "sparse_l0", "sparse_density")
    )
    return [
        _Panel("L0 = 64", by_n, _SPARSE),
        _Panel("L0 = 64", by_n, _SPARSE, "peak_extra_bytes"),
        _Panel("N = 65,536", by_l0, _SPARSE, x="L0"),
        _Panel("dense x, forward", by_density, _DENSITY, x="density"),
    ]


def _draw(panels: list[_Panel], path: Path) -> None:
    """Panels in rows of three or four, with one legend for all curves."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}
    n_columns = 4 if len(panels) == 4 else 3
    n_rows = len(panels) // n_columns
    figure = Figure(figsize=(3.2 * n_columns, 3.9 * n_rows), layout="constrained")
    labels: dict[str, Any] = {}
    for panel, axes in zip(panels, figure.subplots(n_rows, n_columns, squeeze=False).flat, strict=True):
        _draw_panel(panel, axes)
        handles, names = axes.get_legend_handles_labels()
        labels |= dict(zip(names, handles, strict=True))
    figure.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def _draw_panel(panel: _Panel, axes: Any) -> None:
    """Curves with logarithmic scales; what ran out of memory is a cross at the top."""
    top, is_density = axes.get_xaxis_transform(), panel.x == "density"
    name, unit = ("seconds", 1.0) if panel.field == "time_s" else ("peak extra memory, MB", 1e6)
    curves: dict[tuple[str, str], dict[float, Measurement]] = defaultdict(dict)
    for case, measurement, *_ in panel.results:
        at = (case.L0 or 0) / case.N if is_density else getattr(case, panel.x)
        curves[case.provider, str(case.N) if is_density else case.mode][at] = measurement
    ticks = sorted({at for measured in curves.values() for at in measured})
    for key, (label, color, line) in panel.curves.items():
        points = [(at, getattr(m, panel.field) / unit) for at, m in sorted(curves[key].items()) if m.status == "ok"]
        if is_density and key[0] == "dense":
            points = [(at, points[0][1]) for at in ticks if points]  # it takes equally long at every density
        if points:
            axes.plot(*zip(*points, strict=True), line, marker="o", markersize=4, color=color, label=label)
        for at in (at for at, measurement in curves[key].items() if measurement.status == "out of memory"):
            axes.plot(at, 0.97, "x", color=color, transform=top)
            style = {"ha": "right", "va": "center", "fontsize": 8, "color": color}
            axes.annotate("out of memory", (at, 0.97), (-6, 0), xycoords=top, textcoords="offset points", **style)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.grid(alpha=0.25)
    axes.set_xticks(ticks, [f"{at:.1%}" if is_density else f"{at:,}" for at in ticks], rotation=30)
    axes.set_ylim(top=2.5 * axes.get_ylim()[1])  # room for the crosses
    axes.set_title(f"{panel.title}: {name}", fontsize=9, loc="left")
    axes.set_xlabel(panel.x)


# the benchmarks whose names begin so: marker in the README, table, panels of the figure
_FAMILIES: dict[str, tuple[str, Callable[[Measured], str], Callable[[Measured], list[_Panel]] | None]] = {
    "dense": ("bench", dense_table, _dense_panels),
    "sparse": ("sparse-bench", sparse_table, _sparse_panels),
    "training": ("training-bench", training_table, None),
}
