"""Six untargeted attacks on a classifier, after their papers: a small change of an image that makes the model err.

All take `(model, images, labels)` and give the changed images:

- `model`: from images to logits (B, classes), normalisation included. A module is computed in eval mode and left as
  found: mode, parameters, their `grad` and `requires_grad`, and torch's global RNG. Modules inside another callable
  stay in the mode its caller chose.
- `images`: (B, C, H, W), float32 or float64 in [0, 1]. Those whose label the model misses come back as they are.
- `labels`: (B,) int64, from 0 to classes - 1.
- What comes back has the shape, type and device of `images`, lies in [0, 1] and has no graph. Each docstring says
  which try comes back where the attack fails.

They raise ValueError for images, labels and settings that do not fit. Randomness comes from `generator` alone, a fresh
one with seed 0 where that is None.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from modprune._inputs import check_range
from modprune._state import evaluating
from modprune.graph import check_labels

Model = Callable[[Tensor], Tensor]

# Tries that the model sees at once: the black-box attacks have many for each image.
AT_ONCE = 1024
# 3072 features make 4.7 million pairs; the best has a high sum of both slopes, so pairs of the highest are enough.
SHORTLIST = 64
# atanh(1) is infinite; Carlini and Wagner's own code shrinks the images as much.
SHRINK = 0.999999


def fgsm(model: Model, images: Tensor, labels: Tensor, *, epsilon: float = 8 / 255) -> Tensor:
    """Images (B, C, H, W) in [0, 1] after one step along the sign of the loss's gradient, whether it succeeds or not.

    Args:
        model, images, labels: logits of (B, C, H, W) floats in [0, 1], and (B,) int64; see the module.
        epsilon: of the step, the change of each value; the images span 1.

    Source: Goodfellow et al., "Explaining and Harnessing Adversarial Examples" (ICLR 2015), section 4.
    """
    _check_positive(epsilon=epsilon)
    return _attack(model, images, labels, lambda x, y: _ascend(model, x, y, x, epsilon, epsilon, 1))


def pgd(
    model: Model, images: Tensor, labels: Tensor, *, epsilon: float = 8 / 255, step: float = 2 / 255, steps: int = 10,
    generator: Generator | None = None,
) -> Tensor:  # fmt: skip
    """Images (B, C, H, W) in [0, 1] after several such steps from a random start, whether they succeed or not.

    Args:
        model, images, labels: logits of (B, C, H, W) floats in [0, 1], and (B,) int64; see the module.
        epsilon: largest change of a value; each step is put back into this L-infinity ball.
        step, steps: change of a value in a step, and how many.
        generator: of the start, uniform in the ball.

    Source: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks" (ICLR 2018), section 2.1.
    """
    _check_positive(epsilon=epsilon, step=step, steps=steps)

    def change(x: Tensor, y: Tensor) -> Tensor:
        start = x + epsilon * (2 * _uniform(x.shape, x, _or_seed_0(generator)) - 1)
        return _ascend(model, x, y, start.clamp(0, 1), epsilon, step, steps)

    return _attack(model, images, labels, change)


def cw(
    model: Model, images: Tensor, labels: Tensor, *, constant: float = 1.0, confidence: float = 0.0, steps: int = 50,
    lr: float = 0.01,
) -> Tensor:  # fmt: skip
    """The nearest misclassified images (B, C, H, W) in [0, 1] by the L2 norm: Adam in tanh space.

    It lessens the squared norm plus `constant` times the margin. Where no step succeeds, the last one comes back.
    Values at 0 or 1 hardly move in tanh space: images with many of them need more `steps` or a greater `lr`.

    Args:
        model, images, labels: logits of (B, C, H, W) floats in [0, 1], and (B,) int64; see the module.
        constant: of all images; the paper's search for each image's own is left out.
        confidence: by how much another logit must exceed the label's, at least 0.
        steps, lr: of Adam.

    Source: Carlini and Wagner, "Towards Evaluating the Robustness of Neural Networks" (IEEE S&P 2017), section VI-A.
    """
    _check_positive(constant=constant, steps=steps, lr=lr)
    if not confidence >= 0:
        raise ValueError(f"confidence={confidence}: a number of at least 0 is needed")

    def change(x: Tensor, y: Tensor) -> Tensor:
        w = torch.atanh((2 * x - 1) * SHRINK).requires_grad_()
        optimizer = torch.optim.Adam([w], lr=lr)
        best, nearest = x, x.new_full((len(x), 1, 1, 1), math.inf)
        for _ in range(steps):
            tries = (torch.tanh(w) + 1) / 2
            distance = (tries - x).square().sum((1, 2, 3), keepdim=True)
            margin = _margin(model(tries), y).view_as(distance)
            loss = distance + constant * (margin + confidence).clamp_min(0)
            w.grad = torch.autograd.grad(loss.sum(), w)[0]
            closer = (margin < -confidence) & (distance < nearest)
            best, nearest = torch.where(closer, tries, best).detach(), torch.where(closer, distance, nearest).detach()
            optimizer.step()
        return torch.where(nearest < math.inf, best, tries)

    return _attack(model, images, labels, change)


def jsma(model: Model, images: Tensor, labels: Tensor, *, theta: float = 1.0, gamma: float = 0.1) -> Tensor:
    """Images (B, C, H, W) in [0, 1] at their first misclassification, few values changed: the most salient pairs.

    A pair is salient if it raises the logit of the class that was second on the clean image and lowers the sum of the
    others. Where the attack fails, all changes come back that were made until `gamma` was spent or no pair was left.

    Args:
        model, images, labels: logits of (B, C, H, W) floats in [0, 1], and (B,) int64; see the module.
        theta: change of a value in a step, in [-1, 1] and not 0, cut where it leaves [0, 1].
        gamma: largest share of the C * H * W values changed, in (0, 1].

    Source: Papernot et al., "The Limitations of Deep Learning in Adversarial Settings" (IEEE EuroS&P 2016), section IV.
    """
    if not 0 < abs(theta) <= 1:
        raise ValueError(f"theta={theta}: a number in [-1, 1] other than 0 is needed")
    if not 0 < gamma <= 1:
        raise ValueError(f"gamma={gamma}: a share of the values, above 0 and at most 1, is needed")

    def change(x: Tensor, y: Tensor) -> Tensor:
        result, todo = x.flatten(1).clone(), torch.arange(len(x), device=x.device)
        target = model(x).scatter(1, y[:, None], -math.inf).argmax(1, keepdim=True)
        for _ in range(int(gamma * result.shape[1] / 2)):
            tries = result[todo].view(-1, *x.shape[1:]).requires_grad_()
            logits = model(tries)
            of_target = torch.autograd.grad(logits.gather(1, target[todo]).sum(), tries, retain_graph=True)[0]
            of_others = torch.autograd.grad(logits.sum(), tries)[0] - of_target
            rise, fall = (math.copysign(1, theta) * slope.flatten(1) for slope in (of_target, -of_others))
            pairs, salience = _most_salient(rise, fall, result[todo] < 1 if theta > 0 else result[todo] > 0)
            going = (logits.argmax(1) == y[todo]) & (salience > 0)
            todo, pairs = todo[going], pairs[going]
            if not len(todo):
                break
            result[todo[:, None], pairs] = (result[todo[:, None], pairs] + theta).clamp(0, 1)
        return result.view_as(x)

    return _attack(model, images, labels, change)


def one_pixel(
    model: Model, images: Tensor, labels: Tensor, *, population: int = 40, generations: int = 20,
    generator: Generator | None = None,
) -> Tensor:  # fmt: skip
    """Images (B, C, H, W) in [0, 1] with one pixel changed, the fittest of an evolution, whether it succeeds or not.

    Fitness is the margin of the label's logit; the paper's probability is 1 to the last bit on sure images.

    Args:
        model, images, labels: logits of (B, C, H, W) floats in [0, 1], and (B,) int64; see the module.
        population: pixels tried for each image in a generation, at least 3; the paper has 400.
        generations: at most, less if all images are misclassified before; the paper has 100.
        generator: of the first pixels (row, column and colour) and of their children's parents.

    Source: Su et al., "One Pixel Attack for Fooling Deep Neural Networks" (IEEE TEVC 2019), section III.
    """
    _check_positive(generations=generations)
    if population < 3:
        raise ValueError(f"population={population}: at least 3 are needed, the parents of a child")

    def change(x: Tensor, y: Tensor) -> Tensor:
        random, size, each = _or_seed_0(generator), (len(x), population), torch.arange(len(x), device=x.device)
        colours = torch.randn(*size, x.shape[1], generator=random, device=random.device).to(x) / 2 + 0.5
        genes = torch.cat([_uniform((*size, 2), x, random), colours.clamp(0, 1)], 2)
        fitness = _margins(model, _with_pixel(x, genes), y)
        for _ in range(generations):
            if bool((fitness.amin(1) < 0).all()):
                break
            parents = _uniform((*size, population), x, random).topk(3).indices  # all different
            one, two, three = genes[each[:, None, None], parents].unbind(2)
            children = (one + (two - three) / 2).clamp(0, 1)
            theirs = _margins(model, _with_pixel(x, children), y)
            genes = torch.where((theirs < fitness)[:, :, None], children, genes)
            fitness = torch.minimum(fitness, theirs)
        return _with_pixel(x, genes[each, fitness.argmin(1)][:, None])[:, 0]

    return _attack(model, images, labels, change)


def local_search(
    model: Model, images: Tensor, labels: Tensor, *, rounds: int = 30, candidates: int = 64, pixels: int = 5,
    radius: int = 5, generator: Generator | None = None,
) -> Tensor:  # fmt: skip
    """Images (B, C, H, W) in [0, 1] after greedy rounds, each on the pixels around those that the last one changed.

    A pixel is tried and changed alike: every channel to the farther end of [0, 1], and only once. (The paper tries
    values outside the range and wraps the changed ones around it.) Where the attack fails, what comes back is the
    image after the last round, or after the first that left no unchanged pixel around its own.

    Args:
        model, images, labels: logits of (B, C, H, W) floats in [0, 1], and (B,) int64; see the module.
        rounds: at most; they end at the first misclassification.
        candidates: pixels tried in a round, drawn at random from those around.
        pixels: changed in a round, those that alone lower the margin most; `rounds * pixels` in all at most.
        radius: pixels up to so many rows and columns away are around; in the first round, all are.
        generator: of the draws.

    Source: Narodytska and Kasiviswanathan, "Simple Black-Box Adversarial Attacks on Deep Neural Networks" (CVPR
    Workshops 2017), algorithm LocSearchAdv.
    """
    _check_positive(rounds=rounds, candidates=candidates, pixels=pixels, radius=radius)

    def change(x: Tensor, y: Tensor) -> Tensor:
        random, shape, result = _or_seed_0(generator), x.shape[2:], x.flatten(2).clone()
        todo, places = (torch.arange(n, device=x.device) for n in (len(x), result.shape[2]))
        near = torch.ones_like(result[:, 0], dtype=torch.bool)
        changed = torch.zeros_like(near)
        for _ in range(rounds):
            now, flipped = result[todo], (result[todo] < 0.5).to(result)
            lots = _uniform(now[:, 0].shape, x, random).masked_fill(~near[todo], -1)
            lot, drawn = lots.topk(min(candidates, len(places)))
            tries = torch.where(drawn[:, :, None, None] == places, flipped[:, None], now[:, None])
            margins = _margins(model, tries.unflatten(3, shape), y[todo]).masked_fill(lot < 0, math.inf)
            least, best = margins.topk(min(pixels, drawn.shape[1]), largest=False)
            mark = torch.zeros_like(near[todo]).scatter(1, drawn.gather(1, best), least < math.inf)
            result[todo], changed[todo] = torch.where(mark[:, None], flipped, now), changed[todo] | mark
            around = F.max_pool2d(mark.to(x).view(-1, 1, *shape), 2 * radius + 1, 1, radius).flatten(1) > 0
            near[todo] = around & ~changed[todo]
            margin = _margins(model, result[todo].view(-1, 1, *x.shape[1:]), y[todo])[:, 0]
            todo = todo[(margin >= 0) & near[todo].any(1)]
            if not len(todo):
                break
        return result.view_as(x)

    return _attack(model, images, labels, change)


def _attack(model: Model, images: Tensor, labels: Tensor, change: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """`images` with those that the model gets right put through `change`; what all attacks promise is kept here."""
    _check_images(images)
    check_labels(labels, len(images))
    frame = evaluating(model) if isinstance(model, nn.Module) else nullcontext()
    # Under inference_mode, enable_grad alone records nothing.
    with torch.inference_mode(False), torch.enable_grad(), frame:
        result, labels = images.detach().clone(), labels.to(images.device, torch.int64)
        with torch.no_grad():
            logits = model(result)
        check_range(labels, logits.shape[1])
        right = logits.argmax(1) == labels
        if right.any():
            result[right] = change(result[right], labels[right]).detach()
        return result


def _ascend(model: Model, x: Tensor, y: Tensor, tries: Tensor, epsilon: float, step: float, steps: int) -> Tensor:
    """`tries` after signed steps up the cross-entropy, each put back to within `epsilon` of `x` and [0, 1]."""
    for _ in range(steps):
        tries = tries.detach().requires_grad_()
        # The sum, not the mean: an image's slope is the same in every batch.
        loss = F.cross_entropy(model(tries), y, reduction="sum")
        moved = tries.detach() + step * torch.autograd.grad(loss, tries)[0].sign()
        tries = (x + (moved - x).clamp(-epsilon, epsilon)).clamp(0, 1)
    return tries


def _most_salient(rise: Tensor, fall: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs (B, 2) of free features with the greatest product of both sums, and that (B,): 0 if no pair has both > 0.

    Args:
        rise, fall: (B, features), what each adds to the target's logit and takes from the others'.
        free: (B, features) bool.
    """
    hopes = (rise + fall).masked_fill(~free, -math.inf)
    top = hopes.topk(min(SHORTLIST, hopes.shape[1]), 1).indices
    rise, fall, free = (v.gather(1, top)[:, :, None] for v in (rise, fall, free))
    rise, fall, free = rise + rise.mT, fall + fall.mT, free & free.mT
    product = torch.where(free & (rise > 0) & (fall > 0), rise * fall, 0)
    product.diagonal(dim1=1, dim2=2).zero_()
    salience, where = product.flatten(1).max(1)
    return top.gather(1, torch.stack((where // top.shape[1], where % top.shape[1]), 1)), salience


def _with_pixel(x: Tensor, genes: Tensor) -> Tensor:
    """(B, P, C, H, W): each image as each of its genes (B, P, 2 + C) has it: a row, a column, a colour, in [0, 1]."""
    edge = genes.new_tensor(x.shape[2:])
    row, column = torch.minimum(genes[:, :, :2] * edge, edge - 1).long().unbind(2)
    tries = x[:, None].repeat(1, genes.shape[1], 1, 1, 1)
    each, every = (torch.arange(n, device=x.device) for n in genes.shape[:2])
    tries[each[:, None], every, :, row, column] = genes[:, :, 2:]
    return tries


def _margin(logits: Tensor, y: Tensor) -> Tensor:
    """(B,): the label's logit less the greatest other; below 0 the model errs."""
    own = y[:, None]
    return logits.gather(1, own).squeeze(1) - logits.scatter(1, own, -math.inf).amax(1)


@torch.no_grad()
def _margins(model: Model, tries: Tensor, y: Tensor) -> Tensor:
    """(B, P): the margins of several tries (B, P, C, H, W) for each label."""
    logits = torch.cat([model(part) for part in tries.flatten(0, 1).split(AT_ONCE)])
    return _margin(logits, y.repeat_interleave(tries.shape[1])).view(tries.shape[:2])


def _or_seed_0(generator: Generator | None) -> Generator:
    return Generator().manual_seed(0) if generator is None else generator


def _uniform(shape: tuple[int, ...], like: Tensor, random: Generator) -> Tensor:
    """Numbers in [0, 1), drawn where the generator is: the one with seed 0 gives the same on every device."""
    return torch.rand(shape, generator=random, device=random.device, dtype=like.dtype).to(like.device)


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or images.dtype not in (torch.float32, torch.float64):
        found = f"images of shape {tuple(images.shape)} and type {images.dtype}"
        raise ValueError(f"{found}: (B, C, H, W) of float32 or float64 is needed")
    if not bool(((images >= 0) & (images <= 1)).all()):
        found = f"images from {images.min():.4g} to {images.max():.4g}"
        raise ValueError(f"{found}: values in [0, 1] are needed, and a model that normalises them itself")


def _check_positive(**settings: float) -> None:
    for name, value in settings.items():
        if not value > 0:
            raise ValueError(f"{name}={value}: a number above 0 is needed")


ATTACKS: dict[str, Callable[..., Tensor]] = {
    "fgsm": fgsm, "pgd": pgd, "cw": cw, "jsma": jsma, "one_pixel": one_pixel, "local_search": local_search
}  # fmt: skip
