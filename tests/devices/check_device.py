"""What is refused and what passes between two devices: by torch on a GPU, and just so by its stand-in."""

import pytest
import torch
from torch.nn.functional import embedding_bag, linear, normalize


def numbers():
    return torch.tensor([[1.0, -2.0, 3.0], [0.5, 4.0, -1.0]])


ROWS = torch.tensor([1, 0, 1])
ONE_BAG = torch.tensor([0])
MASK = torch.tensor([[True, False, True], [False, True, False]])

# x is on the device, the others on the CPU
REFUSED = {
    "sum": lambda x: x + numbers(),
    "sum_from_the_cpu": lambda x: numbers() + x,
    "sum_with_a_number_of_the_device": lambda x: numbers() + x[0, 0],
    "sum_in_place": lambda x: x.add_(numbers()),
    "sum_into_a_number_of_the_cpu": lambda x: torch.tensor(1.0).add_(x[0, 0]),
    "comparison": lambda x: x > numbers(),
    "where": lambda x: torch.where(MASK, x, 0.0),
    "lerp": lambda x: x.lerp_(numbers(), 0.5),
    "masked_fill": lambda x: x.masked_fill_(MASK, 0.0),
    "cat": lambda x: torch.cat([x, numbers()]),
    "stack": lambda x: torch.stack([numbers(), x]),
    "matmul": lambda x: x @ numbers().T,
    "linear": lambda x: linear(x, numbers(), torch.zeros(2)),
    "linear_bias": lambda x: linear(x, x, torch.zeros(2)),
    "embedding_bag": lambda x: embedding_bag(ROWS, x, ONE_BAG, mode="sum"),
    "index_select": lambda x: x.index_select(0, ROWS),
    "index_select_by_a_number": lambda x: x.index_select(0, torch.tensor(1)),
    "gather": lambda x: x.gather(0, ROWS[None]),
    "scatter": lambda x: x.scatter(0, ROWS[None], x[:1]),
    "index_add": lambda x: x.index_add(0, ROWS[:1], x[:1]),
    "index_copy": lambda x: x.index_copy(0, ROWS[:1], x[:1]),
    "index_of_the_device_into_the_cpu": lambda x: numbers()[x > 0],
    "assigned_values": lambda x: x.index_put_((ROWS[:1],), numbers()[:1]),
    "searchsorted": lambda x: torch.searchsorted(x.flatten(), numbers().flatten()),
    "bincount": lambda x: torch.bincount((x > 0).long().flatten(), weights=numbers().flatten()),
    "equal": lambda x: torch.equal(x, numbers()),
    "out": lambda x: torch.mul(x, 2.0, out=numbers()),
    "out_of_a_number": lambda x: torch.mul(x[0, 0], 2.0, out=torch.tensor(0.0)),
    "numpy": lambda x: x.numpy(),
    "histogram": lambda x: torch.histogram(x, 4),
    "generator_of_the_cpu": lambda x: torch.randn(3, generator=torch.Generator(), device=x.device),
    "generator_of_the_cpu_in_place": lambda x: x.uniform_(generator=torch.Generator()),
    "multinomial": lambda x: torch.multinomial(x.abs(), 2, generator=torch.Generator()),
    "gradient": lambda x: setattr(x, "grad", numbers()),
}


@pytest.mark.parametrize("name", REFUSED)
def test_mixed_devices_are_refused(name, device):
    REFUSED[name](numbers())
    with pytest.raises((RuntimeError, TypeError), match=r"device|backend"):
        REFUSED[name](numbers().to(device))


def test_an_optimizer_with_moments_on_the_cpu_is_refused(device):
    weights = torch.nn.Parameter(numbers().to(device))
    optimizer = torch.optim.Adam([weights], fused=True)
    weights.square().sum().backward()
    optimizer.step()
    optimizer.state[weights]["exp_avg"] = torch.zeros(2, 3)
    with pytest.raises(RuntimeError, match="device"):
        optimizer.step()


def assigned(x, index, value):
    x[index] = value
    return x


PASSED = {
    "number_of_the_cpu": lambda x: x * torch.tensor(2.0) - torch.tensor(1.0),
    "number_of_the_cpu_in_place": lambda x: x.add_(torch.tensor(2.0)),
    "where_with_numbers": lambda x: torch.where(x > 0, torch.tensor(1.0), 0.0),
    "index": lambda x: x[ROWS],
    "mask": lambda x: x[MASK],
    "assigned_number": lambda x: assigned(x, MASK, 7.0),
    "assigned_number_of_the_cpu": lambda x: assigned(x, ROWS, torch.tensor(7.0)),
    "assigned_values": lambda x: assigned(x, ROWS[:1], 2 * x[:1]),
    "assigned_part": lambda x: assigned(x, 0, torch.zeros(3)),
    "copy": lambda x: x.copy_(numbers() + 1),
    "copy_to_the_cpu": lambda x: torch.zeros(2, 3).copy_(x),
    "moved": lambda x: x.to("cpu", torch.float64) + numbers(),
    "moved_like_another": lambda x: numbers().double().to(x) + x,
    "data": lambda x: torch.tensor([1.0, 2.0, 3.0], device=x.device) + x,
    "like": lambda x: torch.ones_like(x) + x.new_full((3,), 2.0) + torch.zeros(3, device=x.device),
    "arange": lambda x: torch.arange(3, device=x.device) + x,
    "random_numbers": lambda x: torch.rand(2, 3, device=x.device).clamp(0, 0) + x,
    "views": lambda x: x.T.reshape(-1).view(2, 3)[:, 1:].contiguous(),
    "list": lambda x: torch.tensor(x.tolist()),
    "sparse": lambda x: x.to_sparse().coalesce().values(),
    "autocast": lambda x: autocast_product(x),
}


def autocast_product(x):
    with torch.autocast(x.device.type, enabled=False):
        return x @ x.T


@pytest.mark.parametrize("name", PASSED)
def test_what_torch_lets_pass_has_the_values_of_the_cpu(name, device):
    actual, expected = PASSED[name](numbers().to(device)), PASSED[name](numbers())
    torch.testing.assert_close(actual.cpu(), expected)


def test_gradients_are_on_the_device_of_their_tensors(device):
    gradients = []
    for where in ("cpu", device):
        x = numbers().to(where).requires_grad_()
        scaled = x * 2
        scaled[0] += x[1]  # in place, in a view
        (normalize(scaled, dim=0) @ x.T).square().sum().backward()
        assert x.grad.device == x.device
        assert x.grad.device.type == torch.device(where).type
        gradients.append(x.grad.cpu())
    torch.testing.assert_close(*gradients)


def test_a_module_moves_and_an_optimizer_follows(device):
    trained = []
    for where in ("cpu", device):
        layer = torch.nn.Linear(3, 2)
        torch.nn.init.ones_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
        layer.to(where)
        optimizer = torch.optim.Adam(layer.parameters(), fused=True)
        for _ in range(3):
            optimizer.zero_grad()
            layer(numbers().to(where)).square().sum().backward()
            torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
            optimizer.step()
        states = [*layer.state_dict().values(), *optimizer.state[layer.weight].values()]
        assert all(tensor.device.type == torch.device(where).type for tensor in states)
        trained.append(layer.weight.detach().cpu())
    torch.testing.assert_close(*trained)
