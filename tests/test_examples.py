"""Every block of docs/examples.md runs as it stands, and so do those of other pages; links lead somewhere."""

import importlib.util
import re
import shlex
import shutil
import sys
from collections import namedtuple
from pathlib import Path
from types import ModuleType

import pytest
import sae_lens
import torch
from torch import nn

import train
from topk_ortho.sae import TopKSAE
from topk_ortho.study.plan import load_study
from topk_ortho.training.config import TrainConfig, flatten

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/examples.md"
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("bench/results/*.md")]


def examples(page=PAGE):
    """Blocks of Python, each with its heading, and the line on which its code starts."""
    text = page.read_text()
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


class Hub:
    """Stands in for the client of the hub: keeps what is uploaded in a folder."""

    def __init__(self, folder):
        self.folder = folder

    def repo_info(self, repo_id):
        return repo_id

    def upload_folder(self, *, folder_path, path_in_repo, repo_id, allow_patterns, **_):
        for path in folder_path.iterdir():
            if path.name in allow_patterns:
                target = self.folder / repo_id / path_in_repo / path.name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)

    def upload_file(self, *, path_or_fileobj, path_in_repo, repo_id, **_):
        (self.folder / repo_id / path_in_repo).write_bytes(path_or_fileobj.read())


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder in which the stand-in has what is uploaded from another one."""
    uploading = importlib.import_module("sae_lens.training.upload_saes_to_huggingface")
    monkeypatch.setattr(uploading, "HfApi", lambda: Hub(tmp_path / "hub"))
    monkeypatch.setattr(uploading, "_repo_file_exists", lambda *_: False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


@pytest.mark.usefixtures("_dictionary_learning", "hub")
@pytest.mark.parametrize(("code", "line"), list(examples()))
def test_example(code, line):
    # the empty lines make a traceback name the line of the page
    exec(compile("\n" * line + code, PAGE, "exec"), {"__name__": "__main__"})


def test_what_is_uploaded_is_what_saelens_loads(hub):
    (code,) = (example.values[0] for example in examples() if example.id == "SAELens: a dictionary on the hub")
    exec(code, {"__name__": "__main__"})
    uploaded = hub / "me/my-saes/blocks.8.hook_resid_post"
    assert {path.name for path in uploaded.iterdir()} == {"cfg.json", "sae_weights.safetensors"}
    assert sae_lens.SAE.load_from_disk(uploaded).cfg.metadata.hook_name == "blocks.8.hook_resid_post"
    assert "me/my-saes" in (hub / "me/my-saes/README.md").read_text()


def test_the_loop_of_the_readme():
    """With a dictionary for the names that it leaves to the reader."""
    ((code, line),) = (example.values for example in examples(ROOT / "README.md"))
    sae = TopKSAE(16, 64, 4, generator=torch.Generator().manual_seed(0))
    x = torch.randn(100, 16, generator=torch.Generator().manual_seed(1))
    names = {"sae": sae, "x": x, "sae_output": sae(x).reconstruction, "acts": torch.rand(100, 64)}
    names["firing_rate"] = torch.zeros(64)
    exec(compile("\n" * line + code, ROOT / "README.md", "exec"), names)
    assert 0 < names["unexplained"] < 2
    names["loss"].backward()
    assert sae.W_dec.grad.isfinite().all()


def test_sparse_features_of_the_ops():
    (code,) = (example.values[0] for example in examples(ROOT / "docs/ops.md") if example.id == "Sparse features")
    names = {"pre_activations": torch.randn(8, 300, generator=torch.Generator().manual_seed(0)).requires_grad_()}
    exec(code, names)
    names["pairs"].values.sum().backward()
    assert names["pre_activations"].grad.abs().sum() > 0


def commands():
    """Arguments of every call of train.py in a block of a page."""
    for page in PAGES:
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), flags=re.DOTALL | re.MULTILINE):
            for line in re.findall(r"^\S*(?:python|torchrun) .*\btrain\.py\b.*$", block, flags=re.MULTILINE):
                assert not language
                words = shlex.split(line, comments=True)
                yield pytest.param(words[words.index("train.py") + 1 :], id=f"{page.stem}: {' '.join(words)}")


@pytest.mark.parametrize("arguments", list(commands()))
def test_settings_of_commands_are_accepted(arguments, tmp_path):
    """Those that go on with a run are read as if they began one."""
    (toml,) = re.findall(r"```toml\n(.*?)```", (ROOT / "docs/training.md").read_text(), flags=re.DOTALL)
    (tmp_path / "my.toml").write_text(toml)
    arguments = [str(tmp_path / word) if word == "my.toml" else word for word in arguments if word != "--resume"]
    config, _ = train.parse(arguments)
    assert ("my.toml" in " ".join(arguments)) == (config.model.name == "./my-model")


def test_the_study_file_is_accepted(tmp_path):
    (toml,) = re.findall(r"```toml\n(.*?)```", (ROOT / "docs/studies.md").read_text(), flags=re.DOTALL)
    (tmp_path / "my.toml").write_text(toml)
    study = load_study(str(tmp_path / "my.toml"), tmp_path)
    weights = [f"decoder,penalty.weight={weight}" for weight in (0.1, 0.3, 1)]
    assert [point.label for point in study.points] == ["none", *weights]
    assert len(study.runs) == 4 * 5


@pytest.mark.parametrize("page", [page for page in PAGES if page != PAGE], ids=lambda page: str(page.relative_to(ROOT)))
def test_settings_that_a_page_names_exist(page):
    groups = "model|text|synthetic|synthsaebench|sae|penalty"
    named = set(re.findall(rf"`(?:--)?((?:{groups})\.[\w-]+)", page.read_text()))
    assert {name.replace("-", "_") for name in named} <= set(flatten(TrainConfig().as_json()))


def anchors(page):
    """What the headings of a page can be linked as."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        if not link.startswith(("http:", "https:")):
            target = page.parent / path if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link
