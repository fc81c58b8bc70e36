import dataclasses
import json

import pytest
import torch

from topk_ortho.activations.config import SyntheticConfig
from topk_ortho.activations.synthetic import SyntheticActivations

CONFIG = SyntheticConfig(d_in=6, n_parents=2, n_children=2, n_independent=1, n_tokens=40_000)


def test_a_shard_can_be_had_again_and_differs_from_others():
    source, again, other = (SyntheticActivations(CONFIG, seed) for seed in (0, 0, 1))
    assert torch.equal(source.shard(1), again.shard(1))
    assert not torch.equal(source.shard(1), source.shard(0))
    assert not torch.equal(source.shard(1), other.shard(1))


def test_shards_are_drawn_once_as_far_as_memory_is_set_aside(monkeypatch):
    source, again = SyntheticActivations(CONFIG, 0), SyntheticActivations(CONFIG, 0)
    first_shard = source.shard_sizes[0] * CONFIG.d_in
    monkeypatch.setattr("topk_ortho.activations.synthetic._KEPT_NUMBERS", first_shard)
    assert source.shard(0) is source.shard(0)
    assert source.shard(1) is not source.shard(1)
    for number in (0, 1):
        assert torch.equal(source.shard(number), again.sample(number)[0])


def test_sources_that_differ_say_so():
    smaller = dataclasses.replace(CONFIG, n_tokens=20_000)
    identities = [SyntheticActivations(*settings).identity for settings in ((CONFIG, 0), (CONFIG, 1), (smaller, 0))]
    assert identities[0] == SyntheticActivations(CONFIG, 0).identity
    assert json.loads(json.dumps(identities)) == identities
    assert {key for key in identities[0] if identities[0][key] != identities[1][key]} == {"seed"}
    assert {key for key in identities[0] if identities[0][key] != identities[2][key]} == {"n_tokens"}


def test_settings_of_the_hierarchy_reach_it():
    changes = {
        "depth": 2,
        "directions": "orthogonal",
        "child_parent_cosine": 0.4,
        "zipf_exponent": 0.5,
        "correlation": 0.5,
        "group_size": 2,
        "n_independent": 4,
    }
    source = SyntheticActivations(dataclasses.replace(CONFIG, d_in=30, **changes), 0)
    truth = source.truth
    assert len(truth.parent) == 2 * (1 + 2 + 4) + 4
    assert truth.level.max() == 2
    assert truth.directions[0] @ truth.directions[2] == pytest.approx(0.4, abs=1e-6)
    assert truth.directions[2] @ truth.directions[3] == pytest.approx(0.16, abs=1e-6)
    assert truth.interval[0, 1] / truth.interval[1, 1] == pytest.approx(2**0.5)
    assert (truth.correlation, truth.n_groups) == (0.5, 3)
    assert {**source.identity, **changes} == source.identity


def test_shards_are_sums_of_the_true_directions():
    source = SyntheticActivations(CONFIG, 0)
    assert source.shard_sizes == [16_384, 16_384]
    x, coefficients = source.sample(0)
    assert torch.equal(source.shard(0), x)
    torch.testing.assert_close(x, coefficients @ source.truth.directions)


def test_shards_of_very_many_features_are_small():
    config = SyntheticConfig(d_in=2, n_parents=0, n_independent=20_000, n_tokens=4_000)
    assert SyntheticActivations(config, 0).shard_sizes == [838] * 4
