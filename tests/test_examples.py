"""Every block of EXAMPLES.md runs as it stands."""

import importlib.util
import re
import sys
from collections import namedtuple
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

PAGE = Path(__file__).parents[1] / "EXAMPLES.md"


def examples():
    """Blocks of Python, each with its heading, and the line on which its code starts."""
    text = PAGE.read_text()
    for block in re.finditer(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE):
        headings = re.findall(r"^## (.*)$", text[: block.start()], flags=re.MULTILINE)
        yield pytest.param(block[1], text[: block.start(1)].count("\n"), id=headings[-1])


class StandardTrainer:
    """Stands in for dictionary_learning.trainers.StandardTrainer 0.1.0: its interface, as far as the example sees it.

    pip does not install that package here without another torch or a torchvision for CUDA, see CONTRIBUTING.md.
    """

    def __init__(
        self, steps, activation_dim, dict_size, layer, lm_name, lr=1e-3, l1_penalty=1e-1, warmup_steps=1000,
        sparsity_warmup_steps=2000, seed=None, device=None,
    ):  # fmt: skip
        assert 0 <= warmup_steps < steps
        assert 0 <= sparsity_warmup_steps < steps
        torch.manual_seed(seed)
        self.device, self.l1_penalty, self.sparsity_warmup_steps = device, l1_penalty, sparsity_warmup_steps
        self.ae = nn.Module()
        self.ae.encoder = nn.Linear(activation_dim, dict_size)
        self.ae.decoder = nn.Linear(dict_size, activation_dim, bias=False)
        self.optimizer = torch.optim.Adam(self.ae.parameters(), lr=lr)

    def loss(self, x, step, logging=False, **kwargs):
        f = self.ae.encoder(x).relu()
        x_hat = self.ae.decoder(f)
        l1_penalty = self.l1_penalty * min(step / self.sparsity_warmup_steps, 1)
        loss = (x - x_hat).pow(2).sum(dim=-1).mean() + l1_penalty * f.norm(p=1, dim=-1).mean()
        if not logging:
            return loss
        return namedtuple("LossLog", ["x", "x_hat", "f", "losses"])(x, x_hat, f, {"loss": loss.item()})

    def update(self, step, activations):
        self.optimizer.zero_grad()
        self.loss(activations, step=step).backward()
        self.optimizer.step()


@pytest.fixture
def _dictionary_learning(monkeypatch):
    if importlib.util.find_spec("dictionary_learning") is None:
        trainers = ModuleType("dictionary_learning.trainers")
        trainers.StandardTrainer = StandardTrainer
        monkeypatch.setitem(sys.modules, "dictionary_learning", ModuleType("dictionary_learning"))
        monkeypatch.setitem(sys.modules, "dictionary_learning.trainers", trainers)


@pytest.mark.usefixtures("_dictionary_learning")
@pytest.mark.parametrize(("code", "line"), list(examples()))
def test_example(code, line):
    # the empty lines make a traceback name the line of the page
    exec(compile("\n" * line + code, PAGE, "exec"), {"__name__": "__main__"})
