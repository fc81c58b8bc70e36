import pytest
import torch

from bench.sparse import SPARSE_DENSITY, SPARSE_L0, SPARSE_N, active_features


def test_active_features_are_distinct_and_uneven():
    indices, values = active_features(300, 20, 500)
    assert indices.shape == values.shape == (300, 20)
    assert all(len(set(row)) == 20 for row in indices.tolist())
    assert (values > 0).all()
    frequency = torch.bincount(indices.flatten(), minlength=500).sort(descending=True).values
    assert frequency[0] > 5 * frequency[250]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_sweeps(device):
    cases = [case for benchmark in (SPARSE_N, SPARSE_L0, SPARSE_DENSITY) for case in benchmark.cases(device)]
    assert len(set(cases)) == len(cases)
    goal = {c.N for c in cases if c.benchmark == "sparse_n" and c[1:3] == ("sparse", "forward_backward")}
    assert {16384, 2**20} <= goal
    assert ("scipy" in {case.provider for case in cases}) == (device == "cpu")
    assert {c.N for c in cases if c.benchmark == "sparse_density"} == {4096, 16384}


def test_measuring_the_forward_pass_does_not_depend_on_the_backward_pass():
    case = next(c for c in SPARSE_N.small_cases("cpu") if c.mode == "forward_backward" and c.provider == "sparse")
    cpu = torch.device("cpu")
    SPARSE_N.make_call(case, cpu)()
    assert not SPARSE_N.make_call(case._replace(mode="forward"), cpu)().requires_grad
