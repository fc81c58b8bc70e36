"""What is known of synthetic data: the directions of its true features, and which of them are children of which."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class TrueFeatures:
    """True features in a forest: a child is on only where its parent is."""

    directions: Tensor
    """[n_true, d_in] float32, of unit norm."""
    parent: Tensor
    """[n_true] int64, index of the feature's parent; -1 for features without one, the roots."""

    @property
    def is_child(self) -> Tensor:
        """[n_true] bool, whether the feature has a parent."""
        return self.parent >= 0

    @property
    def is_parent(self) -> Tensor:
        """[n_true] bool, whether the feature has children."""
        return torch.isin(torch.arange(self.parent.numel(), device=self.parent.device), self.parent)

    @property
    def level(self) -> Tensor:
        """[n_true] int64, number of ancestors: 0 for a root, 1 for its children, 2 for their children."""
        return self._ancestry()[0]

    @property
    def root(self) -> Tensor:
        """[n_true] int64, index of the ancestor without a parent; a root's own index."""
        return self._ancestry()[1]

    def _ancestry(self) -> tuple[Tensor, Tensor]:
        """Level and root of every feature, found by climbing from all features at once."""
        level = torch.zeros_like(self.parent)
        ancestor = torch.arange(self.parent.numel(), device=self.parent.device)
        while (is_child := self.parent[ancestor] >= 0).any():
            level += is_child
            ancestor = torch.where(is_child, self.parent[ancestor], ancestor)
        return level, ancestor
