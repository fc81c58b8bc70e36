"""Arguments of the kernels, made without the kernels that make them in earnest."""

import numpy as np
import torch
from hypothesis import settings
from torch import Tensor

from tests import oracle
from tests.tolerances import float64
from topk_ortho.kernels.gram_survivors import Moments
from topk_ortho.kernels.launch import INTERPRETED, Kind, Operand
from topk_ortho.kernels.radix_select import RadixSelect

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
"""Where the kernels run: in the interpreter, on CPU tensors, or on a GPU where there is one."""


FEW = settings(max_examples=settings().max_examples // 5)
"""For properties whose every example takes the interpreter half a second."""


def to_device(tensor: Tensor) -> Tensor:
    """The same numbers in the same layout, and the same memory around them."""
    storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    return storage.to(DEVICE).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def in_padded_lines(x: Tensor) -> Tensor:
    """x in lines of a multiple of 16 entries, with NaN between the lines: kernels load it, and it must not matter."""
    holder = torch.full((x.shape[0], -(-x.shape[1] // 16) * 16), torch.nan, dtype=x.dtype)
    return holder[:, : x.shape[1]].copy_(x)


def numbers(values: object, dtype: torch.dtype) -> Tensor:
    """A tensor on the device."""
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def norms_of(x: Tensor) -> np.ndarray:
    """Column norms in float64."""
    largest = np.abs(float64(x)).max(axis=0)
    safe = np.where(largest > 0, largest, 1)
    return safe * np.sqrt(((float64(x) / safe) ** 2).sum(axis=0))


def inverse_of(x: Tensor) -> Tensor:
    """1 / max(norm, EPS), 0 for a dead column; float32 [N] on the device."""
    norms = norms_of(x)
    return torch.from_numpy(np.where(norms > 0, 1 / np.maximum(norms, oracle.EPS), 0)).float().to(DEVICE)


def operand_of(x: Tensor, kind: Kind = "ieee", *, is_scaled: bool = False) -> Operand:
    """The columns of x and their inverse norms, in one factor or split with a power of two."""
    inverse = inverse_of(x)
    if not is_scaled:
        return Operand(x=to_device(x), factor=inverse, scale=None, kind=kind)
    _, exponent = np.frexp(np.maximum(norms_of(x), oracle.EPS))
    scale = torch.from_numpy(2.0 ** (2 - exponent)).float().to(DEVICE)
    factor = (inverse.double() / scale.double()).float()
    return Operand(x=to_device(x), factor=factor, scale=scale, kind=kind, flags=numbers([1], torch.int32))


def exact_products(n: int, seed: int = 0, n_values: int | None = None) -> tuple[Operand, np.ndarray]:
    """One row, so that a cosine is one float32 product: (operand, cosines to the bit); ties if values are few."""
    generator = np.random.default_rng(seed)
    x = generator.uniform(-1, 1, n).astype(np.float32)
    if n_values is not None:
        x = generator.choice(x[:n_values], n)
    operand = Operand(
        x=torch.from_numpy(x[None, :]).to(DEVICE), factor=torch.ones(n, device=DEVICE), scale=None, kind="ieee"
    )
    return operand, x[:, None] * x[None, :]


def gram_of(x: Tensor) -> np.ndarray:
    """Cosines [N, N] in float64."""
    x_hat = oracle.normalized(float64(x))
    return x_hat.T @ x_hat


def first_digits(similarities: np.ndarray) -> np.ndarray:
    """Bins of float32 numbers from 0 to 1: octaves below 2**-8, sixteenths of an octave from there on."""
    fraction, exponent = np.frexp(similarities)  # at least 0.5, below 1
    fine = 119 + 16 * (exponent + 7) + np.floor(32 * fraction - 16).astype(np.int64)
    return np.where(similarities < 2.0**-8, similarities.view(np.int32) >> 23, fine)


def range_of_first_digit(digit: int) -> tuple[int, int]:
    """(bits of the smallest number, bits that tell its numbers apart) of such a bin."""
    if digit < 119:
        return digit << 23, 23
    octave, sixteenth = divmod(digit - 119, 16)
    return int(np.float32(2.0 ** (octave - 8) * (1 + sixteenth / 16)).view(np.int32)), 19


def radix_at(
    stage: int,
    n_features: int,
    *,
    bound: float = -1.0,
    slack: float = 0.0,
    least: float = -2.0,
    lowest: int = 0,
    width: int = 30,
    above: int = 0,
    tie_row: int | None = None,
    n_passes: int = 1,
    failure: int = 0,
) -> RadixSelect:
    """What an earlier kernel left behind, counters at zero."""
    return RadixSelect(
        plan=numbers(
            [stage, lowest, width, above, n_features if tie_row is None else tie_row, n_passes, failure], torch.int64
        ),
        bounds=numbers([bound, slack, least], torch.float32),
        sample_histogram=torch.zeros(4096, dtype=torch.int64, device=DEVICE),
        digit_histograms=torch.zeros(4, 256, dtype=torch.int64, device=DEVICE),
        screen_histograms=torch.zeros(2, 256, dtype=torch.int64, device=DEVICE),
        row_ties=torch.zeros(n_features, dtype=torch.int32, device=DEVICE),
        n_survivors=torch.zeros(1, dtype=torch.int64, device=DEVICE),
        n_certified=torch.zeros(1, dtype=torch.int64, device=DEVICE),
        arrived=torch.zeros(1, dtype=torch.int64, device=DEVICE),
    )


def empty_moments(operand: Operand, n_std: float = 1.0) -> Moments:
    """NaN, for a pass over an operand to fill."""
    lines = torch.full((operand.n_programs, 3), torch.nan, dtype=torch.float64, device=DEVICE)
    return Moments(lines, numbers([torch.nan], torch.float32), n_std)


def copy_of(radix: RadixSelect) -> RadixSelect:
    """To compare with later."""
    return RadixSelect(*(tensor.clone() for tensor in radix))


def assert_same(*, actual: RadixSelect, expected: RadixSelect, but: tuple[str, ...] = ()) -> None:
    """All fields are equal, to the bit, except those in `but`."""
    for name in set(RadixSelect._fields) - set(but):
        assert torch.equal(getattr(actual, name).view(torch.int32), getattr(expected, name).view(torch.int32)), name
