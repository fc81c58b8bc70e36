"""A roofline model of every kernel: python -m bench.roofline [--m 4096] [--n 65536] [--dtype bfloat16].

    floor = max(operations / peak of their unit, bytes / bandwidth)

A model, not a measurement: nothing reaches it, and a kernel far from it may be bound by what it leaves out. The table
of `python -m bench --device cuda` has what was measured beside it. Peaks and bandwidths are those of the vendor
datasheet, without structured sparsity. It counts

- operations on useful pairs, N(N-1)/2 of them, a multiply-add as two: not the padding of tiles, not the epilogues;
- bytes through device memory at least: what is read is read once, what is written is written once. Lines that are
  gathered pair by pair come from L2, whose bandwidth no datasheet states; they are listed, and are in no floor.

The sampling, the radix select and the sort of the records are left out: their work does not grow with N * M.

Of the first pass over the gram the table also says what to expect,

    expected = operations / (share of the peak) + operations of the epilogue / peak of fp32

as if nothing hid the epilogue. `SHARES` and `EPILOGUE_OPERATIONS` are assumptions with their sources: published matrix
products in Triton, and for 16-bit operands on Hopper one measurement of this package, so that there the model repeats
what it was made from. What was measured is in bench/results.
"""

import argparse
from typing import NamedTuple

from bench.cases import FRACTION
from topk_ortho.definitions import k_from_fraction, n_pairs

Work = dict[str, float]
"""What one launch has to do at least: operations of the unit "half" or "tf32" (the matrix unit with 16-bit or tf32
operands) or "fp32" (the float32 FMA units); bytes through "memory"; bytes "gathered" through L2, pair by pair."""

ARCHITECTURES = {
    "NVIDIA A100-SXM4-80GB": "sm_80",
    "NVIDIA H100 80GB HBM3": "sm_90",
    "NVIDIA H200": "sm_90",
    "NVIDIA B200": "sm_100",
    "AMD Instinct MI300X": "gfx942",
    "AMD Instinct MI300X OAM": "gfx942",
}
# by the name that the driver reports: operations of each unit and bytes of device memory in a second, of A100, H100 and
# H200 as SXM, which a PCIe card is not, and of the B200 in the HGX board
HARDWARE = {
    "NVIDIA A100-SXM4-80GB": {"half": 312e12, "tf32": 156e12, "fp32": 19.5e12, "memory": 2.039e12},
    "NVIDIA H100 80GB HBM3": {"half": 989.4e12, "tf32": 494.7e12, "fp32": 66.9e12, "memory": 3.35e12},
    "NVIDIA H200": {"half": 989.4e12, "tf32": 494.7e12, "fp32": 66.9e12, "memory": 4.8e12},
    "NVIDIA B200": {"half": 2250e12, "tf32": 1125e12, "fp32": 80e12, "memory": 8e12},
    "AMD Instinct MI300X": {"half": 1307.4e12, "tf32": 653.7e12, "fp32": 163.4e12, "memory": 5.3e12},
    "AMD Instinct MI300X OAM": {"half": 1307.4e12, "tf32": 653.7e12, "fp32": 163.4e12, "memory": 5.3e12},
}


class Share(NamedTuple):
    """How much of the peak of a unit the loop of a first pass is taken to reach, without its epilogue."""

    of_peak: float
    source: str


_TRITON = "github.com/triton-lang/triton/issues"
SHARES = {
    ("sm_80", "half"): Share(0.55, f"Triton's tutorial on an A100, 170 Tflop/s, {_TRITON}/6523"),
    ("sm_80", "tf32"): Share(0.55, "as with 16-bit operands"),
    ("sm_80", "fp32"): Share(0.90, f"Triton's tutorial on an A100, 17.5 Tflop/s, {_TRITON}/2491"),
    ("sm_90", "half"): Share(0.67, "this pass without its epilogue on an H200 at [4096, 65536], bench/results/h200.md"),
    ("sm_90", "tf32"): Share(0.53, f"as 16-bit operands in Triton's tutorial on an H100, 525 Tflop/s, {_TRITON}/3672"),
    ("sm_90", "fp32"): Share(0.73, "cuBLAS in float32 on an H200 at [4096, 32768], bench/results/cuda.jsonl"),
    ("sm_100", "half"): Share(0.50, "a guess: as by pointers on Hopper"),
    ("sm_100", "tf32"): Share(0.50, "a guess: as with 16-bit operands"),
    ("sm_100", "fp32"): Share(0.73, "a guess: as on Hopper"),
    ("gfx942", "half"): Share(0.33, f"a guess: two thirds of torch.matmul, {_TRITON}/7199, and that half the peak"),
    ("gfx942", "tf32"): Share(0.33, "a guess: as with 16-bit operands"),
    ("gfx942", "fp32"): Share(0.33, "a guess: as with 16-bit operands"),
}
EPILOGUE_OPERATIONS = 100
"""Operations of the fp32 units for a pair of the first pass. On an H200 recording takes 1.2 to 2.1 ps a pair, see
bench/results/h200.md: 80 to 140 operations."""


def works(m: int, n: int, k: int, dtype: str) -> dict[str, Work]:
    """The work of each kernel that a call may launch; those that multiply tiles are named with the unit they use."""
    itemsize = 4 if dtype == "float32" else 2
    x_bytes = m * n * itemsize
    # norm, inverse, scale and factor of each column; squares of x and of x * 2**-70 are summed, 5 operations an entry
    result: dict[str, Work] = {"column_norms": {"fp32": 5 * m * n, "memory": x_bytes + 16 * n}}
    if dtype == "float32":
        # fp16 out; scale, subtract, square, add
        result["round_columns"] = {"fp32": 4 * m * n, "memory": m * n * (4 + 2) + 4 * n}
    for unit in ("half", "tf32", "fp32") if dtype == "float32" else ("half",):
        operand_bytes = m * n * (2 if unit == "half" else 4) + 4 * n
        out_bytes = {
            "gram_survivors": 12 * k,  # k records of a value, a row and a column
            "gram_histogram": 8 * 256,  # the counters of one digit; runs two to four times after a failed guess only
            "max_cosine": 8 * n,  # a packed maximum for every column, all pairs in one chunk
        }
        for kernel, n_bytes in out_bytes.items():
            result[f"{kernel} {unit}"] = {unit: 2 * m * n_pairs(n), "memory": operand_bytes + n_bytes}
    if dtype == "float32":
        # two columns of each record are gathered; scale both, multiply and add
        n_bytes = 4 * m * min(n, 2 * k) + 4 * n + 12 * k
        result["rescore"] = {"fp32": 4 * m * k, "memory": n_bytes, "gathered": 2 * k * 4 * m}
    # each of the 2 k partners is gathered, scaled twice and added; 4 operations an entry for the Jacobian. x and the
    # gradient once; offsets, partners, weights and values of a CSR with 2 k entries; norms and inverses
    n_bytes = 2 * x_bytes + 12 * 2 * k + 8 * (n + 1) + 8 * n
    operations = 3 * m * 2 * k + 4 * m * n
    result["pair_gradient"] = {"fp32": operations, "memory": n_bytes, "gathered": 2 * k * m * itemsize}
    return result


def floor_of(work: Work, hardware: dict[str, float]) -> tuple[float, str]:
    """Seconds below which no launch can be, and what bounds it."""
    return max((work[unit] / rate, unit) for unit, rate in hardware.items() if unit in work)


def expected_first_pass(name: str, unit: str, m: int, n: int) -> float:
    """Seconds that a first pass on the GPU `name` should take with products of this unit, by the assumptions above."""
    hardware, share = HARDWARE[name], SHARES[ARCHITECTURES[name], unit].of_peak
    return n_pairs(n) * (2 * m / (share * hardware[unit]) + EPILOGUE_OPERATIONS / hardware["fp32"])


def floor_of_call(hardware: dict[str, float], m: int, n: int, k: int, dtype: str, mode: str) -> float:
    """Seconds of the kernels of a certified call, which run one after the other.

    float32 in "highest" precision is multiplied as it is, or screened in float16 and rescored: the faster counts.
    """
    floors = {kernel: floor_of(work, hardware)[0] for kernel, work in works(m, n, k, dtype).items()}
    products = floors["gram_survivors half"]
    if dtype == "float32":
        products = min(products + floors["round_columns"] + floors["rescore"], floors["gram_survivors fp32"])
    return floors["column_norms"] + products + (floors["pair_gradient"] if mode != "forward" else 0.0)


def table(name: str, m: int, n: int, dtype: str) -> str:
    """Text: every kernel on a GPU, then the calls."""
    hardware, k = HARDWARE[name], k_from_fraction(n, FRACTION)
    half, tf32, fp32, bandwidth = (rate / 1e12 for rate in hardware.values())
    lines = [
        f"MODEL, not a measurement: {name}, vendor datasheet {half:,.1f} (16-bit), {tf32:,.1f} (tf32), "
        f"{fp32:,.1f} (fp32) Tflop/s dense, {bandwidth:,.2f} TB/s",
        f"x [{m:,}, {n:,}] {dtype}, k = {k:,}",
        f"{'kernel':<22}{'Gop':>14}{'MB':>11}{'MB gathered':>13}{'floor ms':>11}{'bound by':>10}{'expected ms':>13}",
    ]
    assumptions = [f"Expected of gram_survivors: {EPILOGUE_OPERATIONS} fp32 operations a pair, and of the peaks"]
    for kernel, work in works(m, n, k, dtype).items():
        operations, n_bytes, gathered_bytes = [*work.values(), 0.0][:3]
        floor_s, bound = floor_of(work, hardware)
        amounts = f"{operations / 1e9:>14,.1f}{n_bytes / 1e6:>11,.1f}{gathered_bytes / 1e6:>13,.0f}"
        expected = ""
        if kernel.startswith("gram_survivors"):
            unit = kernel.split()[-1]
            expected = f"{1e3 * expected_first_pass(name, unit, m, n):.3f}"
            share = SHARES[ARCHITECTURES[name], unit]
            assumptions.append(f"  {unit}: {share.of_peak:.0%}, {share.source}")
        lines.append(f"{kernel:<22}{amounts}{1e3 * floor_s:>11.3f}{bound:>10}{expected:>13}".rstrip())
    for mode in ("forward", "forward_backward"):
        floor_ms = 1e3 * floor_of_call(hardware, m, n, k, dtype, mode)
        lines.append(f"{mode.replace('_', ' + ') + ', sum of its kernels':<60}{floor_ms:>11.3f}")
    return "\n".join(lines + assumptions) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Print the model of every GPU of the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--m", type=int, default=4096)
    parser.add_argument("--n", type=int, default=65536)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    options = parser.parse_args(arguments)
    for name in HARDWARE:
        print(table(name, options.m, options.n, options.dtype))


if __name__ == "__main__":
    main()
