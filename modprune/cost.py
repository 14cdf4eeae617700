"""What a network costs: parameters, multiply-accumulates (MACs) by three counters, and time.

"FLOPs" in the pruning literature are MACs. The primary counter counts convolutions, linear layers and attention
products; fvcore adds batch norm at 2 per element (the convention of Lu et al.) and thop at 4.
"""

from __future__ import annotations

import copy
import logging
import statistics
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from modprune._inputs import batch_size, call, device_of, evaluating, to_device


def count_params(model: nn.Module) -> int:
    """Number of parameters, shared ones once.

    >>> count_params(nn.Linear(3, 2))
    8
    """
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, example_inputs: Any) -> int:
    """MACs of one sample's forward pass, by the primary counter.

    >>> count_macs(nn.Linear(3, 2), torch.zeros(1, 3))
    6
    """
    return macs_by_module(model, example_inputs)[""]


def macs_by_module(model: nn.Module, example_inputs: Any) -> dict[str, int]:
    """MACs per sample of every module, those inside it included, by qualified name; "" is the whole model.

    A module that calls itself by several names has its MACs under the first; one never called has 0.
    """
    inputs = to_device(example_inputs, device_of(model))
    counter = FlopCounterMode(display=False)
    with evaluating(model), _plain_attention(), torch.no_grad(), counter:
        call(model, inputs)
    samples, root = batch_size(inputs), type(model).__name__
    flops = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    names = {name: f"{root}.{name}" if name else root for name, _ in model.named_modules()}
    macs = {name: flops.get(full, 0) // (2 * samples) for name, full in names.items()}
    return macs | {"": counter.get_total_flops() // (2 * samples)}


def macs_by_counter(model: nn.Module, example_inputs: Any) -> dict[str, int]:
    """MACs per sample by the primary counter, fvcore and thop: `{"modprune": ..., "fvcore": ..., "thop": ...}`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # both import what their own dependencies have deprecated
        import thop
        from fvcore.nn import FlopCountAnalysis

    model = copy.deepcopy(model).eval()  # thop leaves buffers behind and unfreezes batch norms
    inputs = to_device(example_inputs, device_of(model))
    arguments = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    samples = batch_size(inputs)
    counts = {"modprune": count_macs(model, inputs)}
    if isinstance(inputs, dict):  # neither of the two takes keyword arguments
        return counts
    with warnings.catch_warnings(), torch.no_grad(), _quiet("fvcore"):
        warnings.simplefilter("ignore")
        analysis = FlopCountAnalysis(model, arguments).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        counts["fvcore"] = int(analysis.total()) // samples
        counts["thop"] = int(thop.profile(model, arguments, verbose=False)[0]) // samples
    return counts


def latency(
    models: Mapping[str, nn.Module], example_inputs: Any, *, batch: int = 1, seconds: float = 1.0
) -> dict[str, float]:
    """Median seconds of a forward pass of each model at a batch size, measured in turns so that noise hits all alike.

    Args:
        models: by name; each on its own device.
        example_inputs: a tensor of any batch size, or a tuple or dict of them; the first sample is repeated.
        batch: samples at a time.
        seconds: about how long to measure in all.
    """
    inputs = {name: _repeat(to_device(example_inputs, device_of(model)), batch) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    modes = {module: module.training for model in models.values() for module in model.modules()}
    try:
        with torch.inference_mode():
            for model in models.values():
                model.eval()
            started = time.perf_counter()
            while time.perf_counter() - started < seconds or len(next(iter(times.values()))) < 4:
                for name, model in models.items():
                    times[name].append(_seconds(model, inputs[name]))
    finally:
        for module, mode in modes.items():
            module.training = mode
    return {name: statistics.median(values[1:]) for name, values in times.items()}  # the first ones warm up


def _seconds(model: nn.Module, inputs: Any) -> float:
    cuda = device_of(model).type == "cuda"
    if cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    call(model, inputs)
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _repeat(value: Any, batch: int) -> Any:
    if isinstance(value, torch.Tensor):
        return value[:1].expand(batch, *value.shape[1:]).contiguous() if value.ndim else value
    if isinstance(value, dict):
        return {key: _repeat(item, batch) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_repeat(item, batch) for item in value)
    return value


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Attention as visible matrix products: the fused paths report no FLOPs."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


@contextmanager
def _quiet(logger: str) -> Iterator[None]:
    log = logging.getLogger(logger)
    level, log.level = log.level, logging.ERROR
    try:
        yield
    finally:
        log.level = level
