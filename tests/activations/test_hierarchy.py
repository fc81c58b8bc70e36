import pytest
import torch

from topk_ortho.activations.hierarchy import hierarchical_features


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def hierarchy(**rates):
    rates = {"parent_rate": 0.2, "child_rate": 0.25, "independent_rate": 0.1} | rates
    return hierarchical_features(10, 5, 3, 4, generator=generator(), **rates)


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
