import hashlib

import pytest
import torch
from scipy.stats import multivariate_normal, norm

from topk_ortho.activations.hierarchy import hierarchical_features


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def hierarchy(d_in=10, **settings):
    settings = {"parent_rate": 0.2, "child_rate": 0.25, "independent_rate": 0.1} | settings
    return hierarchical_features(d_in, 5, 3, 4, generator=generator(), **settings)


def rates_of(truth, n=40_000):
    return (truth.sample(n, generator(1))[1] > 0).float().mean(dim=0)


def test_features_and_their_parents():
    truth = hierarchy()
    assert truth.directions.shape == (24, 10)
    torch.testing.assert_close(truth.directions.norm(dim=1), torch.ones(24))
    assert truth.parent.tolist() == [-1] * 5 + [p for p in range(5) for _ in range(3)] + [-1] * 4
    assert truth.is_parent.tolist() == [True] * 5 + [False] * 19
    assert truth.is_child.tolist() == [False] * 5 + [True] * 15 + [False] * 4


def test_children_are_on_with_their_parent_and_one_at_a_time():
    truth = hierarchy()
    x, coefficients = truth.sample(20_000, generator(1))
    on = coefficients > 0
    for parent in range(5):
        children = on[:, truth.parent == parent].sum(dim=1)
        assert set(children.tolist()) == {0, 1}
        assert on[children > 0, parent].all()
    assert coefficients[on].min() >= 0.5
    assert coefficients[on].max() <= 1.5
    torch.testing.assert_close(x, coefficients @ truth.directions)


def test_rates_are_those_asked_for():
    truth = hierarchy()
    on = truth.sample(40_000, generator(1))[1] > 0
    # five standard deviations of a rate of 0.2 in 40,000 samples are 0.01
    rates = on.float().mean(dim=0)
    expected = torch.tensor([0.2] * 5 + [0.05] * 15 + [0.1] * 4)
    torch.testing.assert_close(rates, expected, rtol=0, atol=0.01)
    assert truth.mean_l0 == pytest.approx(expected.sum().item())
    both = (on[:, 0] & on[:, 1]).float().mean().item()
    assert both == pytest.approx(0.04, abs=0.006)


def test_generator_decides_directions_and_samples():
    truth, again = hierarchy(), hierarchy()
    assert torch.equal(truth.directions, again.directions)
    assert torch.equal(truth.sample(50, generator(1))[0], again.sample(50, generator(1))[0])
    assert not torch.equal(truth.sample(50, generator(1))[0], truth.sample(50, generator(2))[0])


@pytest.mark.parametrize(
    ("rates", "name"),
    [
        ({"parent_rate": 1.5}, "parent_rate"),
        ({"child_rate": 0.4}, r"n_children \* child_rate"),
        ({"independent_rate": -0.1}, "independent_rate"),
    ],
)
def test_impossible_rates_are_refused(rates, name):
    with pytest.raises(ValueError, match=rf"{name} must be in \[0, 1\], got"):
        hierarchy(**rates)


def test_the_default_draws_what_committed_results_were_measured_on():
    _, coefficients = hierarchical_features(80, 48, 4, 48, generator=generator()).sample(1000, generator(1))
    on = hashlib.sha256((coefficients > 0).numpy().tobytes()).hexdigest()
    assert on[:16] == "8b921ca638dfd4ba"


def test_two_levels():
    truth = hierarchy(depth=2)
    children, grandchildren = slice(5, 20), slice(20, 65)
    assert truth.parent[children].tolist() == [p for p in range(5) for _ in range(3)]
    assert truth.parent[grandchildren].tolist() == [c for c in range(5, 20) for _ in range(3)]
    assert truth.level.tolist() == [0] * 5 + [1] * 15 + [2] * 45 + [0] * 4
    assert truth.root.tolist() == [*range(5), *[p for p in range(5) for _ in range(3)],
                                   *[p for p in range(5) for _ in range(9)], *range(65, 69)]  # fmt: skip
    on = truth.sample(20_000, generator(1))[1] > 0
    for parent in range(20):
        n_on = on[:, truth.parent == parent].sum(dim=1)
        assert set(n_on.tolist()) == {0, 1}
        assert on[n_on > 0, parent].all()
    expected = torch.tensor([0.2] * 5 + [0.05] * 15 + [0.0125] * 45 + [0.1] * 4)
    torch.testing.assert_close(rates_of(truth), expected, rtol=0, atol=0.01)
    assert truth.mean_l0 == pytest.approx(expected.sum().item())


def test_rates_fall_by_rank_and_keep_their_mean():
    truth = hierarchy(zipf_exponent=0.5)
    rank = torch.arange(1, 6).double() ** -0.5
    parents = 0.2 * rank / rank.mean()
    independent = 0.1 * rank[:4] / rank[:4].mean()
    expected = torch.cat([parents, (0.25 * parents).repeat_interleave(3), independent]).float()
    torch.testing.assert_close(rates_of(truth), expected, rtol=0, atol=0.01)
    assert truth.mean_l0 == pytest.approx(hierarchy().mean_l0) == pytest.approx(5 * 0.2 * 1.75 + 4 * 0.1)


def test_a_rate_above_one_is_refused():
    with pytest.raises(
        ValueError, match=r"zipf_exponent must leave every rate at most 1, got 3.0, .* of 5 .* rate 1\.01"
    ):
        hierarchy(parent_rate=0.24, zipf_exponent=3.0)


def test_roots_of_a_group_are_on_together_as_often_as_the_copula_says():
    """Groups of at most four: roots 0, 3, 6 (an independent feature, number 21) are one of three."""
    truth = hierarchy(correlation=0.6, group_size=4)
    assert truth.n_groups == 3
    on = truth.sample(40_000, generator(1))[1] > 0

    def rate_of_both(p, q, correlation):
        return multivariate_normal(cov=[[1, correlation], [correlation, 1]]).cdf(norm.ppf([p, q]))

    pairs = [(0, 3, 0.2, 0.2, 0.6), (0, 21, 0.2, 0.1, 0.6), (0, 1, 0.2, 0.2, 0), (20, 21, 0.1, 0.1, 0)]
    for a, b, p, q, correlation in pairs:
        both = (on[:, a] & on[:, b]).float().mean().item()
        assert both == pytest.approx(rate_of_both(p, q, correlation), abs=0.008)
    torch.testing.assert_close(on.float().mean(dim=0), rates_of(hierarchy()), rtol=0, atol=0.015)
    assert truth.mean_l0 == hierarchy().mean_l0


@pytest.mark.parametrize("directions", ["random", "orthogonal"])
@pytest.mark.parametrize("cosine", [0.0, 0.4])
def test_children_lean_on_their_parent(directions, cosine):
    truth = hierarchy(d_in=100, depth=2, directions=directions, child_parent_cosine=cosine)
    actual = truth.directions.double()
    torch.testing.assert_close(actual.norm(dim=1), torch.ones(69).double())
    children = truth.is_child
    gram = actual @ actual.T
    torch.testing.assert_close(
        gram[children, truth.parent[children]], torch.full((60,), cosine).double(), rtol=0, atol=1e-6
    )
    if directions == "orthogonal":
        # in different families all are orthogonal; within one, cosines multiply along the path from one to the other
        assert gram[truth.root[:, None] != truth.root].abs().max() < 1e-6
        assert gram[5, 6] == pytest.approx(cosine**2, abs=1e-6)
        assert gram[0, 20] == pytest.approx(cosine**2, abs=1e-6)


def test_orthogonal_directions():
    directions = hierarchy(d_in=24, directions="orthogonal").directions
    torch.testing.assert_close(directions @ directions.T, torch.eye(24), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="d_in must be at least 24, the number of true features, to be"):
        hierarchy(d_in=23, directions="orthogonal")


@pytest.mark.parametrize("sizes", [(0, 3, 4), (5, 0, 4), (5, 3, 0), (5, 1, 1)])
def test_parts_of_the_hierarchy_may_be_missing(sizes):
    settings = {"depth": 2, "zipf_exponent": 0.3, "correlation": 0.2, "child_parent_cosine": 0.3}
    truth = hierarchical_features(8, *sizes, generator=generator(), **settings)
    n_parents, n_children, n_independent = sizes
    n_true = n_parents * (1 + n_children + n_children**2) + n_independent
    assert truth.sample(10, generator())[1].shape == (10, n_true)
