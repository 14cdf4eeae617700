"""Loss and accuracy of a classifier over a loader."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modprune._inputs import (
    ONCE,
    call,
    check_loader,
    check_range,
    device_of,
    first_tensor,
    laid_out,
    opened,
    split_batch,
    to_device,
)
from modprune._state import evaluating


@dataclass(frozen=True)
class Evaluation:
    """Mean cross-entropy, Top-1 and Top-5 in percent, and how many of how many samples were right."""

    loss: float
    top1: float
    top5: float
    correct: int
    samples: int


def evaluate(model: nn.Module, loader: Iterable[Any]) -> Evaluation:
    """Evaluate a classifier in eval mode, without gradients, on its own device.

    Its modes and all random numbers are put back; what its passes write into it themselves (records, counters) stays.

    On the CPU images are forwarded channels last, which is faster, where the model takes them so.

    Args:
        model: returns logits (B, classes), or an output whose first tensor they are.
        loader: `(inputs, labels, ...)` batches or dicts with `labels`; labels are (B,) integers.

    Raises:
        ValueError: for an empty loader, missing labels or labels beyond the number of classes.
        RuntimeError: for logits that are NaN or infinite; -inf, as models mask with, passes for every class but the
            label.
    """
    check_loader(loader)
    samples = 0
    totals = torch.zeros(3, dtype=torch.float64, device="cpu")
    layout = torch.channels_last if device_of(model).type == "cpu" else torch.preserve_format
    with torch.no_grad(), evaluating(model):
        for batch in loader:
            try:
                logits, labels = logits_and_labels(model, batch, layout)
            except RuntimeError:  # `view` asks for channels first; whatever else it is comes again
                layout = torch.preserve_format
                logits, labels = logits_and_labels(model, batch)
            if len(labels) == 0:
                continue
            loss = F.cross_entropy(logits, labels, reduction="sum")
            if not loss.isfinite():
                raise RuntimeError(f"the model gives NaN or inf in the batch after sample {samples}: check its weights")
            first = logits.argmax(1) == labels  # of equal logits the same as everywhere, which topk does not say
            among = (logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]).any(1)
            totals += torch.stack([loss, first.sum(), (first | among).sum()]).cpu()
            samples += len(labels)
    if samples == 0:
        raise ValueError(f"the loader gave no batch to evaluate on{ONCE}")
    loss, top1, top5 = totals.tolist()
    return Evaluation(loss / samples, 100 * top1 / samples, 100 * top5 / samples, int(top1), samples)


def logits_and_labels(
    model: nn.Module, batch: Any, layout: torch.memory_format = torch.preserve_format
) -> tuple[Tensor, Tensor]:
    """What a classifier gives for a batch, (B, classes) float32, and the labels of it, (B,) int64, on its device.

    Images go in with this memory layout.

    Raises:
        ValueError: for an output that is none of a classifier, missing labels or labels beyond the number of classes.
    """
    inputs, labels = split_batch(to_device(batch, device_of(model)))
    logits = first_tensor(opened(call(model, laid_out(inputs, layout))))
    if logits is None or logits.ndim != 2 or labels is None:
        raise ValueError("Top-1 and loss need logits of shape (B, classes) and labels: check the model and the loader")
    labels = labels.to(logits.device)
    if labels.shape != logits.shape[:1] or labels.is_floating_point() or labels.is_complex():
        raise ValueError(
            f"labels are {logits.shape[0]} integers, one for each row of logits; "
            f"given {labels.dtype} of shape {tuple(labels.shape)}: check the loader"
        )
    labels = labels.long()  # few operations take the unsigned ones
    check_range(labels, logits.shape[1])
    return logits.float(), labels
