"""Data whose true features are known: a hierarchy of sparse features.

    x = coefficients @ directions          [n, d_in] = [n, n_true] @ [n_true, d_in]

A child is on only where its parent is, and the two add up; children of one parent are never on together.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from topk_ortho.activations.true_features import TrueFeatures


@dataclass(frozen=True, kw_only=True, slots=True)
class HierarchicalFeatures(TrueFeatures):
    """True features of synthetic data, in exclusive families.

    In each sample every root draws a number, uniform in [0, 1), for itself and its descendants. A feature is on where
    that number lies in the feature's interval. The numbers of different roots are independent, or correlated by a
    Gaussian copula: each is the normal distribution function of a standard normal score, and the scores of two roots of
    one group have the given correlation.
    """

    interval: Tensor
    """[n_true, 2] float32, where the feature is on, right end excluded; a child's lies within its parent's and is
    disjoint from its siblings'."""
    magnitudes: tuple[float, float] = (0.5, 1.5)
    """Range of the coefficient of a feature that is on: uniform, independent of everything else."""
    correlation: float = 0.0
    """Correlation of the normal scores of two roots of one group, in [0, 1)."""
    n_groups: int = 1
    """Number of groups; the roots are dealt to them in turn."""

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
        roots, position = self.root.unique(return_inverse=True)
        number = self._numbers(n, roots.numel(), generator).index_select(1, position)
        on = (number >= self.interval[:, 0]) & (number < self.interval[:, 1])
        coefficients = torch.zeros(on.shape, device=device)
        coefficients[on] = torch.empty(int(on.sum()), device=device).uniform_(*self.magnitudes, generator=generator)
        return coefficients @ self.directions, coefficients

    def _numbers(self, n: int, n_roots: int, generator: torch.Generator) -> Tensor:
        """Uniform numbers [n, n_roots] that decide what is on."""
        device = self.directions.device
        if self.correlation == 0:
            return torch.rand(n, n_roots, generator=generator, device=device)
        own = torch.randn(n, n_roots, generator=generator, device=device)
        shared = torch.randn(n, self.n_groups, generator=generator, device=device)
        group = torch.arange(n_roots, device=device) % self.n_groups
        score = (1 - self.correlation) ** 0.5 * own + self.correlation**0.5 * shared[:, group]
        # in float32 the distribution function of a large score would round to 1, where no feature is on
        numbers: Tensor = torch.special.ndtr(score.double())
        return numbers


def hierarchical_features(
    d_in: int,
    n_parents: int,
    n_children: int,
    n_independent: int,
    *,
    depth: int = 1,
    parent_rate: float = 0.05,
    child_rate: float = 0.23,
    independent_rate: float = 0.01,
    zipf_exponent: float = 0.0,
    correlation: float = 0.0,
    group_size: int = 8,
    directions: Literal["random", "orthogonal"] = "random",
    child_parent_cosine: float | None = None,
    generator: torch.Generator,
) -> HierarchicalFeatures:
    """Parents, their descendants and independent features.

    Features are numbered in this order: parents; the children of the first parent, of the second and so on; the
    children of these children, if the hierarchy is deeper; independent features. The directions are in superposition
    if there are more features than dimensions.

    Parameters
    ----------
    d_in : int
        Dimension of the space.
    n_parents, n_children, n_independent : int
        Number of parents, of children of each parent, and of features without parent and children.
    depth : int, default 1
        Number of levels below the parents. From 2 on, every child has `n_children` children of its own, and so on.
    parent_rate, independent_rate : float
        Probability that a parent, or an independent feature, is on: the mean, if these differ.
    child_rate : float
        Probability that a given child is on where its parent is: where the parent is on, it is alone with probability
        ``1 - n_children * child_rate``. This holds on every level.
    zipf_exponent : float, default 0
        With s > 0 the rates of the parents are proportional to rank ** -s, in the order of their numbers, and so are
        those of the independent features. The mean rates stay as they are, and with them the mean L0.
    correlation : float, default 0
        Correlation, in [0, 1), of the normal scores of two roots (parents and independent features) of one group, in
        the Gaussian copula that makes them fire together. Every feature keeps its rate. SynthSAEBench [1]_ uses the
        same copula with a random correlation matrix of low rank; here it is equal within groups.
    group_size : int, default 8
        Number of correlated roots in a group. If it does not divide the number of roots, some groups have one fewer.
    directions : {"random", "orthogonal"}
        Directions that are uniform on the sphere and independent, or orthonormal.
    child_parent_cosine : float, optional
        Cosine, in [0, 1), of every child's direction to its parent's: the child's own direction is turned towards it,
        within the plane of the two. None leaves it as it was drawn.
    generator : torch.Generator
        Draws the directions, on its device.

    Returns
    -------
    HierarchicalFeatures
        With magnitudes uniform in [0.5, 1.5): mean 1, standard deviation 0.29.

    Raises
    ------
    ValueError
        If a rate is not a probability, the rates of a parent's children add up to more than 1, or there are too few
        dimensions for orthogonal directions.

    References
    ----------
    .. [1] SynthSAEBench, arXiv:2602.14687.
    """
    for name, rate in (
        ("parent_rate", parent_rate),
        ("independent_rate", independent_rate),
        ("n_children * child_rate", n_children * child_rate),
    ):
        if not 0 <= rate <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {rate}")
    device = generator.device
    parent_rates = _zipf_rates(n_parents, parent_rate, zipf_exponent, device)
    independent_rates = _zipf_rates(n_independent, independent_rate, zipf_exponent, device)

    numbers = torch.arange(n_parents, device=device)
    parents = [torch.full_like(numbers, -1)]
    intervals = [torch.stack([torch.zeros_like(parent_rates), parent_rates], dim=1)]
    for _ in range(depth):
        parents.append(numbers.repeat_interleave(n_children))
        intervals.append(_children_within(intervals[-1], n_children, child_rate))
        numbers = torch.arange(parents[-1].numel(), device=device) + sum(level.numel() for level in parents[:-1])
    parents.append(torch.full((n_independent,), -1, device=device))
    intervals.append(torch.stack([torch.zeros_like(independent_rates), independent_rates], dim=1))

    parent = torch.cat(parents)
    n_groups = max(1, -(-(n_parents + n_independent) // group_size))
    features = HierarchicalFeatures(
        directions=_directions(parent.numel(), d_in, directions, generator),
        parent=parent,
        interval=torch.cat(intervals).float(),
        correlation=correlation,
        n_groups=n_groups,
    )
    if child_parent_cosine is not None:
        _lean_on_parents(features, child_parent_cosine)
    return features


def _zipf_rates(n: int, mean: float, exponent: float, device: torch.device) -> Tensor:
    """Rates [n], float64, that fall as rank ** -exponent and have the given mean."""
    weights = torch.arange(1, n + 1, dtype=torch.float64, device=device) ** -exponent
    rates = mean * weights / weights.mean()
    if (rates > 1).any():
        raise ValueError(
            f"zipf_exponent must leave every rate at most 1, got {exponent}, with which the most frequent of {n} "
            f"features of mean rate {mean} would have rate {rates[0]:.2f}"
        )
    return rates


def _children_within(interval: Tensor, n_children: int, rate: float) -> Tensor:
    """Intervals [n * n_children, 2] of the children of features with the intervals [n, 2], float64.

    They lie side by side from the left end on, each as wide as the rate's share of the parent's. The ends are rounded
    to float32, so that the end of one is the beginning of the next.
    """
    begin, end = interval.float().split(1, dim=1)
    width = (rate * interval.diff()).float()
    edges = (begin + width * torch.arange(n_children + 1, device=interval.device)).minimum(end)
    return torch.stack([edges[:, :-1], edges[:, 1:]], dim=2).flatten(0, 1).double()


def _directions(n: int, d_in: int, kind: Literal["random", "orthogonal"], generator: torch.Generator) -> Tensor:
    """Unit vectors [n, d_in]."""
    if kind == "random":
        return normalize(torch.randn(n, d_in, generator=generator, device=generator.device), dim=1)
    if n > d_in:
        raise ValueError(f"d_in must be at least {n}, the number of true features, to be orthogonal, got {d_in}")
    return torch.nn.init.orthogonal_(torch.empty(n, d_in, device=generator.device), generator=generator)


def _lean_on_parents(features: TrueFeatures, cosine: float) -> None:
    """Give every child, in place, the cosine to its parent's direction; a parent gets its own before its children."""
    level = features.level
    for number in range(1, int(level.max()) + 1):
        children = (level == number).nonzero().squeeze(1)
        towards = features.directions[features.parent[children]]
        own = features.directions[children]
        across = normalize(own - (own * towards).sum(dim=1, keepdim=True) * towards, dim=1)
        features.directions[children] = cosine * towards + (1 - cosine**2) ** 0.5 * across
