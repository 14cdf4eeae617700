"""What a network costs: parameters, multiply-accumulates (MACs) by three counters, and time.

"FLOPs" in the pruning literature are MACs. The primary counter counts convolutions, linear layers and attention
products; fvcore adds batch norm at 2 per element (the convention of Lu et al.) and thop at 4.
"""

from __future__ import annotations

import inspect
import logging
import statistics
import time
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from modprune._inputs import batch_size, call, device_of, join, take, to_device
from modprune._state import copied, evaluating, plain_attention, state_kept


def count_params(model: nn.Module) -> int:
    """Number of parameters, shared ones once.

    >>> count_params(nn.Linear(3, 2))
    8
    """
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, example_inputs: Any) -> int:
    """MACs of one sample's forward pass: of convolutions, linear layers and the products of attention.

    >>> count_macs(nn.Linear(3, 2), torch.zeros(1, 3))
    6
    """
    return macs_by_module(model, example_inputs)[""]


@torch.inference_mode(False)
def macs_by_module(model: nn.Module, example_inputs: Any) -> dict[str, int]:
    """MACs per sample of every module, those inside it included, by qualified name; "" is the whole model.

    A module that calls itself by several names has its MACs under the first; one never called has 0.
    """
    inputs = to_device(example_inputs, device_of(model))
    with torch.no_grad(), evaluating(model), state_kept(model), counted_macs(model, inputs) as macs:
        call(model, inputs)
    return macs


@contextmanager
def counted_macs(model: nn.Module, inputs: Any) -> Iterator[dict[str, int]]:
    """`macs_by_module` of the one forward pass that is made inside; filled when the context ends."""
    samples = batch_size(inputs)
    if samples == 0:
        raise ValueError("the example inputs hold no sample: give at least one")
    names = {module: name for name, module in model.named_modules()}
    macs = dict.fromkeys(names.values(), 0)

    def change(module: nn.Module, sign: int) -> None:
        if module in names:
            macs[names[module]] += sign * counter.total

    # Hooks for all modules at once: to register one on each of hundreds takes longer than to call it.
    before = register_module_forward_pre_hook(lambda module, _: change(module, -1))
    after = register_module_forward_hook(lambda module, *_: change(module, 1))
    with before, after, counted_flops() as counter:
        yield macs
    for name in macs:
        macs[name] //= 2 * samples


@contextmanager
def counted_flops() -> Iterator[Flops]:
    """The floating-point operations of what runs inside: `total` of what it yields, so far."""
    with _visible_attention(), Flops() as counter:
        yield counter


class Flops(TorchDispatchMode):
    """Floating-point operations so far, by torch's own formulas.

    `FlopCounterMode` has the same but tracks modules in a way that fails where a parameter is handed from one to
    another with gradients on.
    """

    supports_higher_order_operators = True
    total = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Else torch wraps each call lest a compiler look into it, which takes as long as the call.
        return False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = getattr(function, "_overloadpacket", None)
        formula = flop_registry.get(packet)
        whole = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()  # layers are, in that mode
        if whole and formula is None and isinstance(function, torch._ops.OpOverload):
            with self:
                out = function.decompose(*args, **(kwargs or {}))
            if out is not NotImplemented:
                return out
        out = function(*args, **(kwargs or {}))
        if formula is not None:
            self.total += _flops(formula, args, kwargs or {}, out)
        elif packet in _RECURRENT:
            self.total += _recurrent_flops(*args)
        elif packet is not None and packet is _GROUPED:
            self.total += _grouped_flops(*args)
        return out


# Whole recurrent layers in one operation, of which torch has no formula.
_RECURRENT = (torch.ops.aten.mkldnn_rnn_layer, torch.ops.aten._cudnn_rnn)


def _recurrent_flops(x: torch.Tensor, *rest: Any) -> int:
    """Of the products with the weights; `rest` begins with a list of all, or with the two of the one layer."""
    weights = rest[0] if isinstance(rest[0], (list, tuple)) else rest[:2]
    return 2 * (x.numel() // x.shape[-1]) * sum(weight.numel() for weight in weights if weight.ndim == 2)


# The experts of a mixture, each for its rows: torch has no formula of it, and before 2.8 no such operation.
_GROUPED = getattr(torch.ops.aten, "_grouped_mm", None)


def _grouped_flops(a: torch.Tensor, b: torch.Tensor, *_: Any) -> int:
    """Of products whose groups lie in a dimension of their own (of both, or of `b`), or are parts of another."""
    rows = a.numel() if a.ndim == 2 or b.ndim == 3 else a[0].numel()
    return 2 * rows * b.shape[-1]


def _flops(formula: Any, args: Any, kwargs: dict[str, Any], out: Any) -> int:
    """A formula's result. Most take shapes, in a wrapper that maps trees of arguments and takes longer than they do."""
    of_shapes = inspect.unwrap(formula)
    if of_shapes is formula:
        return int(formula(*args, **kwargs, out_val=out))
    shapes = [arg.shape if isinstance(arg, torch.Tensor) else arg for arg in args]
    return int(of_shapes(*shapes, **kwargs, out_shape=out.shape if isinstance(out, torch.Tensor) else None))


def mac_differences(model: nn.Module, counts: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, int]]:
    """What explains each cross-check's difference to the primary counter: MACs per sample by the type of module.

    Only what a module does itself is counted to it, not what those inside it do; types that agree are left out.

    Args:
        model: the one that was counted.
        counts: of it, from `macs_by_counter`.
    """
    by_type = {counter: _by_type(model, macs) for counter, macs in counts.items()}
    primary = by_type.pop("modprune")
    return {
        counter: {t: macs.get(t, 0) - n for t, n in primary.items() if macs.get(t, 0) != n}
        for counter, macs in by_type.items()
    }


def macs_by_counter(model: nn.Module, example_inputs: Any) -> dict[str, dict[str, int]]:
    """`macs_by_module` by the primary counter, "modprune", and by "fvcore" and "thop".

    These two are cross-checks: one that cannot run on the network or its inputs, or finds nothing, is left out.
    """
    counts = {"modprune": macs_by_module(model, example_inputs)}
    if isinstance(example_inputs, dict):  # neither of the two takes keyword arguments
        return counts
    inputs = to_device(example_inputs, device_of(model))
    arguments = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    for counter, count in (("fvcore", _fvcore), ("thop", _thop)):
        try:
            # thop leaves buffers behind and unfreezes batch norms: only ever a copy
            with (
                warnings.catch_warnings(),
                torch.no_grad(),
                evaluating(copied(model)) as trial,
                _visible_attention(),
            ):
                warnings.simplefilter("ignore")  # both import and call what their own dependencies have deprecated
                macs = count(trial, arguments)
        except Exception:  # copies, tracing and hooks fail in many ways, and a cross-check must not cost the report
            continue
        if macs.get(""):
            counts[counter] = {name: int(n) // batch_size(inputs) for name, n in macs.items()}
    return counts


def _fvcore(model: nn.Module, arguments: tuple[Any, ...]) -> dict[str, float]:
    from fvcore.nn import FlopCountAnalysis

    with _quiet("fvcore"):
        analysis = FlopCountAnalysis(model, arguments).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        return dict(analysis.by_module())


def _thop(model: nn.Module, arguments: tuple[Any, ...]) -> dict[str, float]:
    import thop

    total, _, layers = thop.profile(model, arguments, verbose=False, ret_layer_info=True)
    macs = {"": total}
    stack = [("", layers)]
    while stack:
        prefix, inside = stack.pop()
        for name, (count, _, deeper) in inside.items():
            macs[prefix + name] = count
            stack.append((f"{prefix}{name}.", deeper))
    return macs


def _by_type(model: nn.Module, macs: Mapping[str, int]) -> dict[str, int]:
    own: dict[str, int] = {}
    whole: dict[str, int] = {}
    for name, module in reversed(list(model.named_modules())):
        inside = sum(whole.get(f"{name}.{child}".lstrip("."), 0) for child, _ in module.named_children())
        whole[name] = macs.get(name, 0) or inside  # a list of modules is held, but never called
        kind = type(module).__name__
        own[kind] = own.get(kind, 0) + whole[name] - inside
    return own


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
    repeated = join([take(example_inputs, 0, 1)] * batch)
    inputs = {name: to_device(repeated, device_of(model)) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    with ExitStack() as stack, torch.no_grad():  # not inference_mode: what a model caches must stay fit for training
        for model in models.values():
            stack.enter_context(evaluating(model))
            stack.enter_context(state_kept(model))
        started = time.perf_counter()
        while time.perf_counter() - started < seconds or len(next(iter(times.values()))) < 4:
            for name, model in models.items():
                times[name].append(_seconds(model, inputs[name]))
    return {name: statistics.median(values[1:]) for name, values in times.items()}  # the first ones warm up


def latency_by_module(
    model: nn.Module, names: Collection[str], example_inputs: Any, *, seconds: float = 1.0
) -> dict[str, float]:
    """Least seconds of a forward pass, under "", and of what each module named takes of it.

    The least of many passes for each part, and for the rest between them; the whole is their sum. What else runs on a
    machine disturbs every pass somewhere: beside whole passes, even the fastest, the parts would seem small.

    Args:
        model: run in eval mode without gradients, on its own device; left as found.
        names: of modules, none inside another.
        example_inputs: as it is: its batch size counts.
        seconds: about how long to measure.
    """
    inputs, device = to_device(example_inputs, device_of(model)), device_of(model)
    running: dict[str, float] = {}
    passes: list[dict[str, float]] = []

    def start(name: str, *_: object) -> None:
        running[name] = _clock(device)

    def stop(name: str, *_: object) -> None:
        passes[-1][name] += _clock(device) - running[name]

    with torch.no_grad(), evaluating(model), state_kept(model), ExitStack() as hooks:
        for name in names:
            module = model.get_submodule(name)
            hooks.enter_context(module.register_forward_pre_hook(partial(start, name)))
            hooks.enter_context(module.register_forward_hook(partial(stop, name)))
        started = time.perf_counter()
        while time.perf_counter() - started < seconds or len(passes) < 4:
            passes.append(dict.fromkeys(names, 0.0))
            whole = _seconds(model, inputs)
            passes[-1][""] = whole - sum(passes[-1].values())
    least = {name: min(times[name] for times in passes[1:]) for name in ("", *names)}  # the first one warms up
    return least | {"": sum(least.values())}


def _seconds(model: nn.Module, inputs: Any) -> float:
    started = _clock(device_of(model))
    call(model, inputs)
    return _clock(device_of(model)) - started


def _clock(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()
    return time.perf_counter()


@contextmanager
def _visible_attention() -> Iterator[None]:
    """Attention as visible matrix products: the fused paths report no FLOPs."""
    with plain_attention(), sdpa_kernel(SDPBackend.MATH):
        yield


@contextmanager
def _quiet(logger: str) -> Iterator[None]:
    log = logging.getLogger(logger)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
