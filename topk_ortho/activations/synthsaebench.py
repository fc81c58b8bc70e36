"""The synthetic data of SynthSAEBench, drawn by SAELens, so that figures compare with those of other methods on it.

Here true features differ in frequency, by Zipf's law; most belong to trees, three levels deep, in which siblings are
exclusive and a child's magnitude is scaled by its parent's; all are correlated a little. The coefficients that this
package judges by are those that SAELens made the activations of.

References
----------
.. [1] Chanin and Garriga-Alonso, "SynthSAEBench: Evaluating Sparse Autoencoders on Scalable Realistic Synthetic Data",
   arXiv:2602.14687. The benchmark has 16,384 true features in 768 dimensions.
"""

import threading
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from topk_ortho.activations.config import SynthSAEBenchConfig
from topk_ortho.activations.source import generator_of
from topk_ortho.activations.synthetic import KnownActivations
from topk_ortho.activations.true_features import TrueFeatures

if TYPE_CHECKING:
    from sae_lens.synthetic import Hierarchy, SyntheticModelConfig

_FEATURES_PER_TREE = 128
"""The benchmark has 128 trees, of 85 features each, among its 16,384 features."""
_random_state = threading.Lock()
"""Held while shards are drawn, which SAELens does with the random numbers that the whole process shares"""


class SynthSAEBenchActivations(KnownActivations):
    """Activations of SAELens's `SyntheticModel` with the settings of SynthSAEBench, at any size.

    Parameters
    ----------
    config : SynthSAEBenchConfig
        Numbers of dimensions, true features and samples.
    seed : int
        Decides the true features and, together with a shard's number, the samples of that shard.

    Raises
    ------
    ValueError
        If SAELens is not installed.
    """

    def __init__(self, config: SynthSAEBenchConfig, seed: int):
        super().__init__("synthsaebench", config, seed)
        try:
            from sae_lens.synthetic import SyntheticModel
        except ImportError as error:
            raise ValueError(f"source synthsaebench needs the package {error.name}: pip install sae-lens") from error
        self.model = SyntheticModel(_benchmark(config, seed))
        self.truth = TrueFeatures(
            directions=self.model.feature_dict.feature_vectors.detach(),
            parent=_parents(self.model.hierarchy, config.n_true),
        )

    def sample(self, number: int) -> tuple[Tensor, Tensor]:
        """Activations of a shard, and the coefficients [n_tokens, n_true] of the true features in them."""
        seed = generator_of("shard", self._seed, number).initial_seed()
        with _random_state, torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self.model.sample_with_features(self.shard_sizes[number])


def _benchmark(config: SynthSAEBenchConfig, seed: int) -> "SyntheticModelConfig":
    """The settings of SynthSAEBench-16k for any number of features and dimensions."""
    from sae_lens import synthetic

    return synthetic.SyntheticModelConfig(
        num_features=config.n_true,
        hidden_dim=config.d_in,
        firing_probability=synthetic.ZipfianFiringProbabilityConfig(exponent=0.5, max_prob=0.4, min_prob=5e-4),
        hierarchy=synthetic.HierarchyConfig(
            total_root_nodes=max(1, config.n_true // _FEATURES_PER_TREE),
            branching_factor=4,
            max_depth=3,
            mutually_exclusive_portion=1.0,
            compensate_probabilities=True,
            scale_children_by_parent=True,
        ),
        orthogonalization=synthetic.OrthogonalizationConfig(num_steps=100, lr=3e-4),
        correlation=synthetic.LowRankCorrelationConfig(rank=25, correlation_scale=0.1),
        mean_firing_magnitudes=synthetic.LinearMagnitudeConfig(start=5.0, end=4.0),
        std_firing_magnitudes=synthetic.FoldedNormalMagnitudeConfig(mean=0.5, std=0.5),
        bias=0.5,
        seed=seed,
    )


def _parents(hierarchy: "Hierarchy | None", n_true: int) -> Tensor:
    """Parent [n_true] of every feature, int64, -1 for those without one."""
    parent = torch.full((n_true,), -1)
    nodes = [] if hierarchy is None else list(hierarchy.roots)
    while nodes:
        node = nodes.pop()
        for child in node.children:
            assert child.feature_index is not None  # as of all nodes that are generated
            assert node.feature_index is not None
            parent[child.feature_index] = node.feature_index
        nodes += node.children
    return parent
