import pytest
import torch

from topk_ortho.activations.cache import TransformerActivations
from topk_ortho.activations.config import ModelConfig, TextConfig
from topk_ortho.evaluation import token_classes
from topk_ortho.evaluation.token_classes import (
    _RIDGE,
    CLASSES,
    _fit_probes,
    _half,
    absorption_of_classes,
    token_class_metrics,
)
from topk_ortho.sae import BatchTopKSAE, StandardSAE

D = 24
GENERAL, OTHER = 0, 1
"""Latents, and the dimensions that they read"""


def absorbing_sae(*, n_children, dense=True, absorbs=True):
    """Latent 0 stands for dimension 0, but is silent where one of the dimensions 2, 3, ... is on, which have latents.

    Each of these writes dimension 0 too, in place of latent 0.
    """
    sae = StandardSAE(D, 2 + n_children) if dense else BatchTopKSAE(D, 2 + n_children, 2)
    with torch.no_grad():
        for parameter in (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec):
            parameter.zero_()
        sae.W_enc[GENERAL, 0] = sae.W_dec[GENERAL, 0] = 1.0
        sae.W_enc[OTHER, 1] = sae.W_dec[OTHER, 1] = 1.0
        for child in range(2, 2 + n_children):
            sae.W_enc[GENERAL, child] = -2.0
            sae.W_enc[child, child] = sae.W_dec[child, child] = 1.0
            sae.W_dec[child, 0] = 1.0 if absorbs else 0.0
        sae.b_enc.fill_(-0.5)
    return sae.eval()


def samples(n=6_000, n_children=10, child_rate=0.02, seed=0):
    """Activations with dimension 0 on in a quarter of them and, in some of these, a child's dimension too."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.rand(n, generator=generator) < 1 / 4
    child = (torch.rand(n, generator=generator) / child_rate).long()
    x = 0.01 * torch.randn(n, D, generator=generator)
    x[:, 0] += label.float()
    x[torch.arange(n), 1] += (torch.rand(n, generator=generator) < 0.3).float()
    is_child = label & (child < n_children)
    x[is_child, 2 + child[is_child]] += 1.0
    return x, label, is_child


def measure(sae, x, labels, names=("general",), types=None):
    """The result for samples that are each of a type of its own, unless types are given."""
    types = torch.arange(len(x)) if types is None else types
    return absorption_of_classes(sae, x, types, labels.view(len(labels), -1), list(names))


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "sparse"])
def test_samples_that_specific_latents_take_over_are_absorbed(dense):
    x, label, is_child = samples()
    result = measure(absorbing_sae(n_children=10, dense=dense), x, label)
    expected = (is_child[1::2].sum() / label[1::2].sum()).item()  # every second type is measured
    assert 0.1 < expected < 0.3
    values = result["token_class"]["general"]
    assert values["absorption_rate"] == pytest.approx(expected)
    assert values["samples"] == label[1::2].sum()
    assert values["probe_f1"] == pytest.approx(1.0, abs=0.01)
    assert values["latent_f1"] == pytest.approx(2 * (1 - expected) / (2 - expected))  # precision 1, the rest recalled
    assert values["latents"] == 1
    assert result["token_classes"] == {
        "known": 1,
        "with_latent": 1,
        "latent_f1": values["latent_f1"],
        "absorption_rate": values["absorption_rate"],
    }


def test_the_center_of_the_dictionary_is_not_carried_by_latents():
    """Where the decoder's bias is the origin, latents carry as much of the direction wherever the origin lies."""
    x, label, _ = samples()
    sae = absorbing_sae(n_children=10)
    expected = measure(sae, x, label)["token_classes"]
    sae.b_dec.data[0] = 7.0
    assert measure(sae, x + sae.b_dec.data, label)["token_classes"] == pytest.approx(expected)


def test_silence_alone_is_no_absorption():
    x, label, _ = samples()
    values = measure(absorbing_sae(n_children=10, absorbs=False), x, label)["token_class"]["general"]
    assert values["absorption_rate"] == 0
    assert values["latent_f1"] < 0.95


def test_a_large_feature_that_points_elsewhere_absorbs_nothing():
    x, label, _ = samples()
    sae = absorbing_sae(n_children=10)
    sae.W_dec.data[2:, 20] = 100.0
    assert measure(sae, x, label)["token_class"]["general"]["absorption_rate"] == 0


def test_where_a_feature_that_points_elsewhere_carries_most_nothing_is_absorbed():
    x, label, is_child = samples()
    sae = absorbing_sae(n_children=10)
    sae.W_dec.data[OTHER, 0], sae.W_dec.data[OTHER, 20] = 2.4, 100.0
    expected = ((is_child & (x[:, 1] < 0.5))[1::2].sum() / label[1::2].sum()).item()
    values = measure(sae, x, label)["token_class"]["general"]
    assert values["absorption_rate"] == pytest.approx(expected)


def test_samples_that_the_probe_does_not_read_do_not_count():
    """A tenth of the class has nothing of it in its activations."""
    x, label, is_child = samples()
    unread = label & ~is_child & (torch.arange(len(x)) % 20 < 2)
    x[unread, 0] = 0.0
    result = measure(absorbing_sae(n_children=10), x, label)
    expected = (is_child[1::2].sum() / (label & ~unread)[1::2].sum()).item()
    assert result["token_class"]["general"]["absorption_rate"] == pytest.approx(expected)


def test_a_class_that_is_split_among_latents_is_not_absorbed():
    """One child has a fifth of the class: its latent counts as one of the class's own."""
    x, label, is_child = samples(n_children=1, child_rate=0.2)
    assert is_child.sum() > 200
    values = measure(absorbing_sae(n_children=1), x, label)["token_class"]["general"]
    assert values["latents"] == 2
    assert values["absorption_rate"] == 0
    assert values["latent_f1"] == pytest.approx(1.0)  # of both together


def test_without_a_latent_there_is_no_rate():
    """Latent 1 tells nothing of the class, and no other fires."""
    x, label, _ = samples()
    sae = absorbing_sae(n_children=10)
    sae.b_enc.data[GENERAL] = sae.b_enc.data[2:] = -100.0
    result = measure(sae, x, label)
    assert result["token_class"]["general"]["absorption_rate"] is None
    assert result["token_class"]["general"]["latent_f1"] < 0.5
    assert result["token_classes"]["with_latent"] == 0
    assert result["token_classes"]["absorption_rate"] is None


def test_classes_that_are_rare_common_or_unknown_to_the_model_are_left_out():
    x, label, _ = samples()
    generator = torch.Generator().manual_seed(1)
    rare = torch.zeros_like(label)
    rare[:38:2] = rare[1:100:2] = True  # 19 types in the first half
    x[rare, 21] = 1.0
    common = label | (torch.arange(len(x)) % 5 == 0)
    unknown = torch.rand(len(x), generator=generator) < 0.2
    labels = torch.stack([rare, label, common, unknown], dim=1)
    result = measure(absorbing_sae(n_children=10), x, labels, ["rare", "general", "common", "unknown"])
    assert list(result["token_class"]) == ["general"]
    means = {"known": 0, "with_latent": 0, "latent_f1": None, "absorption_rate": None}
    for nothing in (unknown, rare):
        assert measure(absorbing_sae(n_children=10), x, nothing) == {"token_classes": means, "token_class": {}}


def test_a_frequent_token_counts_four_times():
    x, label, is_child = samples()
    types = torch.arange(len(x))
    (child,) = is_child[1::2].nonzero()[:1].flatten().tolist()
    child = 2 * child + 1
    often = torch.full((500,), child)
    generator = torch.Generator().manual_seed(3)
    order = torch.randperm(len(x) + 500, generator=generator)
    x, types = torch.cat([x, x[often]])[order], torch.cat([types, often])[order]
    values = measure(absorbing_sae(n_children=10), x, label, types=types)["token_class"]["general"]
    assert values["samples"] == label[1::2].sum() + 3
    expected = ((is_child[1::2].sum() + 3) / (label[1::2].sum() + 3)).item()
    assert values["absorption_rate"] == pytest.approx(expected)


def test_probes_are_those_of_logistic_regression():
    linear_model = pytest.importorskip("sklearn.linear_model")
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(500, D, generator=generator) * 3 + 5
    labels = x[:, :2] + 2 * torch.randn(500, 2, generator=generator) > torch.tensor([5.0, 8.0])
    probes = _fit_probes(_half(absorbing_sae(n_children=1), x, labels))
    reads = probes.read(x)
    centered = (x - x.mean(dim=0)) / (x - x.mean(dim=0)).square().mean().sqrt()
    for number in range(2):
        reference = linear_model.LogisticRegression(C=1 / (2 * _RIDGE * len(x)), tol=1e-8, max_iter=10_000)
        reference.fit(centered.numpy(), labels[:, number].numpy())
        weights = torch.from_numpy(reference.coef_[0]).float()
        torch.testing.assert_close(probes.directions[number], weights / weights.norm(), rtol=1e-2, atol=2e-3)
        agree = reads[:, number] == torch.from_numpy(reference.predict(centered.numpy()))
        assert agree.float().mean() > 0.99


def test_labels_are_those_of_the_tokens_that_activations_belong_to(tmp_path, monkeypatch):
    (tmp_path / "corpus.txt").write_text("the year 1990 and 12 dogs running foxish\n\n" * 400)
    text = TextConfig(source=str(tmp_path / "corpus.txt"), context_size=16, n_tokens=2_000)
    source = TransformerActivations(ModelConfig(max_norm_ratio=1.0), text, "float32", tmp_path, torch.device("cpu"))
    assert len(source.shard_sizes) == 3
    seen = []
    monkeypatch.setattr(token_classes, "absorption_of_classes", lambda *arguments: seen.append(arguments))
    token_class_metrics(None, source, [2, 0])
    ((_, activations, types, labels, names),) = seen
    labels = labels[types]
    assert torch.equal(activations, torch.cat([source.shard(2), source.shard(0)]))
    used = torch.cat([source.tokens(number)[source.is_used(number)] for number in (2, 0)])
    words = source.transformer.load_tokenizer().convert_ids_to_tokens(used.tolist())
    expected = [word in {"1990", "12"} for word in words]
    assert 0 < sum(expected) < len(expected)
    assert labels[:, names.index("digit")].tolist() == expected
    # a piece that goes on with a word has no space before it
    spaced = labels[:, names.index("leading_space")].tolist()
    assert spaced == [not word.startswith("##") for word in words]
    assert set(words) >= {"##ish", "year"}
    assert labels[:, names.index("begins_with_y")].sum() == words.count("year")
    assert labels[:, names.index("begins_with_i")].sum() == 0


@pytest.mark.parametrize(
    ("text", "classes"),
    [
        (" Dogs", {"leading_space", "capital", "ends_with_s", "begins_with_d"}),
        ("running", {"ends_with_ing"}),
        (" if", {"leading_space", "python_keyword", "begins_with_i"}),
        (" 12", {"leading_space", "digit"}),
        (")\n", {"punctuation", "newline"}),
        ("\n\n", {"newline"}),
        (" ", {"leading_space"}),
        ("is", {"python_keyword"}),
        (" _x", {"leading_space"}),
        ("", set()),
    ],
)
def test_what_a_token_is(text, classes):
    assert {name for name, has in CLASSES.items() if has(text)} == classes
