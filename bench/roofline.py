"""A roofline model of every kernel: python -m bench.roofline [--m 4096] [--n 65536] [--dtype bfloat16] [--json].

    floor = max(operations / peak of their unit, bytes / bandwidth)

A model, not a measurement: nothing reaches it, and a kernel far from it may be bound by what it leaves out. Peaks and
bandwidths are those of the vendor datasheet, without structured sparsity. It counts

- operations on useful pairs, N(N-1)/2 of them, a multiply-add as two: not the padding of tiles, not the epilogues;
- bytes through device memory at least: what is read is read once, what is written is written once. Lines that are
  gathered pair by pair come from L2, whose bandwidth no datasheet states; they are listed, and are in no floor.

The sampling, the search for the cut and the sort of the records are left out: their work does not grow with N * M.
"""

import argparse
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from topk_ortho.definitions import k_from_fraction

_RESULTS = Path(__file__).resolve().parent / "results/gpu.json"

Dtype = Literal["bfloat16", "float16", "float32"]
Kind = Literal["half", "tf32", "ieee"]
"""Of a product, as in `topk_ortho.kernels.tiles`."""
Unit = Literal["half", "tf32", "fp32"]
"""What runs the operations: the matrix unit with 16-bit or tf32 operands, or the float32 FMA units."""

_UNIT: dict[Kind, Unit] = {"half": "half", "tf32": "tf32", "ieee": "fp32"}
_KIND_BYTES: dict[Kind, int] = {"half": 2, "tf32": 4, "ieee": 4}
_DTYPE_BYTES: dict[Dtype, int] = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """Peaks of one GPU, in operations and bytes a second."""

    name: str
    device_names: tuple[str, ...]
    """As the driver reports it."""
    half: float
    """bf16 or fp16 operands in the matrix unit, float32 accumulation, dense."""
    tf32: float
    """float32 operands rounded to tf32 in the matrix unit, dense."""
    fp32: float
    """float32 on the FMA units."""
    bandwidth: float
    """Of device memory."""


# Source: vendor datasheet. The A100 as SXM 80 GB, the H100 and H200 as SXM, the B200 in the HGX board.
HARDWARE = [
    Hardware(
        name="A100 SXM 80GB", device_names=("NVIDIA A100-SXM4-80GB",),
        half=312e12, tf32=156e12, fp32=19.5e12, bandwidth=2.039e12,
    ),
    Hardware(
        name="H100 SXM", device_names=("NVIDIA H100 80GB HBM3",),
        half=989.4e12, tf32=494.7e12, fp32=66.9e12, bandwidth=3.35e12,
    ),
    Hardware(
        name="H200", device_names=("NVIDIA H200",),
        half=989.4e12, tf32=494.7e12, fp32=66.9e12, bandwidth=4.8e12,
    ),
    Hardware(
        name="B200", device_names=("NVIDIA B200",),
        half=2250e12, tf32=1125e12, fp32=80e12, bandwidth=8e12,
    ),
    Hardware(
        name="MI300X", device_names=("AMD Instinct MI300X", "AMD Instinct MI300X OAM"),
        half=1307.4e12, tf32=653.7e12, fp32=163.4e12, bandwidth=5.3e12,
    ),
]  # fmt: skip


def hardware_of(device_name: str) -> Hardware | None:
    """The entry for a device, None if it is not in the table: a PCIe card is not an SXM module."""
    return next((hardware for hardware in HARDWARE if device_name in hardware.device_names), None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What one launch has to do at least."""

    kernel: str
    unit: Unit
    operations: int
    n_bytes: int
    """Through device memory."""
    gathered_bytes: int = 0
    """Through L2, pair by pair."""

    def floor_s(self, hardware: Hardware) -> float:
        """Seconds below which no launch can be."""
        return max(self.operations_s(hardware), self.n_bytes / hardware.bandwidth)

    def operations_s(self, hardware: Hardware) -> float:
        """Seconds of the operations alone."""
        peak: float = getattr(hardware, self.unit)
        return self.operations / peak


def column_norms(m: int, n: int, dtype: Dtype) -> Work:
    """x once; norm, inverse, scale, factor out. Sums the squares of x and of x * 2**-70: 5 operations an entry."""
    return Work(kernel="column_norms", unit="fp32", operations=5 * m * n, n_bytes=m * n * _DTYPE_BYTES[dtype] + 16 * n)


def round_columns(m: int, n: int) -> Work:
    """float32 x once, fp16 out. Scale, subtract, square, add: 4 operations an entry."""
    return Work(kernel="round_columns", unit="fp32", operations=4 * m * n, n_bytes=m * n * (4 + 2) + 4 * n)


def gram_select(m: int, n: int, k: int, kind: Kind) -> Work:
    """The operand and its factors once; k records of a value, a row and a column."""
    return _gram("gram_select", m, n, kind, 12 * k)


def gram_histogram(m: int, n: int, kind: Kind) -> Work:
    """One digit: 256 counters at most. Runs after a failed guess only, two to four times."""
    return _gram("gram_histogram", m, n, kind, 256 * 8)


def gram_row_max(m: int, n: int, kind: Kind) -> Work:
    """All pairs in one chunk; a packed maximum for every column."""
    return _gram("gram_row_max", m, n, kind, 8 * n)


def _gram(kernel: str, m: int, n: int, kind: Kind, out_bytes: int) -> Work:
    n_bytes = m * n * _KIND_BYTES[kind] + 4 * n + out_bytes
    return Work(kernel=kernel, unit=_UNIT[kind], operations=n * (n - 1) // 2 * 2 * m, n_bytes=n_bytes)


def rescore(m: int, n: int, k: int) -> Work:
    """k records: two lines of float32 x gathered, each scaled, multiplied and added: 4 operations for two entries."""
    columns = min(n, 2 * k)
    return Work(
        kernel="rescore",
        unit="fp32",
        operations=4 * m * k,
        n_bytes=4 * m * columns + 4 * n + 12 * k,
        gathered_bytes=2 * k * 4 * m,
    )


def pair_gradient(m: int, n: int, k: int, dtype: Dtype) -> Work:
    """Each of the 2 k partners is gathered, scaled twice and added (3 operations); 4 an entry for the Jacobian.

    x and the gradient once; offsets, partners, weights and values of a CSR with 2 k entries; norms and inverses.
    """
    return Work(
        kernel="pair_gradient",
        unit="fp32",
        operations=3 * m * 2 * k + 4 * m * n,
        n_bytes=2 * m * n * _DTYPE_BYTES[dtype] + 12 * 2 * k + 8 * (n + 1) + 8 * n,
        gathered_bytes=2 * k * m * _DTYPE_BYTES[dtype],
    )


def forward_kernels(
    hardware: Hardware, m: int, n: int, k: int, dtype: Dtype, precision: str = "highest"
) -> list[tuple[Work, Kind | None]]:
    """What a certified forward pass launches, with the kind of a gram kernel: of the routes there are the faster.

    float32 in "highest" precision is either multiplied as it is or screened in fp16 and rescored.
    """
    norms = (column_norms(m, n, dtype), None)
    rounded = (round_columns(m, n), None)

    def select(kind: Kind) -> tuple[Work, Kind]:
        return gram_select(m, n, k, kind), kind

    routes: list[list[tuple[Work, Kind | None]]]
    if dtype != "float32":
        routes = [[norms, select("half")]]
    elif precision == "high":
        routes = [[norms, select("tf32")]]
    elif precision == "medium":
        routes = [[norms, rounded, select("half")]]
    else:
        routes = [[norms, select("ieee")], [norms, rounded, select("half"), (rescore(m, n, k), None)]]
    return min(routes, key=lambda route: _total_s(hardware, (work for work, _ in route)))


def forward_floor(hardware: Hardware, m: int, n: int, k: int, dtype: Dtype, precision: str = "highest") -> float:
    """Seconds: the floors of all kernels of a certified forward pass, which run one after the other."""
    return _total_s(hardware, (work for work, _ in forward_kernels(hardware, m, n, k, dtype, precision)))


def forward_backward_floor(
    hardware: Hardware, m: int, n: int, k: int, dtype: Dtype, precision: str = "highest"
) -> float:
    """Seconds: the same with the gradient."""
    return forward_floor(hardware, m, n, k, dtype, precision) + pair_gradient(m, n, k, dtype).floor_s(hardware)


def _total_s(hardware: Hardware, works: Iterable[Work]) -> float:
    return sum(work.floor_s(hardware) for work in works)


def model(hardware: Hardware, m: int, n: int, fraction: float, dtype: Dtype, results: Any = None) -> dict[str, Any]:
    """Every kernel of the model on one GPU, beside what `results`, of bench.gpu, measured there on the same case."""
    k = k_from_fraction(n, fraction)
    kinds: tuple[Kind, ...] = ("half", "tf32", "ieee") if dtype == "float32" else ("half",)
    works: list[tuple[Work, Kind | None]] = [(column_norms(m, n, dtype), None)]
    if dtype == "float32":
        works.append((round_columns(m, n), None))
    kind: Kind | None
    for kind in kinds:
        works += [(gram_select(m, n, k, kind), kind), (gram_histogram(m, n, kind), kind)]
        works.append((gram_row_max(m, n, kind), kind))
    if dtype == "float32":
        works.append((rescore(m, n, k), None))
    works.append((pair_gradient(m, n, k, dtype), None))

    measured = _measured_ms(hardware, m, n, fraction, dtype, results)
    rows = []
    for work, kind in works:
        is_bound_by_operations = work.operations_s(hardware) >= work.n_bytes / hardware.bandwidth
        rows.append(
            {
                **asdict(work),
                "kind": kind,
                "floor_ms": 1e3 * work.floor_s(hardware),
                "bound_by": work.unit if is_bound_by_operations else "memory",
                "measured_ms": measured.get((work.kernel, kind)),
            }
        )
    totals = {"forward": forward_floor, "forward_backward": forward_backward_floor}
    return {
        "what": "a roofline model from vendor datasheets, not a measurement",
        "hardware": asdict(hardware),
        "M": m,
        "N": n,
        "k": k,
        "dtype": dtype,
        "kernels": rows,
        "calls": [
            {
                "mode": mode,
                "floor_ms": 1e3 * floor(hardware, m, n, k, dtype),
                "measured_ms": measured.get((mode, None)),
            }
            for mode, floor in totals.items()
        ],
    }


def _measured_ms(
    hardware: Hardware, m: int, n: int, fraction: float, dtype: Dtype, results: Any
) -> dict[tuple[str, Kind | None], float]:
    """By (kernel, kind) or (mode, None). Kernels that a certified pass leaves idle are not measured."""
    if results is None or results["fraction"] != fraction or hardware_of(results["environment"]["gpu"]) != hardware:
        return {}
    measured: dict[tuple[str, Kind | None], float] = {}
    for row in results["rows"]:
        if (row["M"], row["N"], row["dtype"], row["status"]) != (m, n, dtype, "ok"):
            continue
        if row["provider"] == "triton":
            measured[row["mode"], None] = row["time_ms"]
        if row["provider"] == "kernels":
            times = row["kernels_ms"]
            is_half = dtype != "float32" or "round_columns" in times
            for kernel in ("column_norms", "round_columns", "rescore", "pair_gradient"):
                if kernel in times:
                    measured[kernel, None] = times[kernel]
            if "gram_select" in times:
                measured["gram_select", "half" if is_half else "ieee"] = times["gram_select"]
    return measured


def table(results: dict[str, Any]) -> str:
    """Text of one `model`."""
    peaks = results["hardware"]
    lines = [
        f"MODEL, not a measurement: {peaks['name']}, vendor datasheet {peaks['half'] / 1e12:,.1f} (16-bit), "
        f"{peaks['tf32'] / 1e12:,.1f} (tf32), {peaks['fp32'] / 1e12:,.1f} (fp32) Tflop/s dense, "
        f"{peaks['bandwidth'] / 1e12:,.2f} TB/s",
        f"x [{results['M']:,}, {results['N']:,}] {results['dtype']}, k = {results['k']:,}",
        f"{'kernel':<20}{'kind':>6}{'Gop':>14}{'MB':>11}{'MB gathered':>13}{'floor ms':>11}{'bound by':>10}"
        f"{'measured ms':>14}",
    ]
    lines += [
        f"{row['kernel']:<20}{row['kind'] or '':>6}{row['operations'] / 1e9:>14,.1f}{row['n_bytes'] / 1e6:>11,.1f}"
        f"{row['gathered_bytes'] / 1e6:>13,.0f}{row['floor_ms']:>11.3f}{row['bound_by']:>10}"
        f"{_measured(row['measured_ms']):>14}"
        for row in results["kernels"]
    ]
    for call in results["calls"]:
        name = {"forward": "forward, sum of its kernels", "forward_backward": "forward + backward"}[call["mode"]]
        lines.append(f"{name:<64}{call['floor_ms']:>11.3f}{'':>10}{_measured(call['measured_ms']):>14}")
    return "\n".join(lines) + "\n"


def _measured(time_ms: float | None) -> str:
    return "not measured" if time_ms is None else f"{time_ms:.3f}"


def main(arguments: list[str] | None = None) -> None:
    """Print the model of every GPU of the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--m", type=int, default=4096)
    parser.add_argument("--n", type=int, default=65536)
    parser.add_argument("--fraction", type=float, default=1e-3)
    parser.add_argument("--dtype", choices=_DTYPE_BYTES, default="bfloat16")
    parser.add_argument("--results", type=Path, default=_RESULTS, help="of bench.gpu, if there are any")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options = parser.parse_args(arguments)
    results = json.loads(options.results.read_text()) if options.results.exists() else None
    models = [model(gpu, options.m, options.n, options.fraction, options.dtype, results) for gpu in HARDWARE]
    print(json.dumps(models, indent=2) if options.json else "\n".join(map(table, models)))


if __name__ == "__main__":
    main()
