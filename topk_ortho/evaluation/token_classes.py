"""Absorption on real text, of classes of tokens that are known from the token: capitals, endings, first letters.

The idea is that of "A is for Absorption" [1]: a linear probe finds the direction of a class in the model's activations.
The latents of the class are those whose firing tells it best. A token of the class is *absorbed* if the probe sees its
class, no latent of the class fires, and the latent that carries most of the direction is another one. The thresholds
are those of SAEBench [2]. Unlike there, the text is natural and not a prompt, the class is any property of a token and
not its first letter, and the latents of a class are chosen by their firing and not by a sparse probe.

Frequent tokens would drown the others ("the" is a third to a half of all words that begin with t), and a probe or a
latent may know single tokens instead of what they have in common. So a token of the vocabulary counts a few times at
most, however often it occurs, and those that fit the probes and choose the latents are others than those that are
measured.

A rate of absorption means nothing where no latent stands for the class in the first place. So each rate comes with the
F1 score of the class's latents, and there is none where this is below 0.5. A class of which more than two thirds are
absorbed has no such latent left: read the number of classes with a latent beside the mean of their rates.

[1] Chanin et al., arXiv:2409.14507.
[2] Karvonen et al., "SAEBench", arXiv:2503.09532.
"""

import keyword
import string
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from topk_ortho.activations.cache import TransformerActivations
from topk_ortho.evaluation.metrics import ratio
from topk_ortho.sae import ActiveFeatures, SparseAutoencoder

_PROBE_READS = 0.6
"""F1 score of the probe from which the model is said to know a class"""
_LATENT_STANDS_FOR = 0.5
"""F1 score of a class's latents from which its absorption means something"""
_SPLIT = 0.03
"""By how much a further latent must raise the F1 score to count as one of a class that is split"""
_MOST_LATENTS = 10
_ALIGNED = 0.025
"""Cosine of an absorbing latent's direction to the probe's, at least"""
_CARRIED = 0.4
"""Share of a token's projection on the probe's direction that an absorbing latent must carry"""
_OCCURRENCES = 4
"""How often a token of the vocabulary counts at most"""
_FEWEST_TYPES = 20
"""Different tokens of a class in each half, below which it is left out"""
_LARGEST_SHARE = 1 / 3
"""Share of the samples above which a class is left out: the F1 score of a latent that always fires would be 0.5"""
_RIDGE = 1e-4
_SAMPLES_AT_A_TIME = 1_024
_LBFGS_STEPS = 200


def _ends_with(ending: str) -> Callable[[str], bool]:
    return lambda text: text.strip().isalpha() and text.strip().endswith(ending) and len(text.strip()) > len(ending) + 1


def _begins_with(letter: str) -> Callable[[str], bool]:
    return lambda text: text.startswith(" ") and text.strip().isalpha() and text.strip()[0].lower() == letter


CLASSES: dict[str, Callable[[str], bool]] = {
    "leading_space": lambda text: text.startswith(" "),
    "capital": lambda text: text.strip()[:1].isupper(),
    "digit": lambda text: text.strip().isdigit(),
    "punctuation": lambda text: bool(text.strip()) and all(c in string.punctuation for c in text.strip()),
    "newline": lambda text: "\n" in text,
    "python_keyword": lambda text: text.strip() in keyword.kwlist,
    **{f"ends_with_{ending}": _ends_with(ending) for ending in ("s", "ed", "ing", "ly", "ion")},
    **{f"begins_with_{letter}": _begins_with(letter) for letter in string.ascii_lowercase},
}
"""Properties of a token's text. First letters are those of words with a space before them."""


class _Half(NamedTuple):
    """Half of the samples."""

    x: Tensor
    """Activations [n, d_in], float32"""
    labels: Tensor
    """Whether a sample is of a class, bool [n, n_classes]"""
    samples: Tensor
    """Sample of each feature that fires, int64 [n_entries]"""
    features: Tensor
    """The feature, int64 [n_entries]"""
    values: Tensor
    """Its activation, float32 [n_entries], above 0"""


class _Probes(NamedTuple):
    """A linear probe for every class."""

    center: Tensor
    """Mean activations [d_in]"""
    directions: Tensor
    """[n_classes, d_in], of unit norm"""
    thresholds: Tensor
    """[n_classes]: what a projection of x - center must exceed"""

    def read(self, x: Tensor) -> Tensor:
        """Whether a sample [n, d_in] is of a class, by its probe, bool [n, n_classes]."""
        return (x - self.center) @ self.directions.T > self.thresholds


def token_class_metrics(sae: SparseAutoencoder, source: TransformerActivations, shards: list[int]) -> dict[str, Any]:
    """Absorption of the classes of tokens on the tokens of some shards; see `absorption_of_classes`.

    Parameters
    ----------
    sae : SparseAutoencoder
        In eval mode, of activations as the source gives them.
    source : TransformerActivations
        The activations, and their tokens.
    shards : list of int
        Which of its shards.
    """
    tokenizer = source.transformer.load_tokenizer()
    ids = torch.cat([source.tokens(number)[source.is_used(number)] for number in shards])
    distinct, types = ids.unique(return_inverse=True)
    texts = [_text(tokenizer, token) for token in distinct.tolist()]
    labels = torch.tensor([[has(text) for has in CLASSES.values()] for text in texts])
    activations = torch.cat([source.shard(number) for number in shards])
    return absorption_of_classes(sae, activations, types, labels, list(CLASSES))


def _text(tokenizer: Any, token: int) -> str:
    """The text of a token; a token that begins a word has the space before it.

    Tokenizers of the kind BPE have it in the token. WordPiece marks the tokens that go on with a word instead, as in
    "##ing", so here every other one gets a space.
    """
    text = str(tokenizer.decode([token], clean_up_tokenization_spaces=False))
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    mark = getattr(model, "continuing_subword_prefix", None)
    if not mark:
        return text
    return text.removeprefix(mark) if text.startswith(mark) else f" {text}"


@torch.no_grad()
def absorption_of_classes(
    sae: SparseAutoencoder, activations: Tensor, types: Tensor, labels: Tensor, names: list[str]
) -> dict[str, Any]:
    """Absorption of classes of types, such as tokens of a vocabulary; activations are samples of the types.

    The first 4 samples of every type count. The types of even numbers fit the probes and choose the latents; the
    others are measured.

    Parameters
    ----------
    sae : SparseAutoencoder
        In eval mode.
    activations : Tensor, shape [n, d_in]
        What it takes.
    types : Tensor, shape [n], int64
        Which type each is a sample of, such as which token of the vocabulary.
    labels : Tensor, shape [n_types, n_classes], bool
        Which type is of which class. A class is left out if it has fewer than 20 types in either half, or more than a
        third of the samples.
    names : list of str
        Names of the classes.

    Returns
    -------
    dict of str to dict
        ``token_classes``: ``known`` is the number of classes that the probe reads (F1 of 0.6 or more), ``with_latent``
        that of those of them that latents stand for (F1 of 0.5 or more), ``latent_f1`` the mean F1 of the latents of
        all known classes, and ``absorption_rate`` the mean over those with a latent.
        ``token_class``: for every known class by its name ``samples``, how many of it are measured, ``probe_f1``,
        ``latent_f1``, ``latents`` (into how many the class is split), and ``absorption_rate``, the share of the samples
        that the probe reads that are absorbed. It is None where no latent stands for the class. Means over nothing are
        None.
    """
    counts = _occurrence(types) < _OCCURRENCES
    activations, types = activations[counts], types[counts]
    is_first = types % 2 == 0
    names, labels = _measurable(labels, types, names)
    classes: dict[str, dict[str, Any]] = {}
    if names:
        first, second = (_half(sae, activations[part], labels[types[part]]) for part in (is_first, ~is_first))
        probes = _fit_probes(first)
        is_read = probes.read(second.x)
        probe_f1 = _f1(is_read, second.labels)
        classes = {
            name: {"samples": int(second.labels[:, number].sum()), "probe_f1": probe_f1[number].item()}
            | _of_class(sae, first, second, number, is_read[:, number], probes.directions[number])
            for number, name in enumerate(names)
            if probe_f1[number] >= _PROBE_READS
        }
    rates = [values["absorption_rate"] for values in classes.values() if values["absorption_rate"] is not None]
    of_all = {
        "known": len(classes),
        "with_latent": len(rates),
        "latent_f1": ratio(sum(values["latent_f1"] for values in classes.values()), len(classes)),
        "absorption_rate": ratio(sum(rates), len(rates)),
    }
    return {"token_classes": of_all, "token_class": classes}


def _occurrence(types: Tensor) -> Tensor:
    """How many samples of the same type come before each, int64 [n]."""
    order = torch.argsort(types, stable=True)
    place = torch.arange(len(types))
    is_new = torch.ones_like(types, dtype=torch.bool)
    is_new[1:] = types[order][1:] != types[order][:-1]
    begin = torch.cummax(torch.where(is_new, place, 0), dim=0).values
    return torch.empty_like(types).index_put((order,), place - begin)


def _measurable(labels: Tensor, types: Tensor, names: list[str]) -> tuple[list[str], Tensor]:
    """Names and labels [n_types, n] of the classes with enough types in both halves and not too many samples."""
    occurs = torch.zeros(len(labels), dtype=torch.bool).index_fill(0, types, True)
    occurring = labels & occurs[:, None]
    enough = torch.minimum(occurring[::2].sum(dim=0), occurring[1::2].sum(dim=0)) >= _FEWEST_TYPES
    is_in = enough & (labels[types].sum(dim=0) <= _LARGEST_SHARE * len(types))
    return [name for name, is_one in zip(names, is_in.tolist(), strict=True) if is_one], labels[:, is_in]


def _of_class(
    sae: SparseAutoencoder, first: _Half, second: _Half, number: int, is_read: Tensor, direction: Tensor
) -> dict[str, Any]:
    """The latents of a class, which the first half tells, and how often it is absorbed in the second."""
    label = second.labels[:, number]
    latents = _latents_of(first, first.labels[:, number], sae.n_features)
    fires = _fires(second, latents)
    latent_f1 = _f1(fires[:, None], label[:, None]).item()
    rate = None
    if latent_f1 >= _LATENT_STANDS_FOR:
        W_dec = sae.W_dec.float()
        projection = (second.x - sae.b_dec) @ direction
        along = W_dec @ direction
        carried = second.values * along[second.features]
        is_aligned = (along >= _ALIGNED * torch.linalg.vector_norm(W_dec, dim=1))[second.features]
        largest, aligned = (
            torch.zeros_like(projection).scatter_reduce(0, second.samples, each, "amax")
            for each in (carried, torch.where(is_aligned, carried, 0.0))
        )
        is_carried = (aligned == largest) & (aligned >= _CARRIED * projection) & (projection > 0)
        rate = ratio(int((label & is_read & ~fires & is_carried).sum()), int((label & is_read).sum()))
    return {"latent_f1": latent_f1, "latents": len(latents), "absorption_rate": rate}


def _half(sae: SparseAutoencoder, activations: Tensor, labels: Tensor) -> _Half:
    """Some samples, with the features that fire on them."""
    device = sae.W_dec.device
    entries = []
    for number, part in enumerate(activations.split(_SAMPLES_AT_A_TIME)):
        features = sae.encode(part.to(device).float())
        if isinstance(features, ActiveFeatures):
            fires = features.values > 0
            samples, which, values = features.samples[fires], features.features[fires], features.values[fires]
        else:
            samples, which = features.nonzero(as_tuple=True)
            values = features[samples, which]
        entries.append((samples + number * _SAMPLES_AT_A_TIME, which, values.float()))
    parts = (torch.cat(column) for column in zip(*entries, strict=True))
    return _Half(activations.to(device).float(), labels.to(device), *parts)


@torch.enable_grad()
def _fit_probes(half: _Half) -> _Probes:
    """Logistic regression with a little ridge, for all classes at once, by L-BFGS."""
    center = half.x.mean(dim=0)
    scale = (half.x - center).square().mean().sqrt()
    x, targets = (half.x - center) / scale, half.labels.float()
    weights = x.new_zeros(targets.shape[1], x.shape[1], requires_grad=True)
    bias = x.new_zeros(targets.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weights, bias], max_iter=_LBFGS_STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = torch.addmm(bias, x, weights.T)
        # every class has a loss of its own, so a sum keeps them apart
        entropy = binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(dim=0).sum()
        total: Tensor = entropy + _RIDGE * weights.square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    norms = torch.linalg.vector_norm(weights.detach(), dim=1)
    return _Probes(center, weights.detach() / norms[:, None], -bias.detach() * scale / norms)


def _latents_of(half: _Half, label: Tensor, n_features: int) -> Tensor:
    """The features that together tell a class best by their firing, int64 [n >= 1].

    The one with the largest F1 score, then further ones as long as each raises that of all together by 0.03.
    """
    is_silent = torch.ones_like(label)
    n_true = n_fired = 0  # samples on which a latent fires: those of the class, and all
    score = 0.0
    latents: list[int] = []
    while len(latents) < _MOST_LATENTS:
        here = is_silent[half.samples]
        samples, features = half.samples[here], half.features[here]
        true = torch.bincount(features[label[samples]], minlength=n_features)
        fired = torch.bincount(features, minlength=n_features)
        scores = 2 * (n_true + true) / (n_fired + fired + label.sum())
        best = int(scores.argmax())
        if latents and scores[best] < score + _SPLIT:
            break
        score = scores[best].item()
        latents.append(best)
        n_true, n_fired = n_true + int(true[best]), n_fired + int(fired[best])
        is_silent[samples[features == best]] = False
    return torch.tensor(latents, device=label.device)


def _fires(half: _Half, latents: Tensor) -> Tensor:
    """Whether any of the features fires on a sample, bool [n]."""
    fires = torch.zeros(len(half.x), dtype=torch.bool, device=half.x.device)
    fires[half.samples[torch.isin(half.features, latents)]] = True
    return fires


def _f1(predicted: Tensor, actual: Tensor) -> Tensor:
    """F1 score of each column of two bool matrices [n, m]; 0 if nothing is predicted."""
    both = (predicted & actual).sum(dim=0)
    return 2 * both / (predicted.sum(dim=0) + actual.sum(dim=0)).clamp_min(1)
