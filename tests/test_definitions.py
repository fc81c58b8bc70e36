"""k, the order of pairs, and the floor."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import oracle
from tests.inputs import seeded
from topk_ortho import definitions
from topk_ortho.definitions import Query


@pytest.mark.quick
@pytest.mark.parametrize(
    ("n_features", "fraction", "k"),
    [
        pytest.param(2, 1e-9, 1, id="at_least_one"),
        pytest.param(2, 1.0, 1, id="the_only_pair"),
        pytest.param(10, 1.0, 45, id="all"),
        pytest.param(10, 0.5, 22, id="45_ordered_entries_are_22_pairs"),
        pytest.param(10, 0.0333, 1, id="2.997_entries_are_1_pair"),
        pytest.param(1000, 1e-3, 499, id="default"),
        pytest.param(65_536, 1e-3, 2_147_450, id="beyond_int32_entries"),
        pytest.param(1_000_000, 1.0, 499_999_500_000, id="a_million_columns"),
    ],
)
def test_k_from_fraction(n_features, fraction, k):
    assert definitions.k_from_fraction(n_features, fraction) == k


@given(st.integers(2, 2_000_000), st.floats(1e-12, 1.0))
def test_k_from_fraction_equals_the_definition(n_features, fraction):
    k = definitions.k_from_fraction(n_features, fraction)
    assert k == oracle.k_of(n_features, fraction)
    assert 1 <= k <= definitions.n_pairs(n_features)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("similarity", ["abs", "positive"])
@pytest.mark.parametrize("count", [1, 7, 60, 249, 250, 251, 499, 500, 1000])
def test_first_of_the_total_order(similarity, count, dtype):
    generator = seeded(0)
    values = torch.randint(-4, 5, (500,), generator=generator).to(dtype) / 4
    index = torch.randperm(1000, generator=generator)[:500]
    values[(values == 0) & (index % 2 == 0)] = -0.0
    key = {"abs": values.abs(), "positive": values}[similarity]
    expected = np.lexsort((index.numpy(), -key.numpy()))[:count]
    first_values, first_index = definitions.first_in_order(values, index, similarity, count)
    assert first_index.tolist() == index[expected].tolist()
    assert first_values.tolist() == values[expected].tolist()


@pytest.mark.quick
@pytest.mark.parametrize(
    ("query", "adaptive", "floor"),
    [
        pytest.param(Query(k=1), None, -1.0, id="none_refuses_nothing"),
        pytest.param(Query(k=1, tau=0.0), None, 0.0, id="tau_zero_refuses_zeros"),
        pytest.param(Query(k=1, tau=0.3), None, 0.3, id="tau"),
        pytest.param(Query(k=1, n_std=1.0), None, -1.0, id="adaptive_not_known_yet"),
        pytest.param(Query(k=1, n_std=1.0), 0.2, 0.2, id="adaptive"),
        pytest.param(Query(k=1, similarity="positive"), None, 0.0, id="positive"),
        pytest.param(Query(k=1, similarity="positive", tau=0.3), None, 0.3, id="positive_tau"),
        pytest.param(Query(k=1, similarity="positive", n_std=-9.0), -0.4, 0.0, id="positive_adaptive_negative"),
    ],
)
def test_floor_of(query, adaptive, floor):
    assert definitions.floor_of(query, adaptive) == floor
