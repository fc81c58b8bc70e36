"""Data whose true features are known: a hierarchy of sparse features in superposition.

    x = coefficients @ directions          [n, d_in] = [n, n_true] @ [n_true, d_in]

A child is on only where its parent is, and the two add up; children of one parent are never on together.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize


@dataclass(frozen=True, kw_only=True, slots=True)
class HierarchicalFeatures:
    """True features of synthetic data, one level deep.

    In each sample every feature without a parent draws a number, uniform in [0, 1), for itself and its children. A
    feature is on where that number lies in the feature's interval.
    """

    directions: Tensor
    """[n_true, d_in] float32, of unit norm."""
    parent: Tensor
    """[n_true] int64, index of the feature's parent; -1 for parents and for independent features."""
    interval: Tensor
    """[n_true, 2] float32, where the feature is on, right end excluded; a child's lies within its parent's and is
    disjoint from its siblings'."""
    magnitudes: tuple[float, float] = (0.5, 1.5)
    """Range of the coefficient of a feature that is on: uniform, independent of everything else."""

    @property
    def is_child(self) -> Tensor:
        """[n_true] bool, whether the feature has a parent."""
        return self.parent >= 0

    @property
    def is_parent(self) -> Tensor:
        """[n_true] bool, whether the feature has children."""
        return torch.isin(torch.arange(self.parent.numel(), device=self.parent.device), self.parent)

    @property
    def mean_l0(self) -> float:
        """Expected number of features that are on in a sample."""
        return self.interval.diff().sum().item()

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw samples and the coefficients that they are made of.

        Parameters
        ----------
        n : int
            Number of samples.
        generator : torch.Generator
            Decides every draw; on the device of the directions.

        Returns
        -------
        x : Tensor, shape [n, d_in], float32
            ``coefficients @ directions``, without noise.
        coefficients : Tensor, shape [n, n_true], float32
            Magnitude of each true feature, 0 where it is off.
        """
        device = self.directions.device
        root = torch.where(self.is_child, self.parent, torch.arange(self.parent.numel(), device=device))
        drawn, position = root.unique(return_inverse=True)
        number = torch.rand(n, drawn.numel(), generator=generator, device=device).index_select(1, position)
        on = (number >= self.interval[:, 0]) & (number < self.interval[:, 1])
        coefficients = torch.zeros(on.shape, device=device)
        coefficients[on] = torch.empty(int(on.sum()), device=device).uniform_(*self.magnitudes, generator=generator)
        return coefficients @ self.directions, coefficients


def hierarchical_features(
    d_in: int,
    n_parents: int,
    n_children: int,
    n_independent: int,
    *,
    parent_rate: float = 0.05,
    child_rate: float = 0.23,
    independent_rate: float = 0.01,
    generator: torch.Generator,
) -> HierarchicalFeatures:
    """Parents, their children and independent features, in random directions.

    Features are numbered in this order: parents, the children of the first parent, of the second and so on, independent
    features. With ``n_true = n_parents * (1 + n_children) + n_independent`` above d_in they are in superposition.

    Parameters
    ----------
    d_in : int
        Dimension of the space.
    n_parents, n_children, n_independent : int
        Number of parents, of children of each parent, and of features without parent and children.
    parent_rate, independent_rate : float
        Probability that a parent, or an independent feature, is on.
    child_rate : float
        Probability that a given child is on where its parent is: where the parent is on, it is alone with probability
        ``1 - n_children * child_rate``.
    generator : torch.Generator
        Draws the directions, on its device.

    Returns
    -------
    HierarchicalFeatures
        With directions uniform on the sphere and magnitudes uniform in [0.5, 1.5): mean 1, standard deviation 0.29.

    Raises
    ------
    ValueError
        If a rate is not a probability, or the rates of a parent's children add up to more than 1.
    """
    for name, rate in (
        ("parent_rate", parent_rate),
        ("independent_rate", independent_rate),
        ("n_children * child_rate", n_children * child_rate),
    ):
        if not 0 <= rate <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {rate}")
    device = generator.device
    n_true = n_parents * (1 + n_children) + n_independent
    parent = torch.full((n_true,), -1, device=device)
    children = slice(n_parents, n_parents * (1 + n_children))
    parent[children] = torch.arange(n_parents, device=device).repeat_interleave(n_children)
    edges = (parent_rate * child_rate * torch.arange(n_children + 1, device=device)).clamp(max=parent_rate)
    interval = torch.zeros(n_true, 2, device=device)
    interval[:n_parents, 1] = parent_rate
    interval[children] = torch.stack([edges[:-1], edges[1:]], dim=1).repeat(n_parents, 1)
    interval[children.stop :, 1] = independent_rate
    directions = normalize(torch.randn(n_true, d_in, generator=generator, device=device), dim=1)
    return HierarchicalFeatures(directions=directions, parent=parent, interval=interval)
