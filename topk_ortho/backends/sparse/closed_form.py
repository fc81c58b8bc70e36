"""The sum of the squared cosines of all pairs, without a list of pairs.

With the gram of the samples, G = x_hat @ x_hat.T, it is (||G||_F**2 - sum_j gram[j, j]**2) / 2: samples that share
features take the place of features that share samples. This is done if it makes fewer products, and if the difference
is not so small that it would be rounding.
"""

import torch
from torch import Tensor

from topk_ortho.backends.sparse.coordinates import Coordinates, gradient_in_values, sum_by, unit_columns
from topk_ortho.backends.sparse.products import Slabs

_LEAST_DIFFERENCE = 1e-3  # as a share of what is subtracted: float64 sums then leave 1e-13 of the difference right


def sum_of_squares(x: Coordinates, slabs: Slabs) -> Tensor:
    """Sum of cosine**2 over all pairs, [], float32, or float64 for float64 values."""
    unit = unit_columns(x)
    total, _ = _sum_of_squares(unit.x_hat, slabs, with_gradient=False)
    return total.to(unit.norms.dtype)


def sum_of_squares_gradient(x: Coordinates, weight: Tensor, slabs: Slabs) -> Tensor:
    """Gradient in the values of x of weight [] times the sum of squares."""
    unit = unit_columns(x)
    _, gradient = _sum_of_squares(unit.x_hat, slabs, with_gradient=True)
    return gradient_in_values(x, unit, gradient * weight)


def _sum_of_squares(x_hat: Coordinates, slabs: Slabs, *, with_gradient: bool) -> tuple[Tensor, Tensor]:
    """The sum and its gradient in the values of x_hat, which is 0 unless it is wanted; float64."""
    transposed, order = x_hat.transposed()
    if transposed.n_products() < x_hat.n_products():
        # what is subtracted below leaves little: float64 throughout
        total, gradient = _sum_over_slabs(transposed._replace(values=transposed.values.double()), slabs, with_gradient)
        squares = x_hat.values.double().square()
        of_samples = sum_by(x_hat.samples, squares, x_hat.n_samples)  # diagonal of x_hat @ x_hat.T
        of_features = sum_by(x_hat.features, squares, x_hat.n_features)  # diagonal of x_hat.T @ x_hat
        to_subtract = of_features.square().sum()
        total += (of_samples.square().sum() - to_subtract) / 2
        if total > _LEAST_DIFFERENCE * to_subtract:
            if with_gradient:
                gradient = torch.empty_like(gradient).index_put_((order,), gradient)
                diagonals = of_samples[x_hat.samples] - of_features[x_hat.features]
                gradient += 2 * x_hat.values.double() * diagonals
            return total, gradient
    return _sum_over_slabs(x_hat, slabs, with_gradient)


def _sum_over_slabs(x_hat: Coordinates, slabs: Slabs, with_gradient: bool) -> tuple[Tensor, Tensor]:
    """Sum of squares over the pairs that meet, and its gradient in the values."""
    total = torch.zeros((), dtype=torch.float64, device=x_hat.values.device)
    gradient = torch.zeros_like(x_hat.values, dtype=torch.float64)
    for slab in slabs.of(x_hat):
        met = slab.cosines()
        total += met.cosines.double().square().sum()
        if with_gradient:
            weights = (2 * met.cosines).index_select(0, met.runs)
            slab.add_gradient(met.order, weights.expand(2, -1), gradient)
    return total, gradient
