"""Tables and figures from results.

On a GPU, from the time of topk_ortho and its useful operations, N(N-1)/2 * 2M,

    Tflop/s        = useful operations / time
    of model       = floor of `bench.roofline` / time
    / cuBLAS       = time / that of as many operations at the rate of the full square product of this dtype and M
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bench.cases import FRACTION, Case
from bench.results import Result, latest
from bench.roofline import floor_of_call, hardware_of
from topk_ortho.definitions import k_from_fraction, n_pairs

README = Path(__file__).resolve().parent.parent / "README.md"
_DENSE = {  # provider: label, color
    "naive": ("matmul + torch.topk", "#c44e52"),
    "naive_autograd": ("the same, autograd through the matrix", "#8c2d5a"),
    "naive_compiled": ("the same, torch.compile", "#e39aa0"),
    "chunked": ("row blocks, merged torch.topk", "#dd8452"),
    "tiled": ("topk_ortho, plain torch", "#55a868"),
    "topk_ortho": ("topk_ortho", "#2a6fbb"),
    "topk_ortho_warm": ("topk_ortho, warm", "#7fb2e5"),
    "half_gemm": ("the products alone", "#888888"),
    "cublas": ("a full square product", "#444444"),
}
_SPARSE = {  # provider, mode: label, color, line
    ("sparse", "forward_backward"): ("loss, forward + backward", "#2a6fbb", "-"),
    ("sparse", "forward"): ("loss, forward", "#7fb2e5", "-"),
    ("sparse", "pairs_fixed_k"): ("pairs listed, k fixed", "#2a6fbb", "--"),
    ("sparse", "pairs"): ("pairs listed, k = 0.1%", "#2a6fbb", ":"),
    ("scipy", "pairs_fixed_k"): ("scipy, k fixed", "#888888", "--"),
    ("scipy", "pairs"): ("scipy, k = 0.1%", "#888888", ":"),
    ("dense", "forward"): ("dense route, forward", "#c44e52", "-"),
    ("dense", "forward_backward"): ("dense route, forward + backward", "#8c2d5a", "-"),
}
_TRAINING = {
    "saelens": "SAELens",
    "saelens_sparse": "SAELens, sparse activations without rescaling (its fastest setting)",
    "topk_ortho": "topk_ortho",
    "topk_ortho_decoder": "topk_ortho, with the penalty on the decoder",
    "topk_ortho_topk": "topk_ortho, TopK",
    "topk_ortho_topk_activations": "topk_ortho, TopK, with the penalty on activations",
}
_COLUMNS = (
    "topk_ortho_warm", "topk_ortho", "tiled", "half_gemm", "cublas", "chunked", "naive", "naive_autograd",
    "naive_compiled",
)  # fmt: skip
_NOT = "not measured"
_PASS = {"forward": "forward", "forward_backward": "forward + backward"}
Measured = dict[Case, Result]


def tables_of(results: list[Result]) -> dict[str, str]:
    """The table of each family of benchmarks, by its name."""
    tables: dict[str, Callable[[Measured], str]] = {
        "dense": dense_table, "sparse": sparse_table, "training": training_table
    }  # fmt: skip
    families = _families(results)
    return {name: table(families[name]) if name in families else f"{_NOT}\n" for name, table in tables.items()}


def write_report(results: list[Result], out: Path, readme: Path | None) -> None:
    """Draw the figures beside the results file, and write the tables of what was measured into the README."""
    families = _families(results)
    if "dense" in families:
        _draw_dense(list(families["dense"].values()), out.with_suffix(".png"))
    if "sparse" in families:
        _draw_sparse(list(families["sparse"].values()), out.with_name(f"{out.stem}-sparse.png"))
    for name, text in tables_of(results).items():
        if name in families and readme is not None:
            write_into_readme(readme, "bench" if name == "dense" else f"{name}-bench", text)


def _families(results: list[Result]) -> dict[str, Measured]:
    families: dict[str, Measured] = defaultdict(dict)
    for result in latest(results):
        families[result.case.benchmark.split("_")[0]][result.case] = result
    return dict(families)


def write_into_readme(readme: Path, name: str, text: str) -> None:
    """Replace what stands between the markers of a name."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    before, rest = readme.read_text().split(begin)
    readme.write_text(before + begin + text + end + rest.split(end)[1])


def dense_table(measured: Measured) -> str:
    """Markdown: one row for every shape and mode, with time and peak memory of every provider, and ratios."""
    last = _last(measured)
    providers = [provider for provider in _COLUMNS if any(case.provider == provider for case in measured)]
    ours = "topk_ortho_warm" if "topk_ortho_warm" in providers else "topk_ortho"
    is_gpu, several = bool(last.environment.get("gpu")), len({(case.M, case.dtype) for case in measured}) > 1
    shapes = dict.fromkeys(case._replace(provider="") for case in measured if case.mode != "kernels")
    rows = []
    for shape in sorted(shapes, key=lambda case: (case.dtype, case.M, case.N, case.mode)):
        cells = {p: measured.get(shape._replace(provider=p)) for p in _COLUMNS}
        row = [*([shape.dtype, f"{shape.M:,}"] if several else []), f"{shape.N:,}", _PASS[shape.mode]]
        row += [_cell(cells[provider], 1e3 if is_gpu else 1) for provider in providers]
        peers = [_ratio(cells[peer], cells[ours]) for peer in ("naive", "naive_autograd")]
        row.append(_shown(_ratio(cells[ours], cells["half_gemm"]), ".2f"))
        row.append(" / ".join(f"{speedup:.1f} x" for speedup in peers if speedup is not None))
        row.append(_shown(_ratio(cells[ours], cells["naive"], "peak_extra_bytes"), ".2%"))
        if is_gpu:
            row += _gpu_figures(cells[ours], measured)
        rows.append(row)
    header = [*(["dtype", "M"] if several else []), "N", "pass", *(_DENSE[provider][0] for provider in providers)]
    left = (header.index("pass"), *([0] if several else []))
    header += ["time / products", "faster than naive / autograd", "memory / naive"]
    header += ["Tflop/s", "of model", "/ cuBLAS"] if is_gpu else []
    setting = "" if several else f"M = {last.case.M:,}, {last.case.dtype}, "
    note = (
        "Median time, and peak memory beyond x; forward + backward holds a gradient as large as x. "
        f"{setting}k = {last.setting['fraction']:.1%} of the pairs. {_machines(measured)}"
    )
    notes = [note, *(_kernels(result) for case, result in measured.items() if case.mode == "kernels")]
    return _markdown(header, rows, "\n\n".join([*notes, *(goals(measured) if is_gpu else [])]), left)


def sparse_table(measured: Measured) -> str:
    """Markdown: one row for every N of the first sweep, then the density at which the routes take equal time."""
    cells = {(c.N, c.provider, c.mode): result for c, result in measured.items() if c.benchmark == "sparse_n"}
    columns = [
        ("sparse", "forward"), ("sparse", "forward_backward"), ("sparse", "pairs_fixed_k"), ("scipy", "pairs_fixed_k"),
        ("sparse", "pairs"), ("scipy", "pairs"), ("dense", "forward_backward"),
    ]  # fmt: skip
    sizes = sorted({n for n, *_ in cells})
    rows = [[f"{n:,}", *(_cell(cells.get((n, *column))) for column in columns)] for n in sizes]
    last = _last(measured)
    shape = next((case for case in measured if case.benchmark == "sparse_n"), last.case)
    note = (
        f"{shape.M:,} rows of {shape.L0} active features, {shape.dtype}; k is 0.1% of the pairs "
        f"or, where it is fixed, {last.setting['fixed_k']:,}. Median time and peak extra memory. "
    )
    ends = [cells.get((n, "sparse", "forward_backward")) for n in (sizes[:1] + sizes[-1:])]
    if len(sizes) > 1 and (ratio := _ratio(ends[1], ends[0])):
        note += f"Loss and gradient at N = {sizes[-1]:,} take {ratio:.2f} times as long as at N = {sizes[0]:,}. "
    density_rows = [result for case, result in measured.items() if case.benchmark == "sparse_density"]
    at = {n: crossover(density_rows, n) for n in sorted({result.case.N for result in density_rows})}
    if crossings := [f"{density:.1%} at N = {n:,}" for n, density in at.items() if density is not None]:
        note += f"For a dense x of {density_rows[0].case.M:,} rows the two routes take equal time at a density of "
        note += f"{', '.join(crossings)}. "
    return _markdown(["N", *(_SPARSE[column][0] for column in columns)], rows, note + _machines(measured))


def training_table(measured: Measured) -> str:
    """Markdown: the time of a step of every provider that was measured."""
    times = {case.provider: result.measurement.time_s for case, result in measured.items()}
    reference = times.get("saelens")
    rows = []
    for provider, label in _TRAINING.items():
        if time_s := times.get(provider):
            rows.append([label, f"{1e3 * time_s:.0f} ms", f"{reference / time_s:.1f}" if reference else ""])
    last = _last(measured)
    note = (
        f"Median of {last.measurement.rounds} alternating steps, d_in = {last.setting['d_in']:,}, "
        f"{last.case.N:,} features, L0 = {last.case.L0}, batch {last.case.M:,}, {last.case.dtype}, "
        f"SAELens {last.environment['sae_lens']}. {_machines(measured)}"
    )
    return _markdown(["a BatchTopK step", "time", "SAELens / this"], rows, note, left=(0,))


def _kernels(result: Result) -> str:
    """The time of each kernel, in a sentence."""
    kernels = sorted((result.measurement.kernels_s or {}).items(), key=lambda item: -item[1])
    each = ", ".join(f"{name} {1e3 * time_s:.3f}" for name, time_s in kernels)
    return f"{result.case}: {each or result.measurement.note} ms"


def _gpu_figures(result: Result | None, measured: Measured) -> list[str]:
    """Tflop/s, share of the model, and time over that of cuBLAS."""
    if result is None or result.measurement.time_s is None:
        return [""] * 3
    case, time_s, hardware = result.case, result.measurement.time_s, hardware_of(result.environment["gpu"])
    k = k_from_fraction(case.N, FRACTION)
    floor_s = hardware and floor_of_call(hardware, case.M, case.N, k, case.dtype, case.mode)
    tflops, share = 2 * case.M * n_pairs(case.N) / time_s / 1e12, floor_s and floor_s / time_s
    return [f"{tflops:.1f}", _shown(share, ".0%"), _shown(to_cublas(result, measured), ".2f")]


def to_cublas(result: Result, measured: Measured) -> float | None:
    """The time over that of the products of all pairs at the rate of cuBLAS."""
    case = result.case
    for other, square in measured.items():
        if (other.provider, other.dtype, other.M) == ("cublas", case.dtype, case.M):
            ratio = _ratio(result, square)
            return ratio and ratio * other.N**2 / n_pairs(case.N)
    return None


def goals(measured: Measured) -> list[str]:
    """The figures to reach on a GPU, and what was measured."""

    def get(provider: str, mode: str, dtype: str, n: int) -> Result | None:
        return measured.get(Case("dense", provider, mode, dtype, 4096, n))

    ours = get("topk_ortho_warm", "forward", "bfloat16", 65536)
    peak = ours and ours.measurement.peak_extra_bytes
    share = peak and peak / (4 * 65536**2)
    name = "Goals at M = 4,096. Forward, bfloat16, N = 65,536: time / cuBLAS"
    lines = [
        f"{name} {_shown(ours and to_cublas(ours, measured), '.2f') or _NOT} (1.25 or less), "
        f"extra memory / N**2 float32 {_shown(share, '.2%') or _NOT} (2% or less)."
    ]
    for dtype in ("bfloat16", "float32"):
        fast = get("topk_ortho_warm", "forward_backward", dtype, 32768)
        naive, chunked = (
            _shown(_ratio(get(p, "forward_backward", dtype, 32768), fast), ".1f") or _NOT
            for p in ("naive_autograd", "chunked")
        )
        name = f"Forward + backward, {dtype}, N = 32,768"
        peers = f"autograd through the matrix {naive} (4 or more), than row blocks {chunked} (2 or more)"
        lines.append(f"{name}: times faster than {peers}.")
    return lines


def crossover(results: list[Result], n_features: int) -> float | None:
    """Density at which both routes take equally long, between two that were measured; None if there is none."""
    dense, points = density_sweep(results, n_features)
    for (density, time_s), (next_density, next_time) in itertools.pairwise(points):
        if dense is not None and time_s <= dense < next_time:
            share = math.log(dense / time_s) / math.log(next_time / time_s)
            return float(density * (next_density / density) ** share)
    return None


def density_sweep(
    results: list[Result], n_features: int, provider: str = "sparse"
) -> tuple[float | None, list[tuple[float, float]]]:
    """Seconds of the dense route, which are the same at every density; and (density, seconds) of another provider."""
    mine = [(r.case, r.measurement.time_s) for r in results if n_features == r.case.N]
    dense = next((time_s for case, time_s in mine if case.provider == "dense"), None)
    points = [((case.L0 or 0) / n_features, time_s) for case, time_s in mine if case.provider == provider and time_s]
    return dense, sorted(points)


def machine_line(result: Result) -> str:
    """What the figures depend on, in a sentence."""
    machine = result.environment
    name = (
        f"{machine['cores']} cores of {machine['cpu']} ({machine['capability']}), "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB"
    )
    if machine.get("gpu"):
        name = f"{machine['gpu']}, driver {machine['driver']}, CUDA {machine['cuda']}, Triton {machine['triton']}"
    return f"{name}, torch {machine['torch']}, commit {machine['commit']}, {result.utc} UTC."


def _machines(measured: Measured) -> str:
    """A line for each environment that results come from, with the time of the last of them."""
    ordered = sorted(measured.values(), key=lambda result: result.utc)
    return " ".join(machine_line(result) for result in {str(r.environment): r for r in ordered}.values())


def _last(measured: Measured) -> Result:
    """The last result, if possible one with a time."""
    return max(measured.values(), key=lambda result: (result.measurement.time_s is not None, result.utc))


def _markdown(header: list[str], rows: list[list[str]], note: str, left: Iterable[int] = ()) -> str:
    ruler = "|" + "".join("---|" if column in left else "--:|" for column in range(len(header)))
    lines = ["| " + " | ".join(row) + " |" for row in [header, *rows]]
    return "\n".join([lines[0], ruler, *lines[1:], "", note, ""])


def _cell(result: Result | None, scale: float = 1) -> str:
    """Time, in seconds or, scaled by 1,000, in milliseconds; and memory."""
    if result is None:
        return ""
    measurement = result.measurement
    if measurement.time_s is None or measurement.peak_extra_bytes is None:
        return measurement.status
    time = scale * measurement.time_s
    digits = 3 if time < 0.1 else 2 if time < 10 else 1
    return f"{time:.{digits}f} {'s' if scale == 1 else 'ms'}, {measurement.peak_extra_bytes / 1e6:,.0f} MB"


def _shown(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)


def _ratio(one: Result | None, other: Result | None, field: str = "time_s") -> float | None:
    values = [getattr(result.measurement, field) for result in (one, other) if result is not None]
    return values[0] / values[1] if len(values) == 2 and all(values) else None


Curves = dict[tuple[str, str], tuple[str, str, str]]
"""(provider, mode): label, color, line."""


def _time(result: Result) -> float | None:
    return result.measurement.time_s


def _megabytes(result: Result) -> float | None:
    n_bytes = result.measurement.peak_extra_bytes
    return None if n_bytes is None else n_bytes / 1e6


def _draw_dense(results: list[Result], path: Path) -> None:
    """Time and memory against N, a row of diagrams for each dtype, at the M that most cases have."""
    shapes = [result.case.M for result in results]
    m = max(set(shapes), key=shapes.count)
    dtypes = sorted({result.case.dtype for result in results})
    curves: Curves = {
        (p, mode): (label, color, "-") for p, (label, color) in _DENSE.items() for mode in _PASS if p != "cublas"
    }
    figure, all_axes = _figure(3, len(dtypes))
    for number, dtype in enumerate(dtypes):
        mine = [result for result in results if (result.case.dtype, result.case.M) == (dtype, m)]
        forward = [result for result in mine if result.case.mode == "forward"]
        both = [result for result in mine if result.case.mode == "forward_backward"]
        prefix = f"{dtype}, M = {m:,}: " if len(dtypes) > 1 else ""
        axes = all_axes[3 * number :]
        _draw_panel(axes[0], f"{prefix}forward, seconds", forward, curves, _time)
        _draw_panel(axes[1], f"{prefix}forward + backward, seconds", both, curves, _time)
        _draw_panel(axes[2], f"{prefix}forward, peak extra memory, MB", forward, curves, _megabytes)
    _save(figure, path)


def _draw_sparse(results: list[Result], path: Path) -> None:
    """Time and memory against N, time against L0, and against the density of a dense x."""
    by_n, by_l0, by_density = (
        [result for result in results if result.case.benchmark == name]
        for name in ("sparse_n", "sparse_l0", "sparse_density")
    )
    figure, axes = _figure(4)
    n_label = "N features, L0 = 64"
    _draw_panel(axes[0], "time against N, seconds", by_n, _SPARSE, _time, x_label=n_label)
    _draw_panel(axes[1], "peak extra memory, MB", by_n, _SPARSE, _megabytes, x_label=n_label)
    l0_label = "L0 of 4,096 rows, N = 65,536"
    _draw_panel(axes[2], "time against L0, seconds", by_l0, _SPARSE, _time, x="L0", x_label=l0_label)
    _draw_density(axes[3], by_density)
    _save(figure, path)


def _draw_density(axes: Any, results: list[Result]) -> None:
    """For each N the sparse route's curve, the dense route's level, where they cross, and the choice of "auto"."""
    for n, color in zip(sorted({result.case.N for result in results}), ("#7fb2e5", "#2a6fbb"), strict=False):
        dense, forced = density_sweep(results, n)
        _, chosen = density_sweep(results, n, "auto")
        axes.plot(*zip(*forced, strict=True), "-", color=color, label=f"sparse route, N = {n:,}")
        axes.plot(*zip(*chosen, strict=True), "o", color=color, markersize=4)
        if dense is not None:
            axes.axhline(dense, color=color, linestyle="--", linewidth=1, label=f"dense route, N = {n:,}")
        if (density := crossover(results, n)) is not None and dense is not None:
            style = {"xytext": (3, -11), "textcoords": "offset points", "color": color, "fontsize": 8}
            axes.annotate(f"{density:.1%}", (density, dense), **style)
        axes.set_xticks([density for density, _ in forced], [f"{density:.1%}" for density, _ in forced])
    axes.set_title("dense x, 1,024 rows: forward, seconds", fontsize=9, loc="left")
    axes.set_xlabel('density (dots: what "auto" does)')
    axes.set_ylim(top=8 * axes.get_ylim()[1])  # room for the legend
    axes.legend(fontsize=7, frameon=False, loc="upper left")


def _figure(n_columns: int, n_rows: int = 1) -> tuple[Any, list[Any]]:
    """A figure, and its axes with logarithmic scales."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}
    figure = Figure(figsize=(3.2 * n_columns, 3.9 * n_rows), layout="constrained")
    all_axes = list(figure.subplots(n_rows, n_columns, squeeze=False).flat)
    for axes in all_axes:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.grid(alpha=0.25)
    return figure, all_axes


def _draw_panel(
    axes: Any,
    title: str,
    results: list[Result],
    curves: Curves,
    value_of: Callable[[Result], float | None],
    x: str = "N",
    x_label: str = "N features",
) -> None:
    """Curves of what was measured against a field of the case; what ran out of memory is a cross at the top."""
    top = axes.get_xaxis_transform()
    for key, (label, color, line) in curves.items():
        mine = [(getattr(r.case, x), r) for r in results if (r.case.provider, r.case.mode) == key]
        points = sorted((at, value) for at, result in mine if (value := value_of(result)) is not None)
        if points:
            axes.plot(*zip(*points, strict=True), line, marker="o", markersize=4, color=color, label=label)
        for at in (at for at, result in mine if result.measurement.status == "out of memory"):
            axes.plot(at, 0.97, "x", color=color, transform=top)
            style = {"ha": "right", "va": "center", "fontsize": 8, "color": color}
            axes.annotate("out of memory", (at, 0.97), (-6, 0), xycoords=top, textcoords="offset points", **style)
    values = sorted({getattr(result.case, x) for result in results})
    axes.set_xticks(values, [f"{value:,}" for value in values], rotation=30)
    axes.set_ylim(top=2.5 * axes.get_ylim()[1])  # room for the crosses
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_xlabel(x_label)


def _save(figure: Any, path: Path) -> None:
    """With one legend for all curves that do not stand in a legend of their own."""
    curves = {
        label: handle
        for axes in sorted(figure.axes, key=lambda axes: -len(axes.get_lines()))  # first those with most curves
        if axes.get_legend() is None
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(curves.values(), curves.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
