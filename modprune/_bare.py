"""The user's own module, and that it is one to work on: not inside a wrapper, not compiled, not without values."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel


def bare(model: nn.Module) -> nn.Module:
    """The user's own module inside the wrappers of torch.compile, for several devices and for averages of weights."""
    while True:
        averaged = isinstance(model, AveragedModel) or type(model).__module__ == "timm.utils.model_ema"
        if averaged or isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.get_submodule("module")
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def check_bare(model: nn.Module) -> None:
    """ValueError if blocks cannot be seen or replaced safely because the model is wrapped or compiled."""
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        raise ValueError(f"the model is wrapped in {type(model).__name__}: pass model.module, then wrap it anew")
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError("the model is scripted or traced: pass it as it was before; script it after the pruning")
    # Version 1 wraps modules, version 2 puts DTensors in the place of parameters. To import either takes a second.
    for module in model.modules():
        if "_fsdp_wrapped_module" in module._modules or any(
            hasattr(parameter, "device_mesh") for parameter in module._parameters.values()
        ):
            raise ValueError("the model is sharded over devices (FSDP): remove blocks before, then shard what is left")
        if "_orig_mod" in module._modules:
            raise ValueError("the model is compiled: pass the module as it was before; compile it after the pruning")
        if module._compiled_call_impl is not None:
            raise ValueError(
                "the model is compiled in place: copy.deepcopy(model) is not, pass that and compile it after"
            )


def check_filled(model: nn.Module) -> None:
    """ValueError if the model has no values to run with, or such as autograd takes no gradients for."""
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("the model has no weights yet (it is on the meta device): load them first")
    frozen = [parameter for parameter in model.parameters() if not is_lazy(parameter) and not parameter.requires_grad]
    if any(parameter.is_inference() for parameter in frozen):
        raise ValueError("the model's weights were made in inference mode and are frozen: make it outside of that mode")


def check_shaped(model: nn.Module, name: str = "") -> None:
    """ValueError if layers of a model, or of the module of that name, take their shapes from a first batch to come."""
    if lazy := [own for own, parameter in model.named_parameters(name) if is_lazy(parameter)]:
        raise ValueError(f"{lazy[0]}: has no shape yet, as lazy layers have none: run the model on one batch before")
