"""Learning from a teacher: the loss, and a teacher that remembers what it has said.

Hinton et al., "Distilling the Knowledge in a Neural Network" (2015).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modprune._inputs import call, check_range, device_of, first_tensor, opened, split_batch
from modprune._state import evaluating, modes_kept

OFF = 0.02  # from 1: what rounding to bfloat16 makes of the sum of a few probabilities
Teacher = Callable[[Any], Tensor]
"""From a batch to logits (B, classes)."""


def distillation_loss(logits: Tensor, labels: Tensor | None, soft: Tensor | None, weight: float, t: float) -> Tensor:
    """`(1 - weight) * CE + weight * t^2 * KL(teacher || student)` at temperature `t` (Hinton et al. 2015, section 2).

    The teacher's term is a mean over all images or pixels, the labels' over those that have one.

    Args:
        logits: (B, classes) or (B, classes, ...) of the student.
        labels: (B,) or (B, ...) int64; may be None where `weight` is 1.
        soft: logits of the teacher, of the shape of the student's, or None for plain cross-entropy.
        weight: of the teacher's term.
        t: temperature of both.
    """
    if soft is None or weight == 0:
        return _cross_entropy(logits, labels)
    if soft.shape != logits.shape:
        raise ValueError(
            f"the teacher gives logits of shape {tuple(soft.shape)} and the model {tuple(logits.shape)}: "
            "both have to know the same classes"
        )
    target, log_student = F.log_softmax(soft.float() / t, 1), F.log_softmax(logits / t, 1)
    kl = F.kl_div(log_student, target, reduction="sum", log_target=True) / (logits.numel() // logits.shape[1]) * t * t
    return kl if weight == 1 else weight * kl + (1 - weight) * _cross_entropy(logits, labels)


class CachedTeacher:
    """A teacher that looks at each training image a few times, then answers the mean of what it has said about it.

    Without an accelerator a large teacher costs as much as its student learns. Crops and flips change its soft
    labels less than the image does, so after `looks` of them it need not look again, while the student goes on to
    see new ones.

    Args:
        model: the teacher; left as found.
        images: number of training images.
        looks: at each image, under the augmentation of the moment.
    """

    def __init__(self, model: nn.Module, images: int, looks: int = 8) -> None:
        if looks < 1:
            raise ValueError(f"looks={looks}: at least 1 is needed")
        self.model, self.looks = model, looks
        self._seen = torch.zeros(images, dtype=torch.int64, device=device_of(model))
        self._total: Tensor | None = None

    def __call__(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """The mean logits (B, classes), float32, for a batch `(images, labels, index)` of an `ImageLoader`."""
        if not isinstance(batch, (tuple, list)) or len(batch) != 3:
            raise ValueError("a CachedTeacher needs batches (images, labels, index), as ImageLoader gives them")
        images, _, index = batch
        if (index >= len(self._seen)).any():  # on CUDA nobody could go on after the error of an index
            raise ValueError(
                f"a CachedTeacher for {len(self._seen)} images and a batch with number {index.max()}: give the number "
                "of training images"
            )
        new = self._seen[index] < self.looks
        if new.any():
            with torch.no_grad(), evaluating(self.model):
                logits = logits_of(self.model(images[new])).float()
            if logits.ndim != 2:  # of pixels, which every crop and flip puts elsewhere, a mean says nothing
                raise ValueError(
                    f"a CachedTeacher remembers logits (B, classes) of whole images, and its model gives shape "
                    f"{tuple(logits.shape)}: give the module itself as teacher"
                )
            if self._total is None:
                self._total = logits.new_zeros(len(self._seen), logits.shape[1])
            self._total[index[new]] += logits
            self._seen[index[new]] += 1
        assert self._total is not None
        return self._total[index] / self._seen[index, None]

    def state_dict(self) -> dict[str, Tensor | None]:
        """What the teacher has said so far, for a checkpoint: a resumed run need not ask again."""
        return {"seen": self._seen.cpu(), "total": None if self._total is None else self._total.cpu()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Put back what `state_dict` gave."""
        device = self._seen.device
        self._seen = state["seen"].to(device)
        self._total = None if state["total"] is None else state["total"].to(device)


def logits_of(output: Any) -> Tensor:
    """The first tensor of a model's output, taken as its logits."""
    logits = first_tensor(opened(output))
    if logits is None:
        raise ValueError(f"the model returned {type(output).__name__}, which holds no tensor to take as logits")
    return logits


def check_logits(logits: Tensor) -> None:
    """ValueError unless they are of samples and at least two classes: a softmax over less learns nothing."""
    if logits.ndim < 2 or logits.shape[1] < 2:
        raise ValueError(
            f"the model gives logits of shape {tuple(logits.shape)}: (B, classes), at least two, are needed; what "
            "learns by another loss is trained in a loop of your own"
        )


def check_probabilities(labels: Tensor) -> None:
    """ValueError unless labels (B, classes, ...) sum to one; a device has to be waited for."""
    sums = labels.float().sum(1).flatten()
    if wrong := sums[(sums - 1).abs() > OFF].tolist():
        raise ValueError(
            f"the labels of a sample sum to {wrong[0]:.3g}, not to 1, as probabilities of classes do: what has several "
            "classes at a time, or none, is trained in a loop of your own"
        )


def _cross_entropy(logits: Tensor, labels: Tensor | None) -> Tensor:
    if labels is None:
        raise ValueError(
            "the batches hold no labels: give (inputs, labels) or dicts with 'labels', or a teacher and distill=1"
        )
    one_each = logits.shape[:1] + logits.shape[2:]
    if labels.shape != (logits.shape if labels.is_floating_point() else one_each):
        raise ValueError(
            f"labels are {tuple(one_each)} integers or {tuple(logits.shape)} probabilities; given {labels.dtype} of "
            f"shape {tuple(labels.shape)}: check the loader"
        )
    labels = labels if labels.is_floating_point() else labels.long()
    try:
        return F.cross_entropy(logits, labels)
    except IndexError:
        check_range(labels, logits.shape[1])  # looked at before, an accelerator would have to be waited for
        raise


@contextmanager
def teaching(teacher: nn.Module | Teacher | None) -> Iterator[Teacher | None]:
    """The teacher as a callable from a batch to logits, without gradients; a module is in eval mode meanwhile."""
    if not isinstance(teacher, nn.Module):
        if not (teacher is None or callable(teacher)):
            raise ValueError(f"teacher={teacher!r}: a module, or a callable from a batch to logits, is needed")
        yield teacher and _answering(teacher)
        return

    @torch.no_grad()
    def teach(batch: Any) -> Tensor:
        return logits_of(call(teacher, split_batch(batch)[0]))

    with modes_kept(teacher):  # the random numbers of the training between its answers are not its own
        teacher.eval()
        yield teach


def _answering(teacher: Teacher) -> Teacher:
    @torch.no_grad()
    def teach(batch: Any) -> Tensor:
        soft = teacher(batch)
        if not isinstance(soft, Tensor):
            raise ValueError(f"the teacher returned {type(soft).__name__} for a batch: logits (B, classes) are needed")
        return soft

    return teach
