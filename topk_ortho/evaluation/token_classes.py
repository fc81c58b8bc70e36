"""Absorption on real text, of classes of tokens that are known exactly from the token: capitals, digits, endings.

The measure is that of "A is for Absorption" [1] as SAEBench [2] takes it, for any property of a token in the place of
its first letter. A linear probe finds the direction of a class in the model's activations. The latents of the class are
those whose firing tells it best. A token of the class is *absorbed* if the probe sees its class, no latent of the class
fires, and another latent carries the direction in their place.

A rate of absorption means nothing where no latent stands for the class in the first place. So each rate comes with the
F1 score of the class's best latent, and there is none where this is below 0.5.

[1] Chanin et al., arXiv:2409.14507.
[2] Karvonen et al., "SAEBench", arXiv:2503.09532, whose thresholds these are.
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
"""F1 score of a class's best latent from which its absorption means something"""
_SPLIT = 0.03
"""By how much a further latent must raise the F1 score to count as one of a class that is split"""
_MOST_LATENTS = 10
_ALIGNED = 0.025
"""Cosine of an absorbing latent's direction to the probe's, at least"""
_CARRIED = 0.4
"""Share of a token's projection on the probe's direction that an absorbing latent must carry"""
_FEWEST_TOKENS = 30
"""Tokens of a class in each half, below which it is left out"""
_RIDGE = 1e-4
_TOKENS_AT_A_TIME = 1_024
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
    """Half of the tokens."""

    x: Tensor
    """Activations [n, d_in], float32"""
    labels: Tensor
    """Whether a token is of a class, bool [n, n_classes]"""
    tokens: Tensor
    """Token of each feature that fires, int64 [n_entries]"""
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

    def projections(self, x: Tensor) -> Tensor:
        """Projections [n, n_classes] of activations on the directions."""
        return (x - self.center) @ self.directions.T


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
    distinct, which = ids.unique(return_inverse=True)
    texts = [_text(tokenizer, token) for token in distinct.tolist()]
    labels = torch.tensor([[has(text) for has in CLASSES.values()] for text in texts])[which]
    activations = torch.cat([source.shard(number) for number in shards])
    return absorption_of_classes(sae, activations, labels, list(CLASSES))


def _text(tokenizer: Any, token: int) -> str:
    """The text of a token, which begins with a space if it begins a word after one.

    WordPiece marks the pieces that go on with a word instead; the others stand for the space before them too.
    """
    text = str(tokenizer.decode([token], clean_up_tokenization_spaces=False))
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    mark = getattr(model, "continuing_subword_prefix", None)
    if not mark:
        return text
    return text.removeprefix(mark) if text.startswith(mark) else f" {text}"


@torch.no_grad()
def absorption_of_classes(
    sae: SparseAutoencoder, activations: Tensor, labels: Tensor, names: list[str]
) -> dict[str, Any]:
    """Absorption of boolean properties of samples: the first half of them fits, the second is measured.

    Parameters
    ----------
    sae : SparseAutoencoder
        In eval mode.
    activations : Tensor, shape [n, d_in]
        What it takes.
    labels : Tensor, shape [n, n_classes], bool
        Which sample has which property. One that fewer than 30 samples of either half have is left out.
    names : list of str
        Names of the properties.

    Returns
    -------
    dict of str to dict
        ``token_classes``: ``known`` is the number of classes that the probe reads (F1 of 0.6 or more), ``with_latent``
        that of those of them that a latent stands for (F1 of 0.5 or more), ``latent_f1`` the mean F1 of the best
        latents of all known classes, and ``absorption_rate`` the mean over those with a latent.
        ``token_class``: for every known class by its name ``tokens``, the number of its tokens that are measured,
        ``probe_f1``, ``latent_f1`` (of the best latent), ``latents`` (into how many the class is split), and
        ``absorption_rate``, the share of the tokens that the probe reads that are absorbed. It is None where no
        latent stands for the class. Means over nothing are None.
    """
    middle = len(activations) // 2
    is_frequent = torch.minimum(labels[:middle].sum(dim=0), labels[middle:].sum(dim=0)) >= _FEWEST_TOKENS
    names = [name for name, is_in in zip(names, is_frequent.tolist(), strict=True) if is_in]
    labels = labels[:, is_frequent].to(sae.W_dec.device)
    first, second = (_half(sae, activations[part], labels[part]) for part in (slice(middle), slice(middle, None)))
    probes = _fit_probes(first)
    probe_f1 = _f1(probes.projections(second.x) > probes.thresholds, second.labels)
    classes = {
        name: {"tokens": int(second.labels[:, number].sum()), "probe_f1": probe_f1[number].item()}
        | _of_class(sae.W_dec, first, second, probes, number)
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


def _of_class(W_dec: Tensor, first: _Half, second: _Half, probes: _Probes, number: int) -> dict[str, Any]:
    """The latents of a class, which the first half tells, and how often they are silent in the second."""
    latents = _latents_of(first, first.labels[:, number], len(W_dec))
    label = second.labels[:, number]
    latent_f1 = _f1(_fires(second, latents[:1])[:, None], label[:, None]).item()
    projection = probes.projections(second.x)[:, number]
    is_read = label & (projection > probes.thresholds[number])
    rate = None
    if latent_f1 >= _LATENT_STANDS_FOR:
        along = W_dec.float() @ probes.directions[number]
        is_aligned = along >= _ALIGNED * torch.linalg.vector_norm(W_dec.float(), dim=1)
        carried = second.values * torch.where(is_aligned, along, 0.0)[second.features]
        largest = torch.zeros_like(projection).scatter_reduce(0, second.tokens, carried, "amax")
        # the direction must be there at all: what is read may lie below the mean of all tokens
        is_carried = (projection > 0) & (largest >= _CARRIED * projection)
        absorbed = is_read & ~_fires(second, latents) & is_carried
        rate = ratio(int(absorbed.sum()), int(is_read.sum()))
    return {"latent_f1": latent_f1, "latents": len(latents), "absorption_rate": rate}


def _half(sae: SparseAutoencoder, activations: Tensor, labels: Tensor) -> _Half:
    """The features of some samples, by their entries."""
    entries = []
    for start, part in enumerate(activations.split(_TOKENS_AT_A_TIME)):
        features = sae.encode(part.to(sae.W_dec.device).float())
        if isinstance(features, ActiveFeatures):
            fires = features.values > 0
            tokens, which, values = features.samples[fires], features.features[fires], features.values[fires]
        else:
            tokens, which = features.nonzero(as_tuple=True)
            values = features[tokens, which]
        entries.append((tokens + start * _TOKENS_AT_A_TIME, which, values.float()))
    parts = (torch.cat(column) for column in zip(*entries, strict=True))
    return _Half(activations.to(sae.W_dec.device).float(), labels, *parts)


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
        here = is_silent[half.tokens]
        tokens, features = half.tokens[here], half.features[here]
        true = torch.bincount(features[label[tokens]], minlength=n_features)
        fired = torch.bincount(features, minlength=n_features)
        scores = 2 * (n_true + true) / (n_fired + fired + label.sum())
        best = int(scores.argmax())
        if latents and scores[best] < score + _SPLIT:
            break
        score = scores[best].item()
        latents.append(best)
        n_true, n_fired = n_true + int(true[best]), n_fired + int(fired[best])
        is_silent[tokens[features == best]] = False
    return torch.tensor(latents, device=label.device)


def _fires(half: _Half, latents: Tensor) -> Tensor:
    """Whether any of the features fires on a sample, bool [n]."""
    fires = torch.zeros(len(half.x), dtype=torch.bool, device=half.x.device)
    fires[half.tokens[torch.isin(half.features, latents)]] = True
    return fires


def _f1(predicted: Tensor, actual: Tensor) -> Tensor:
    """F1 score of each column of two bool matrices [n, m]; 0 if nothing is predicted."""
    both = (predicted & actual).sum(dim=0)
    return 2 * both / (predicted.sum(dim=0) + actual.sum(dim=0)).clamp_min(1)
