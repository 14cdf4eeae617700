"""Drawing labelled samples from a loader, one process or many."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from modprune._inputs import (
    ONCE,
    batch_size,
    check_loader,
    first_sample,
    first_tensor,
    is_whole,
    join,
    split_batch,
    take,
)
from modprune._processes import everyones, place
from modprune._random import undisturbed

Sample = list[tuple[Any, Tensor]]
"""Pieces of batches, `(inputs, labels)` each, that together hold the asked number of samples."""


def draw_samples(loader: Iterable[Any], samples: int, repeats: int) -> Iterator[Sample]:
    """`repeats` times `samples` labelled samples: disjoint, in the loader's order, as long as the loader lasts.

    Where it holds fewer than samples x repeats, the rest are random subsets of all it holds, the same in every run.

    Of several processes each draws its share of them: from its own loader, or where all have the same one (its first
    sample tells), as if there were one process.

    Raises:
        ValueError: if the loader holds fewer than `samples`, or gives no labels; for less than one of either.
    """
    check_loader(loader)
    samples, repeats = counted(samples, repeats)
    rank, processes = place()
    if processes == 1:
        return _draw_here(loader, samples, repeats)
    if samples < processes:
        raise ValueError(f"samples={samples} for {processes} processes: at least one for each is needed")
    first = first_tensor(first_sample(loader))
    firsts = everyones(None if first is None else first.flatten().tolist())  # numpy has no bfloat16
    if any(other != firsts[0] for other in firsts):
        return _draw_here(loader, samples // processes + (rank < samples % processes), repeats)
    share = slice(rank * samples // processes, (rank + 1) * samples // processes)
    return (_part(sample, share) for sample in _draw_here(loader, samples, repeats))


def counted(samples: int, repeats: int) -> tuple[int, int]:
    """Both, as Python's own integers; raises ValueError unless they are whole numbers of at least 1."""
    for name, value in (("samples", samples), ("repeats", repeats)):
        if not is_whole(value) or value < 1:
            raise ValueError(f"{name}={value!r}: a whole number of at least 1 is needed")
    return int(samples), int(repeats)


def drawn(loader: Iterable[Any], samples: int, repeats: int) -> list[Sample]:
    """All that `draw_samples` gives, with the loader as it was."""
    with undisturbed(loader):
        return list(draw_samples(loader, samples, repeats))


def labels_of(sample: Sample) -> Tensor:
    """(N,): the labels of a sample, from all processes."""
    labels = torch.cat([labels for _, labels in sample])
    return torch.cat(everyones(labels.cpu())).to(labels.device)


def _part(sample: Sample, part: slice) -> Sample:
    pieces, start = [], 0
    for inputs, labels in sample:
        a, b = (min(max(bound - start, 0), len(labels)) for bound in (part.start, part.stop))
        if a < b:
            pieces.append((take(inputs, a, b), labels[a:b]))
        start += len(labels)
    return pieces


def _draw_here(loader: Iterable[Any], samples: int, repeats: int) -> Iterator[Sample]:
    drawn = 0
    for sample in _consecutive(loader, samples):
        yield sample
        drawn += 1
        if drawn == repeats:  # not one batch more than that is asked for
            return
    batches = list(map(_labelled, loader))
    pool = [(take(x, i, i + 1), y[i : i + 1]) for x, y in batches for i in range(len(y))]
    size = max((len(y) for _, y in batches), default=1)
    if len(pool) < samples:
        enough = f": ask for {len(pool)} at most" if pool else ONCE
        raise ValueError(f"the loader holds {len(pool)} samples, {samples} are asked for{enough}")
    for repeat in range(drawn, repeats):
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(repeat), device="cpu")
        chosen = [pool[i] for i in order[:samples].tolist()]
        yield [piece for start in range(0, samples, size) for piece in _joined(chosen[start : start + size])]


def _joined(pieces: Sample) -> Sample:
    """The pieces as one batch, or as they are where their sizes differ."""
    try:
        return [(join([inputs for inputs, _ in pieces]), torch.cat([labels for _, labels in pieces]))]
    except RuntimeError:
        return pieces


def _consecutive(loader: Iterable[Any], samples: int) -> Iterator[Sample]:
    sample: Sample = []
    missing = samples
    for inputs, labels in map(_labelled, loader):
        start = 0
        while start < len(labels):
            stop = min(len(labels), start + missing)
            sample.append((take(inputs, start, stop), labels[start:stop]))
            missing -= stop - start
            start = stop
            if missing == 0:
                yield sample
                sample, missing = [], samples


def _labelled(batch: Any) -> tuple[Any, Tensor]:
    inputs, labels = split_batch(batch)
    if labels is None:
        raise ValueError(
            "the loader gives no labels, and modularity measures how labels part: "
            "give (inputs, labels), or take the criterion 'block_influence' or 'cka', which need none"
        )
    if labels.shape != (batch_size(inputs),):
        raise ValueError(
            f"labels of shape {tuple(labels.shape)} for {batch_size(inputs)} inputs: one each is needed; the criteria "
            "'block_influence' and 'cka' need none"
        )
    return inputs, labels
