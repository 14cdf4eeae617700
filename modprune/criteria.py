"""What is lost if a block goes: a score per block, by name or by a callable of one's own.

A criterion is a callable `(model, blocks, loader) -> BlockScores` that leaves the model as found. Its one meaning: the
higher the score, the more is lost if the block goes. Those here are small frozen dataclasses with their constants as
fields: `Modularity(samples=200)`; by name they come with their defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modprune._inputs import first_line, take
from modprune._state import state_kept, traceable
from modprune.blocks import Blocks
from modprune.bypass import bypassed
from modprune.curve import ModularityCurve, check_classes, modularity_curve, points, q_of
from modprune.evaluate import evaluate, logits_and_labels
from modprune.features import GIB, LayerGrams
from modprune.graph import check_labels, modularity
from modprune.samples import drawn, labels_of
from modprune.similarity import linear_cka, mean_cosine
from modprune.visits import pairs, pooled

CHANCE = 0.01  # about what Q of 500 samples scatters by where features know nothing of the classes
T = TypeVar("T")


@dataclass(frozen=True, eq=False)  # arrays have no one answer
class BlockScores:
    """Scores of blocks.

    Attributes:
        names: of the blocks.
        values: (repeats, blocks) float64; higher means more is lost if the block goes.
        curve: the curve that they were read off, if they were.
    """

    names: tuple[str, ...]
    values: np.ndarray
    curve: ModularityCurve | None = None

    def __post_init__(self) -> None:
        """Raise ValueError if the values are no numbers or of another shape, or a name comes twice."""
        try:
            values = np.asarray(self.values, np.float64)
        except (TypeError, ValueError, RuntimeError) as error:  # texts, ragged lists, tensors with gradients
            raise ValueError(f"the values of blocks are no array of numbers: {first_line(error)}") from None
        if values.ndim != 2 or not len(values) or values.shape[1] != len(self.names):
            raise ValueError(
                f"the values of {len(self.names)} blocks have shape {values.shape}: give (repeats, {len(self.names)})"
            )
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"the names of blocks come more than once: {', '.join(self.names):.90}")
        object.__setattr__(self, "values", values)

    @property
    def mean(self) -> dict[str, float]:
        """Mean score over the repeats by name."""
        return dict(zip(self.names, self.values.mean(0).tolist(), strict=True))


Criterion = Callable[[nn.Module, Blocks, Iterable[Any]], BlockScores]


@dataclass(frozen=True)
class Modularity:
    """The gain of each block: Q after it minus Q after the block before, as the curve has it.

    Lu et al., "Understanding the Dynamics of DNNs Using Graph Modularity" (ECCV 2022), section 5, with its defaults.
    """

    k: int = 3
    samples: int = 500
    repeats: int = 5
    budget: int = field(default=GIB, repr=False)  # of memory: no score depends on it

    def __call__(self, model: nn.Module, blocks: Blocks, loader: Iterable[Any]) -> BlockScores:
        """(repeats, blocks): each repeat from samples of its own."""
        curve = modularity_curve(model, loader, self.k, self.samples, self.repeats, blocks=blocks, budget=self.budget)
        return BlockScores(blocks.names, np.diff(curve.q, axis=1), curve)


@dataclass(frozen=True)
class ModularityDrop:
    """How far Q of the last block's output falls when the block is left out, and nothing is trained after it.

    `Modularity` asks what the block itself does, this what the rest of the network makes of its absence. Ours: the Q of
    Lu et al. (ECCV 2022) under the question of `Ablation`.
    """

    k: int = 3
    samples: int = 500
    repeats: int = 1
    budget: int = field(default=GIB, repr=False)  # of memory: no score depends on it

    def __call__(self, model: nn.Module, blocks: Blocks, loader: Iterable[Any]) -> BlockScores:
        """(repeats, blocks): each repeat from samples of its own."""
        end = LayerGrams(model, [blocks[-1].end], self.budget)
        values = []
        for sample in drawn(loader, self.samples, self.repeats):
            (whole,) = q_of(end, sample, self.k)
            values.append([whole - q for (q,) in _without_each(model, blocks, partial(q_of, end, sample, self.k))])
        return BlockScores(blocks.names, np.array(values))


@dataclass(frozen=True)
class ModularityPooled:
    """By what factor Q of globally pooled features grows across the block, as a logarithm.

    Where in the image a feature lies no longer makes two samples alike. Q of such features grows by factors: gains
    would rank blocks by their depth. Q counts as 0.01 at least. Ours: the Q of Lu et al. (ECCV 2022) on the
    features of `LinearProbe`.
    """

    k: int = 3
    samples: int = 500
    repeats: int = 5

    def __call__(self, model: nn.Module, blocks: Blocks, loader: Iterable[Any]) -> BlockScores:
        """(repeats, blocks): each repeat from samples of its own."""
        stem, q = _at_points(model, blocks, loader, self.samples, self.repeats, self._q)
        growth = np.diff(np.log(np.maximum(q, CHANCE)), axis=1)
        return BlockScores(blocks.names, growth, ModularityCurve((stem, *blocks.names), q))

    def _q(self, features: np.ndarray, labels: np.ndarray) -> float:
        classes = torch.from_numpy(labels)
        check_classes(classes)
        return modularity(torch.from_numpy(features), classes, self.k)


@dataclass(frozen=True)
class LinearProbe:
    """Accuracy, from 0 to 1, that logistic regression on globally pooled features gains from block to block.

    Fitted on the first half of the samples and measured on the second. After Chen and Zhao, "Shallowing Deep Networks:
    Layer-wise Pruning based on Feature Representations" (TPAMI 2018).
    """

    samples: int = 1000
    repeats: int = 3

    def __call__(self, model: nn.Module, blocks: Blocks, loader: Iterable[Any]) -> BlockScores:
        """(repeats, blocks): each repeat from samples of its own."""
        _, accuracy = _at_points(model, blocks, loader, self.samples, self.repeats, self._accuracy)
        return BlockScores(blocks.names, np.diff(accuracy, axis=1))

    def _accuracy(self, features: np.ndarray, labels: np.ndarray) -> float:
        from sklearn.linear_model import LogisticRegression

        return _held_out(LogisticRegression(max_iter=1000), features, labels)


@dataclass(frozen=True)
class Dbp(LinearProbe):
    """As `LinearProbe`, with a linear classifier by least squares (ridge) in place of logistic regression.

    After Wang et al., "DBP: Discrimination Based Block-Level Pruning for Deep Model Acceleration" (2019), who train the
    linear classifier of each block by SGD on all the data.
    """

    def _accuracy(self, features: np.ndarray, labels: np.ndarray) -> float:
        from sklearn.linear_model import RidgeClassifier

        return _held_out(RidgeClassifier(), features, labels)


@dataclass(frozen=True)
class BlockInfluence:
    """1 - cosine of what goes into a block and what comes out; needs no labels.

    Mean over tokens, as in the paper, where features are (B, T, C); else each sample is flattened. A repeat is a batch.
    Blocks that change the shape have nothing to compare and score 1. Men et al., "ShortGPT: Layers in Large Language
    Models are More Redundant Than You Expect" (2024), section 3.
    """

    samples: int = 500

    def __call__(self, model: nn.Module, blocks: Blocks, loader: Iterable[Any]) -> BlockScores:
        """(batches, blocks)."""
        return BlockScores(blocks.names, np.array(pairs(model, _spans(blocks), loader, self.samples, _turned)))


@dataclass(frozen=True)
class Cka:
    """1 - linear CKA of what goes into a block and what comes out; needs no labels.

    Each sample is flattened; a repeat is a batch of 4 samples at least, with the unbiased estimates that small batches
    need. Kornblith et al., "Similarity of Neural Network Representations Revisited" (ICML 2019), section 3, and for the
    estimate Nguyen et al., "Do Wide and Deep Networks Learn the Same Things?" (ICLR 2021), equation 3.
    """

    samples: int = 500

    def __call__(self, model: nn.Module, blocks: Blocks, loader: Iterable[Any]) -> BlockScores:
        """(batches, blocks)."""
        values = np.array(pairs(model, _spans(blocks), loader, self.samples, _unlike))
        measured = values[~np.isnan(values).all(1)]  # a last, small batch is left out
        if len(measured) == 0:
            raise ValueError("CKA needs batches of at least 4 samples: give a loader with a larger batch size")
        return BlockScores(blocks.names, measured)


@dataclass(frozen=True)
class Ablation:
    """How much the cross-entropy loss rises when the block is left out, and nothing is trained after it.

    Veit et al., "Residual Networks Behave Like Ensembles of Relatively Shallow Networks" (NeurIPS 2016), section 4.1.
    """

    samples: int = 500
    repeats: int = 1

    def __call__(self, model: nn.Module, blocks: Blocks, loader: Iterable[Any]) -> BlockScores:
        """(repeats, blocks): each repeat from samples of its own."""
        values = []
        for sample in drawn(loader, self.samples, self.repeats):
            with state_kept(model):
                whole = evaluate(model, sample).loss
                without = _without_each(model, blocks, partial(evaluate, model, sample))
                values.append([evaluation.loss - whole for evaluation in without])
        return BlockScores(blocks.names, np.array(values))


@dataclass(frozen=True)
class Taylor:
    """The square of the sum of gradient times weight over all weights of the block; a repeat is a batch.

    The first-order estimate of how the loss changes if they are zero: Molchanov et al., "Importance Estimation for
    Neural Network Pruning" (CVPR 2019), equation 8, with a block for the group.
    """

    samples: int = 500

    def __call__(self, model: nn.Module, blocks: Blocks, loader: Iterable[Any]) -> BlockScores:
        """(batches, blocks)."""
        owned = [(i, p) for i, block in enumerate(blocks) for p in _weights(model, block.layers)]
        owner, weights = zip(*owned, strict=True)
        values = []
        for batch in drawn(loader, self.samples, 1)[0]:
            with traceable(model):
                loss = F.cross_entropy(*logits_and_labels(model, batch))
                gradients = torch.autograd.grad(loss, weights, allow_unused=True)
            slopes = zip(gradients, weights, strict=True)
            terms = [0.0 if g is None else float((g.float() * w.detach().float()).sum()) for g, w in slopes]
            values.append(np.bincount(owner, terms, len(blocks)) ** 2)
        return BlockScores(blocks.names, np.array(values))


@dataclass(frozen=True)
class L1Norm:
    """Mean L1 norm of the block's filters; needs no data.

    Li et al., "Pruning Filters for Efficient ConvNets" (ICLR 2017), section 3.1, averaged over the filters of each
    layer, then over the layers. Scales of channels and tables of position biases are no layers.
    """

    def __call__(self, model: nn.Module, blocks: Blocks, loader: Iterable[Any] = ()) -> BlockScores:
        """(1, blocks)."""
        filters = [_filters(model, block.layers) for block in blocks]
        return _once(
            blocks, [[float(p.abs().flatten(1).sum(1).mean()) for p in layers] for layers in filters], "weight"
        )


@dataclass(frozen=True)
class BnScale:
    """Mean absolute scale of the block's norms; needs no data.

    Liu et al., "Learning Efficient Convolutional Networks through Network Slimming" (ICCV 2017), section 3, averaged
    over the channels of each norm, then over the norms.
    """

    def __call__(self, model: nn.Module, blocks: Blocks, loader: Iterable[Any] = ()) -> BlockScores:
        """(1, blocks)."""
        means = [[float(scale.detach().abs().mean()) for scale in _scales(model, block.layers)] for block in blocks]
        return _once(blocks, means, "norm with a scale")


@dataclass(frozen=True)
class Random:
    """Numbers from 0 to 1 that know nothing, the same for the same seed: what a criterion has to beat."""

    seed: int = 0

    def __call__(self, model: nn.Module, blocks: Blocks, loader: Iterable[Any] = ()) -> BlockScores:
        """(1, blocks)."""
        return BlockScores(blocks.names, np.random.default_rng(self.seed).random((1, len(blocks))))


@dataclass(frozen=True)
class Consensus:
    """Mean rank of the block, from 0 to 1, among all by several criteria, given by name or as callables.

    After Mugnaini et al., "Layer Pruning with Consensus: A Triple-Win Solution" (2024), who join several similarities.
    """

    criteria: Sequence[str | Criterion] = ("modularity", "block_influence", "ablation")

    def __call__(self, model: nn.Module, blocks: Blocks, loader: Iterable[Any]) -> BlockScores:
        """(criteria, blocks): equal scores have equal ranks."""
        ranks = []
        for criterion in map(resolve, self.criteria):
            mean = scores_by(criterion, model, blocks, loader).mean
            if bad := [name for name in blocks.names if not np.isfinite(mean[name])]:  # a rank would hide it
                raise ValueError(
                    f"the score of {bad[0]} by {name_of(criterion)} is not a finite number: check the criterion"
                )
            _, rank = np.unique([mean[name] for name in blocks.names], return_inverse=True)
            ranks.append(rank / max(1, rank.max()))
        return BlockScores(blocks.names, np.array(ranks))


CRITERIA: dict[str, Callable[[], Criterion]] = {
    "modularity": Modularity,
    "modularity_drop": ModularityDrop,
    "modularity_pooled": ModularityPooled,
    "linear_probe": LinearProbe,
    "dbp": Dbp,
    "cka": Cka,
    "block_influence": BlockInfluence,
    "ablation": Ablation,
    "taylor": Taylor,
    "l1_norm": L1Norm,
    "bn_scale": BnScale,
    "consensus": Consensus,
    "random": Random,
}


def resolve(criterion: str | Criterion) -> Criterion:
    """The criterion of that name with its defaults; a callable is its own.

    >>> resolve("random")
    Random(seed=0)
    """
    if isinstance(criterion, type):
        raise ValueError(f"criterion {criterion.__name__} is a class: give an instance, {criterion.__name__}()")
    if callable(criterion):
        return criterion
    if not isinstance(criterion, str) or criterion not in CRITERIA:
        raise ValueError(f"criterion {criterion!r} is unknown: give one of {', '.join(CRITERIA)}, or a callable")
    return CRITERIA[criterion]()


def fitted(criterion: str | Criterion, samples: int) -> Criterion:
    """As `resolve`; of one given by name, the default asks for no more samples than there are.

    >>> fitted("modularity", 300).samples
    300
    """
    made: Any = resolve(criterion)
    if not isinstance(criterion, str):
        return made
    if isinstance(made, Consensus):
        return replace(made, criteria=tuple(fitted(name, samples) for name in made.criteria))
    return replace(made, samples=min(made.samples, samples)) if hasattr(made, "samples") else made


def scores_by(criterion: Criterion, model: nn.Module, blocks: Blocks, loader: Iterable[Any]) -> BlockScores:
    """What the criterion gives; raises ValueError if that is no `BlockScores`, or leaves a block out."""
    scores: Any = criterion(model, blocks, loader)
    if not isinstance(scores, BlockScores):
        raise ValueError(f"{name_of(criterion)} gave a {type(scores).__name__}: a criterion returns BlockScores")
    if missing := [name for name in blocks.names if name not in scores.names]:
        raise ValueError(f"{name_of(criterion)} gave no score for block {missing[0]}")
    return scores


def name_of(criterion: Criterion) -> str:
    """Its name among `CRITERIA`, or that of the function or class.

    >>> name_of(L1Norm())
    'l1_norm'
    """
    names = {made: name for name, made in CRITERIA.items()}
    return names.get(type(criterion), getattr(criterion, "__name__", type(criterion).__name__))


def _spans(blocks: Blocks) -> dict[str, str]:
    return {block.name: block.end for block in blocks}


def _unlike(x: Tensor, y: Tensor, samples: int) -> float:
    if not len(x) == len(y) == samples:
        raise ValueError(
            f"CKA: a block of {samples} inputs has {len(x)} rows of features before it and {len(y)} after it, and one "
            "for each is needed; the criterion 'block_influence' needs none"
        )
    return 1 - linear_cka(x, y) if samples >= 4 else float("nan")


def _turned(x: Tensor, y: Tensor, _: int) -> float:
    return 1 - mean_cosine(x, y) if x.shape == y.shape else 1.0


def _at_points(
    model: nn.Module,
    blocks: Blocks,
    loader: Iterable[Any],
    samples: int,
    repeats: int,
    measure: Callable[[np.ndarray, np.ndarray], float],
) -> tuple[str, np.ndarray]:
    """The stem's name, and `measure(features (N, C), labels (N,))` at it and after every block: (repeats, points)."""
    drawn_samples = drawn(loader, samples, repeats)
    layers, values = points(model, blocks, take(drawn_samples[0][0][0], 0, 1)), []
    for sample in drawn_samples:
        labels = labels_of(sample).cpu()
        check_labels(labels, len(labels))
        features = pooled(model, layers, sample)
        values.append([measure(features[layer].numpy(), labels.numpy()) for layer in layers])
    return layers[0], np.array(values)


def _without_each(model: nn.Module, blocks: Blocks, measure: Callable[[], T]) -> Iterator[T]:
    """What is measured while each of the blocks is left out."""
    for block in blocks:
        with bypassed(model, block.name, block.kind, block.outputs):
            yield measure()


def _held_out(classifier: Any, features: np.ndarray, labels: np.ndarray) -> float:
    """Accuracy on the second half of a classifier of standardised features that was fitted on the first half."""
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    half = len(labels) // 2
    if len(set(labels[:half])) < 2:
        raise ValueError(f"the first {half} samples are all of one class, so nothing can be fitted: shuffle the loader")
    fitted = make_pipeline(StandardScaler(), classifier).fit(features[:half], labels[:half])
    return float(fitted.score(features[half:], labels[half:]))


def _weights(model: nn.Module, layers: Sequence[str]) -> list[nn.Parameter]:
    return [p for layer in layers for p in model.get_submodule(layer).parameters(recurse=False)]


def _filters(model: nn.Module, layers: Sequence[str]) -> list[Tensor]:
    """Weights with a filter in each row: what is called a weight and what else, as experts, is no scale and no bias."""
    found = []
    for layer in layers:
        _, made, weight = layer.partition(".parametrizations.")  # whose parameters have the name of what they make
        for name, p in model.get_submodule(layer).named_parameters(weight if made else "", recurse=False):
            if p.ndim > 1 and ("weight" in name or (p.numel() > max(p.shape) and "bias" not in name)):
                found.append(p.detach())
    return found


def _scales(model: nn.Module, layers: Sequence[str]) -> list[nn.Parameter]:
    """The scales of norms: weights of one dimension, but for the slopes of a PReLU."""
    norms = [module for module in map(model.get_submodule, layers) if not isinstance(module, nn.PReLU)]
    weights = [norm._parameters.get("weight") for norm in norms]  # one that is computed is no norm's, and may change
    return [weight for weight in weights if weight is not None and weight.ndim == 1]


def _once(blocks: Blocks, values: Sequence[Sequence[float]], what: str) -> BlockScores:
    """The mean of each block's values; ValueError if one has none."""
    for block, own in zip(blocks, values, strict=True):
        if not own:
            raise ValueError(f"block {block.name} has no {what}, so this criterion cannot score it: take another")
    return BlockScores(blocks.names, np.array([[np.mean(own) for own in values]]))
