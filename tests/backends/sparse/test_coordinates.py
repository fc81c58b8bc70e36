import torch

from tests import oracle
from tests.inputs import EDGES, normal, seeded
from tests.tolerances import assert_within, cosine_bound, float64
from topk_ortho.backends.sparse.coordinates import Coordinates, unit_columns


class TestCoordinates:
    def test_order_and_padding_do_not_matter(self):
        x = normal(6, 20) * (torch.rand(6, 20, generator=seeded(8)) < 0.4)
        plain = Coordinates.from_dense(x)
        order = torch.randperm(plain.values.numel() + 3, generator=seeded(9))
        pad = torch.nn.functional.pad
        mixed = Coordinates(*(pad(t, (0, 3))[order] for t in plain[:3]), 6, 20)
        once, again = unit_columns(plain), unit_columns(mixed)
        for name in ("samples", "features", "values"):
            assert torch.equal(getattr(once.x_hat, name), getattr(again.x_hat, name))
        assert torch.equal(once.norms, again.norms)
        assert torch.equal(mixed.values[again.positions], plain.values[once.positions])

    def test_unit_columns(self):
        x = EDGES["huge_beside_tiny"]
        x_hat = unit_columns(Coordinates.from_dense(x)).x_hat
        dense = torch.zeros(x.shape)
        dense[x_hat.samples, x_hat.features] = x_hat.values
        assert_within(actual=dense, expected=oracle.normalized(float64(x)), bound=cosine_bound(x))
