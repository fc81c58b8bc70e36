"""The tables of block sizes, what is read off the device, and how many programs a launch has."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget

from tests.inputs import normal
from tests.kernels.arguments import operand_of
from topk_ortho.kernels import launch
from topk_ortho.kernels.launch import LEAN_CONFIGS, TILE_CONFIGS, TileConfig

EVERY_CONFIG = {("lean", *key): config for key, config in LEAN_CONFIGS.items()} | {
    ("full", *key): config for key, config in TILE_CONFIGS.items()
}

KINDS = ("half", "tf32", "ieee")
SHARED_MEMORY = {"sm_80": (99, 164), "sm_90": (227, 227), "sm_100": (227, 227), "gfx942": (64, 64)}
"""KB for a program and for a multiprocessor; for sm_80 the former of the smaller chips that use its entries too."""


class TestTileConfigs:
    """The tables are complete, and every entry is possible; test_compile_report.py says how well it does."""

    def test_every_kind_of_every_architecture(self):
        assert set(TILE_CONFIGS) == {(arch, kind) for arch in (*SHARED_MEMORY, "interpreter") for kind in KINDS}
        assert set(LEAN_CONFIGS) < set(TILE_CONFIGS)

    @pytest.mark.parametrize("key", EVERY_CONFIG, ids="-".join)
    def test_shape(self, key):
        config = EVERY_CONFIG[key]
        for number in (config.block, config.block_m, config.num_warps):
            assert number > 0
            assert number & (number - 1) == 0, "not a power of two"
        assert config.block >= 64, "a quarter of a tile is too narrow for a matrix unit"
        assert config.block_m >= 16
        assert min(config.group, config.num_stages, config.programs_per_sm) >= 1

    @pytest.mark.parametrize("key", [key for key in EVERY_CONFIG if "interpreter" not in key], ids="-".join)
    def test_fits(self, key):
        _, arch, kind = key
        config = EVERY_CONFIG[key]
        of_program, of_all = SHARED_MEMORY[arch]
        bytes_used = config.num_stages * 2 * config.block * config.block_m * (2 if kind == "half" else 4)
        assert bytes_used <= 1024 * of_program
        assert config.programs_per_sm * bytes_used <= 1024 * of_all
        n_sums = config.block**2 / (32 * config.num_warps)
        assert n_sums < (config.max_registers or 255) - 32, "sums leave no registers"
        if arch.startswith("sm_") and config.max_registers is not None:
            assert 32 * config.num_warps * config.programs_per_sm * config.max_registers <= 65536

    def test_options(self):
        config = TileConfig(
            block=64, block_m=16, group=1, num_warps=4, num_stages=2, programs_per_sm=1, max_registers=96
        )
        assert config.options("sm_80") == {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True, "maxnreg": 96}
        assert "maxnreg" not in config.options("gfx942")
        assert "maxnreg" not in dataclasses.replace(config, max_registers=None).options("sm_80")

    @pytest.mark.parametrize(("n", "n_tiles"), [(2, 1), (64, 1), (65, 3), (128, 3), (129, 6)])
    def test_programs(self, n, n_tiles, monkeypatch):
        """A launch has one program for each place on the device, and no more programs than tiles."""
        operand = operand_of(torch.ones(3, n))
        config = TileConfig(block=64, block_m=16, group=1, num_warps=4, num_stages=1, programs_per_sm=2)
        monkeypatch.setitem(TILE_CONFIGS, ("two multiprocessors", "ieee"), config)
        monkeypatch.setattr(launch, "current_device", lambda: launch.Device("two multiprocessors", 2, True, None))
        assert operand.n_tiles == n_tiles
        assert operand.n_programs == min(n_tiles, 4)


@pytest.mark.parametrize(
    ("target", "architecture", "has_tf32", "sums"),
    [
        (GPUTarget("cuda", 80, 32), "sm_80", True, (8, 24)),
        (GPUTarget("cuda", 86, 32), "sm_80", True, (8, 24)),
        (GPUTarget("cuda", 87, 32), "sm_80", True, None),
        (GPUTarget("cuda", 89, 32), "sm_80", True, (8, 24)),
        (GPUTarget("cuda", 90, 32), "sm_90", True, (16, 25)),
        (GPUTarget("cuda", 100, 32), "sm_100", True, (16, 25)),
        (GPUTarget("cuda", 103, 32), "sm_100", True, None),
        (GPUTarget("cuda", 110, 32), "sm_80", True, None),
        (GPUTarget("cuda", 120, 32), "sm_80", True, (16, 25)),
        (GPUTarget("hip", "gfx942", 64), "gfx942", True, (8, 24)),
        (GPUTarget("hip", "gfx90a", 64), "gfx942", False, None),
        (GPUTarget("hip", "gfx950", 64), "gfx942", False, None),
    ],
    ids=lambda part: str(getattr(part, "arch", part)),
)
def test_every_device_has_a_table_entry(target, architecture, has_tf32, sums, monkeypatch):
    """Its own, or that of the nearest architecture; of its sums only what is known of the device itself."""

    class Driver:
        utils = SimpleNamespace(get_device_properties=lambda number: {"multiprocessor_count": 100 + number})

        def get_current_device(self):
            return 3

        def get_current_target(self):
            return target

    monkeypatch.setattr(launch, "INTERPRETED", triton.language.constexpr(False))
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    sum_error = None if sums is None else worst_case(*sums)
    assert launch.current_device() == launch.Device(architecture, 103, has_tf32, sum_error)
    assert all((architecture, kind) in TILE_CONFIGS for kind in KINDS)


def worst_case(n_products: int, fraction_bits: int) -> float:
    """A product's share of what a matrix unit drops of a sum up to 1."""
    return ((n_products + 1) / 2**fraction_bits + 1 / 2**23) / n_products


def sum_of_matrix_unit(products: np.ndarray, n_products: int, fraction_bits: int) -> float:
    """The sum as the unit makes it, block by block: aligned, cut off, added, and cut off to float32."""
    total = 0.0
    for block in products.reshape(-1, n_products):
        terms = np.array([total, *block])
        _, exponent = np.frexp(np.abs(terms).max())
        step = 2.0 ** (exponent - 1 - fraction_bits)
        aligned = (np.trunc(terms / step) * step).sum()
        _, exponent = np.frexp(aligned)
        step = 2.0 ** (exponent - 24)
        total = np.trunc(aligned / step) * step
    return total


@pytest.mark.parametrize(("n_products", "fraction_bits"), [(8, 24), (16, 25)], ids=str)
class TestSumErrors:
    """The bound on the rounding of sums holds, and no much smaller one would do."""

    def test_random_products(self, n_products, fraction_bits):
        """Their magnitudes sum up to 1, as those of the products of unit columns do at most."""
        generator = np.random.default_rng(0)
        for sharpness in (0.1, 1.0, 4.0):
            for _ in range(5):
                products = generator.normal(size=4096) * generator.random(4096) ** sharpness
                products /= np.abs(products).sum()
                error = abs(sum_of_matrix_unit(products, n_products, fraction_bits) - products.sum())
                assert 0 < error <= 4096 * worst_case(n_products, fraction_bits)

    def test_the_worst_products(self, n_products, fraction_bits):
        """Beside a sum of 1, nearly all of each is dropped, and one of each block together with what is added last."""
        unit = 2.0**-fraction_bits
        block = np.full(n_products, 0.999 * unit)
        block[0] = 2.0**-23 - unit
        products = np.concatenate([[1.0], np.zeros(n_products - 1), *[block] * 200])
        error = products.sum() - sum_of_matrix_unit(products, n_products, fraction_bits)
        bound = 200 * n_products * worst_case(n_products, fraction_bits)
        assert 0.7 * bound < error <= bound


class TestDescribable:
    """What tensor descriptors can address: lines without gaps that begin at multiples of 16 bytes."""

    @pytest.mark.parametrize(
        ("make", "is_describable"),
        [
            (lambda: torch.empty(3, 24, dtype=torch.bfloat16), True),
            (lambda: torch.empty(24, 3, dtype=torch.bfloat16).T, False),  # lines of 6 bytes
            (lambda: torch.empty(3, 24, dtype=torch.bfloat16).T, True),
            (lambda: torch.empty(3, 20, dtype=torch.bfloat16), False),
            (lambda: torch.empty(3, 20), True),
            (lambda: torch.empty(3, 40, dtype=torch.bfloat16)[:, 1:25], False),  # begins at 2 bytes
            (lambda: torch.empty(3, 40, dtype=torch.bfloat16)[:, 8:25], True),
            (lambda: torch.empty(3, 48, dtype=torch.bfloat16)[:, ::2], False),
            (lambda: torch.empty(1, 24, dtype=torch.bfloat16).expand(3, 24), False),
        ],
        ids=["rows", "short_lines", "columns", "ragged", "float32", "shifted", "sliced", "gaps", "repeated"],
    )
    def test_is_describable(self, make, is_describable):
        assert launch.is_describable(make()) == is_describable


BF16 = torch.bfloat16


class TestAligned:
    """Lines that kernels load by vectors: they begin at multiples of 16 entries, and end there, or have room for it."""

    @pytest.mark.parametrize(
        ("make", "n_loaded", "is_aligned"),
        [
            (lambda: torch.empty(3, 32, dtype=BF16), 32, True),
            (lambda: torch.empty(3, 24, dtype=BF16), 24, False),  # what follows the last line is not of x
            (lambda: torch.empty(4, 24, dtype=BF16)[:3], 32, False),  # lines begin at multiples of 8
            (lambda: torch.empty(3, 32, dtype=BF16)[:, :20], 32, True),
            (lambda: torch.empty(3, 48, dtype=BF16)[:, 16:36], 32, True),
            (lambda: torch.empty(3, 48, dtype=BF16)[:, 16:32], 16, True),
            (lambda: torch.empty(3, 48, dtype=BF16)[:, 28:48], 20, False),
            (lambda: torch.empty(3, 48, dtype=BF16)[:, 4:24], 32, False),  # begins at 8 bytes
            (lambda: torch.empty(20, 32, dtype=BF16).T, 20, True),
            (lambda: torch.empty(32, 20, dtype=BF16).T, 32, False),
            (lambda: torch.empty(32, 48, dtype=BF16).T[:20], 32, False),  # rows are not masked, but for the last
            (lambda: torch.empty(3, 64, dtype=BF16)[:, ::2], 32, False),
            (lambda: torch.empty(32, dtype=BF16).expand(3, 32), 32, True),
            (lambda: torch.empty(3, 1, dtype=BF16).expand(3, 32), 32, False),
            (lambda: torch.empty(3, 20, device="meta"), 20, False),
        ],
        ids=[
            "rows", "ragged", "room_at_the_end", "padded", "padded_slice", "slice", "to_the_end", "shifted",
            "columns", "ragged_columns", "padded_columns", "gaps", "one_row", "one_column", "no_memory",
        ],
    )  # fmt: skip
    def test_what_is_aligned(self, make, n_loaded, is_aligned):
        x = make()
        assert launch.n_loaded(x) == n_loaded
        assert launch.is_aligned(x) == is_aligned

    @pytest.mark.parametrize("shape", [(1, 1), (3, 20), (20, 3), (7, 64)], ids=str)
    @pytest.mark.parametrize("is_feature_major", [False, True], ids=["row_major", "feature_major"])
    @pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
    def test_empty_aligned(self, shape, is_feature_major, dtype):
        x = torch.empty(shape[::-1]).T if is_feature_major else torch.empty(shape)
        empty = launch.empty_aligned(x, dtype)
        assert (empty.shape, empty.dtype) == (x.shape, dtype)
        assert launch.is_describable(empty)
        assert max(empty.stride()) % 16 == 0
        assert launch.is_aligned(empty) == (empty.stride(1) == 1 or shape[0] % 16 == 0)

    @pytest.mark.parametrize(
        ("make", "n_rows"),
        [
            (lambda x: x, 21),
            (lambda x: x.T.contiguous().T, 32),  # rows of zeros
            (lambda x: x.repeat(1, 2).T.contiguous().T[:, :37], 32),
            (lambda x: x.repeat_interleave(2, dim=1)[:, ::2], 21),
        ],
        ids=["row_major", "feature_major", "feature_major_slice", "gaps"],
    )
    def test_what_is_not_is_copied(self, make, n_rows):
        x = normal(21, 37, dtype=BF16)
        copy = launch.aligned(make(x))
        assert launch.is_aligned(copy)
        assert launch.is_describable(copy)
        assert copy.shape == (n_rows, 37)
        assert torch.equal(copy[:21], x)
        assert not copy[21:].any()
        assert launch.aligned(copy) is copy


@pytest.mark.parametrize(
    ("architecture", "kind", "is_row_major", "expected"),
    [
        ("sm_80", "half", True, True),
        ("sm_80", "half", False, False),
        ("sm_80", "tf32", True, False),
        ("sm_90", "half", True, True),
        ("gfx942", "tf32", True, True),
        ("gfx942", "tf32", False, False),
    ],
)
def test_which_tiles_are_loaded_transposed(architecture, kind, is_row_major, expected, on_architecture):
    on_architecture(architecture)
    x = torch.ones(16, 32)
    operand = operand_of(x if is_row_major else x.T.contiguous().T, kind)
    assert operand.arguments()["TRANSPOSED"] == expected


@pytest.fixture
def on_architecture(monkeypatch):
    """Take the device for another one."""

    def take(architecture, **fields):
        device = launch.current_device()._replace(architecture=architecture, **fields)
        monkeypatch.setattr(launch, "current_device", lambda: device)

    return take


@pytest.mark.parametrize(
    ("architecture", "kind", "expected"),
    [("sm_80", "half", 2), ("sm_90", "tf32", 2), ("sm_90", "ieee", 1), ("gfx942", "half", 1)],
)
def test_who_looks_at_flags(architecture, kind, expected, on_architecture):
    """Kernels that have a loop for columns as they are and one for scaled ones."""
    on_architecture(architecture)
    assert operand_of(torch.ones(16, 32), kind, is_scaled=True).arguments()["SCALED"] == expected
    assert operand_of(torch.ones(16, 32), kind).arguments()["SCALED"] == 0


@pytest.mark.parametrize(
    ("n_rows", "restarts", "expected"),
    [(5000, False, 5000), (5000, True, 2048 + 3), (9, True, 9 + 1), (2048, True, 2048 + 1)],
)
def test_sum_error(n_rows, restarts, expected, on_architecture):
    """2**-24 of every product, and of every sum that is added to the total."""
    on_architecture("sm_90", sum_error=2.0**-24)
    assert launch.sum_error(n_rows, restarts=restarts) == expected * 2.0**-24
    on_architecture("sm_90", sum_error=None)
    assert launch.sum_error(n_rows, restarts=restarts) is None


def test_tiles_with_blocked_summation(on_architecture):
    """The total takes as many registers as the sums, so that those configs that leave no room for it are not taken."""
    x = torch.ones(16, 32, dtype=BF16)
    for architecture in ("sm_80", "sm_90", "sm_100", "gfx942"):
        on_architecture(architecture)
        operand = dataclasses.replace(operand_of(x, "half"), is_lean=True, restarts=True)
        assert (operand.config.block, operand.config.block_col or 128, operand.config.programs_per_sm) == (128, 128, 1)
        assert operand.arguments()["RESTART"] == launch.RESTART_ROWS


def test_a_block_of_a_sum_ends_with_a_step():
    """A descriptor's box of rows would reach beyond it."""
    configs = [*TILE_CONFIGS.values(), *launch.RESTARTED_CONFIGS.values()]
    assert {launch.RESTART_ROWS % config.block_m for config in configs} == {0}
