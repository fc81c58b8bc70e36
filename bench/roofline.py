"""A roofline model of every kernel: python -m bench.roofline [--m 4096] [--n 65536] [--dtype bfloat16].

    floor = max(operations / peak of their unit, bytes / bandwidth)

A model, not a measurement: nothing reaches it, and a kernel far from it may be bound by what it leaves out. The table
of `python -m bench --device cuda` has what was measured beside it. Peaks and bandwidths are those of the vendor
datasheet, without structured sparsity. It counts

- operations on useful pairs, N(N-1)/2 of them, a multiply-add as two: not the padding of tiles, not the epilogues;
- bytes through device memory at least: what is read is read once, what is written is written once. Lines that are
  gathered pair by pair come from L2, whose bandwidth no datasheet states; they are listed, and are in no floor.

The sampling, the radix select and the sort of the records are left out: their work does not grow with N * M.
"""

import argparse
from typing import Literal, NamedTuple

from bench.cases import FRACTION
from topk_ortho.definitions import k_from_fraction, n_pairs

_DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
Unit = Literal["half", "tf32", "fp32"]
"""What runs operations: the matrix unit with 16-bit or tf32 operands, or the float32 FMA units."""


class Hardware(NamedTuple):
    """Peaks of one GPU, in operations and bytes a second, as the vendor's datasheet states them."""

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


# the A100 as SXM 80 GB, the H100 and H200 as SXM, the B200 in the HGX board
HARDWARE = [
    Hardware("A100 SXM 80GB", ("NVIDIA A100-SXM4-80GB",), 312e12, 156e12, 19.5e12, 2.039e12),
    Hardware("H100 SXM", ("NVIDIA H100 80GB HBM3",), 989.4e12, 494.7e12, 66.9e12, 3.35e12),
    Hardware("H200", ("NVIDIA H200",), 989.4e12, 494.7e12, 66.9e12, 4.8e12),
    Hardware("B200", ("NVIDIA B200",), 2250e12, 1125e12, 80e12, 8e12),
    Hardware("MI300X", ("AMD Instinct MI300X", "AMD Instinct MI300X OAM"), 1307.4e12, 653.7e12, 163.4e12, 5.3e12),
]


def hardware_of(device_name: str | None) -> Hardware | None:
    """The entry for a device, None if it is not in the table: a PCIe card is not an SXM module."""
    return next((hardware for hardware in HARDWARE if device_name in hardware.device_names), None)


class Work(NamedTuple):
    """What one launch has to do at least."""

    unit: Unit
    operations: int
    n_bytes: int
    """Through device memory."""
    gathered_bytes: int = 0
    """Through L2, pair by pair."""

    def bounds_s(self, hardware: Hardware) -> tuple[float, float]:
        """Seconds of the operations and of the bytes, each alone."""
        peak: float = getattr(hardware, self.unit)
        return self.operations / peak, self.n_bytes / hardware.bandwidth


def works(m: int, n: int, k: int, dtype: str) -> dict[str, Work]:
    """The work of each kernel that a call may launch; those that multiply tiles are named with the unit they use."""
    itemsize = _DTYPE_BYTES[dtype]
    x_bytes = m * n * itemsize
    # norm, inverse, scale and factor of each column; squares of x and of x * 2**-70 are summed, 5 operations an entry
    result = {"column_norms": Work("fp32", 5 * m * n, x_bytes + 16 * n)}
    units: list[Unit] = ["half"]
    if dtype == "float32":
        units = ["half", "tf32", "fp32"]
        # fp16 out; scale, subtract, square, add
        result["round_columns"] = Work("fp32", 4 * m * n, m * n * (4 + 2) + 4 * n)
    for unit in units:
        operand_bytes = m * n * (2 if unit == "half" else 4) + 4 * n
        out_bytes = {
            "gram_survivors": 12 * k,  # k records of a value, a row and a column
            "gram_histogram": 8 * 256,  # the counters of one digit; runs two to four times after a failed guess only
            "max_cosine": 8 * n,  # a packed maximum for every column, all pairs in one chunk
        }
        for kernel, n_bytes in out_bytes.items():
            result[f"{kernel} {unit}"] = Work(unit, 2 * m * n_pairs(n), operand_bytes + n_bytes)
    if dtype == "float32":
        # two columns of each record are gathered; scale both, multiply and add
        n_bytes = 4 * m * min(n, 2 * k) + 4 * n + 12 * k
        result["rescore"] = Work("fp32", 4 * m * k, n_bytes, gathered_bytes=2 * k * 4 * m)
    # each of the 2 k partners is gathered, scaled twice and added; 4 operations an entry for the Jacobian. x and the
    # gradient once; offsets, partners, weights and values of a CSR with 2 k entries; norms and inverses
    n_bytes = 2 * x_bytes + 12 * 2 * k + 8 * (n + 1) + 8 * n
    gathered_bytes = 2 * k * m * itemsize
    result["pair_gradient"] = Work("fp32", 3 * m * 2 * k + 4 * m * n, n_bytes, gathered_bytes)
    return result


def floors_of(hardware: Hardware, m: int, n: int, k: int, dtype: str) -> dict[str, float]:
    """Seconds below which no launch of a kernel can be."""
    return {kernel: max(work.bounds_s(hardware)) for kernel, work in works(m, n, k, dtype).items()}


def floor_of_call(hardware: Hardware, m: int, n: int, k: int, dtype: str, mode: str) -> float:
    """Seconds of the kernels of a certified call, which run one after the other.

    float32 in "highest" precision is multiplied as it is, or screened in float16 and rescored: the faster counts.
    """
    floors = floors_of(hardware, m, n, k, dtype)
    routes = [["column_norms", "gram_survivors half"]]
    if dtype == "float32":
        screened = ["column_norms", "round_columns", "gram_survivors half", "rescore"]
        routes = [["column_norms", "gram_survivors fp32"], screened]
    forward = min(sum(floors[kernel] for kernel in route) for route in routes)
    return forward + (floors["pair_gradient"] if mode != "forward" else 0.0)


def table(hardware: Hardware, m: int, n: int, dtype: str) -> str:
    """Text: every kernel, then the calls."""
    k = k_from_fraction(n, FRACTION)
    lines = [
        f"MODEL, not a measurement: {hardware.name}, vendor datasheet {hardware.half / 1e12:,.1f} (16-bit), "
        f"{hardware.tf32 / 1e12:,.1f} (tf32), {hardware.fp32 / 1e12:,.1f} (fp32) Tflop/s dense, "
        f"{hardware.bandwidth / 1e12:,.2f} TB/s",
        f"x [{m:,}, {n:,}] {dtype}, k = {k:,}",
        f"{'kernel':<22}{'Gop':>14}{'MB':>11}{'MB gathered':>13}{'floor ms':>11}{'bound by':>10}",
    ]
    for kernel, work in works(m, n, k, dtype).items():
        operations_s, bytes_s = work.bounds_s(hardware)
        lines.append(
            f"{kernel:<22}{work.operations / 1e9:>14,.1f}{work.n_bytes / 1e6:>11,.1f}"
            f"{work.gathered_bytes / 1e6:>13,.0f}{1e3 * max(operations_s, bytes_s):>11.3f}"
            f"{work.unit if operations_s >= bytes_s else 'memory':>10}"
        )
    for mode in ("forward", "forward_backward"):
        floor_ms = 1e3 * floor_of_call(hardware, m, n, k, dtype, mode)
        lines.append(f"{mode.replace('_', ' + ') + ', sum of its kernels':<60}{floor_ms:>11.3f}")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Print the model of every GPU of the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--m", type=int, default=4096)
    parser.add_argument("--n", type=int, default=65536)
    parser.add_argument("--dtype", choices=_DTYPE_BYTES, default="bfloat16")
    options = parser.parse_args(arguments)
    for hardware in HARDWARE:
        print(table(hardware, options.m, options.n, options.dtype))


if __name__ == "__main__":
    main()
