"""Features that are mostly 0, as indices and values, and what torch's sparse layouts have in common with them."""

from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor

from topk_ortho.backends.sparse.coordinates import Coordinates


class SparseFeatures(NamedTuple):
    """The active features of each row of x [B, n_features], as a TopK SAE has them; all others are 0.

    Taken as x by `topk_pairs`, `topk_ortho_loss` and `max_cosine_loss`, whose cost then follows B K**2 and not
    ``n_features``. No feature may be named twice in a row.

    Parameters
    ----------
    indices : Tensor, shape [B, K], int32 or int64
        Features in [0, n_features), in any order.
    values : Tensor, shape [B, K], float16, bfloat16, float32 or float64
        Their activations; gradients go here. An entry whose value is 0 is padding: its index is not looked at, and its
        gradient is 0.
    n_features : int
        N.

    Examples
    --------
    >>> x = SparseFeatures(torch.tensor([[0, 2], [1, 2]]), torch.tensor([[1.0, 2.0], [1.0, 1.0]]), n_features=3)
    >>> topk_pairs(x, k=3).values  # the pair (0, 1) never meets and is not listed
    tensor([0.8944, 0.4472])
    """

    indices: Tensor
    values: Tensor
    n_features: int

    @property
    def shape(self) -> torch.Size:
        """Shape [B, n_features] of the matrix."""
        is_int = isinstance(self.n_features, (int, torch.SymInt))
        return torch.Size((self.values.shape[0], self.n_features if is_int else int(self.n_features)))

    @property
    def device(self) -> torch.device:
        """Device of indices and values."""
        return self.values.device

    @classmethod
    def from_dense(cls, x: Tensor) -> "SparseFeatures":
        """The entries of a dense x that are not 0.

        Parameters
        ----------
        x : Tensor, shape [B, N]
            Features in columns.

        Returns
        -------
        SparseFeatures
            With K the largest number of non-zeros of a row; values are differentiable in x.

        Examples
        --------
        >>> SparseFeatures.from_dense(torch.tensor([[0.0, 3.0], [0.0, 0.0]]))
        SparseFeatures(indices=tensor([[1],
                [0]]), values=tensor([[3.],
                [0.]]), n_features=2)
        """
        is_active = x != 0
        most = int(is_active.sum(dim=1).max()) if x.shape[0] else 0
        indices = is_active.byte().argsort(dim=1, descending=True, stable=True)[:, :most].contiguous()
        return cls(indices, x.gather(1, indices), x.shape[1])

    def to_dense(self) -> Tensor:
        """The same matrix as a dense tensor.

        Returns
        -------
        Tensor, shape [B, n_features]
            In the dtype of the values, differentiable in them.

        Examples
        --------
        >>> SparseFeatures(torch.tensor([[2, 0]]), torch.tensor([[5.0, 0.0]]), n_features=4).to_dense()
        tensor([[0., 0., 5., 0.]])
        """
        is_entry = self.values != 0
        dense = self.values.new_zeros(self.values.shape[0], self.n_features)
        return dense.scatter_add(1, self.indices.long() * is_entry, torch.where(is_entry, self.values, 0))


def is_dense(x: SparseFeatures | Tensor) -> TypeGuard[Tensor]:
    """Whether x is a dense tensor, not a sparse one or `SparseFeatures`."""
    return isinstance(x, Tensor) and x.layout == torch.strided


def coordinates_of(x: SparseFeatures | Tensor) -> tuple[Coordinates, int]:
    """The entries of a sparse x in order, their values differentiable in x; and a bound on the pairs that meet.

    The bound is the number of products, one for every two features of a row of x.
    """
    if isinstance(x, SparseFeatures):
        n_samples, n_active = x.indices.shape
        features, order = x.indices.long().sort(dim=1)
        values = x.values.gather(1, order)
        samples = torch.arange(n_samples, device=x.device).repeat_interleave(n_active)
        coordinates = Coordinates(samples, features.flatten(), values.flatten(), *x.shape)
        if torch.compiler.is_compiling():  # shapes may not follow from data: padding counts
            return coordinates, n_samples * (n_active * (n_active - 1) // 2)
        return coordinates, _n_products((x.values != 0).sum(dim=1))
    # copies: torch.compile does not take views of a sparse tensor
    if x.layout == torch.sparse_coo:
        x = x.coalesce()
        samples, features = x.indices().clone()
    else:
        samples = torch.repeat_interleave(x.crow_indices().long().diff())
        features = x.col_indices().long().clone()
    return Coordinates(samples, features, x.values().clone(), *x.shape), _n_products(torch.bincount(samples))


def _n_products(n_active: Tensor) -> int:
    """Sum over the rows of x of the pairs of features active in it, from the number of active features in each row."""
    return int((n_active * (n_active - 1) // 2).sum())
