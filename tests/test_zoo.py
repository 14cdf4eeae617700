"""The quick part of the zoo: counts by hand, everything removed, and the rest still works."""

from __future__ import annotations

import pytest

from benchmarks.zoo import EXPORTS, LATER, SURGERY, ZOO, check

# Half of the zoo: of each family a network that takes a few seconds.
QUICK = (
    *("resnet20", "torchvision:resnet18", "torchvision:regnet_x_400mf", "torchvision:regnet_y_400mf"),
    *("torchvision:mobilenet_v2", "torchvision:efficientnet_b0", "timm:mobilenetv3_large_100", "timm:efficientnet_b0"),
    *("torchvision:mobilenet_v3_small", "torchvision:mnasnet1_0", "torchvision:lraspp_mobilenet_v3_large"),
    *("torchvision:densenet121", "torchvision:googlenet", "torchvision:alexnet", "torchvision:squeezenet1_0"),
    *("torchvision:shufflenet_v2_x1_0", "timm:skresnet18", "timm:ghostnet_100"),
    *("timm:mambaout_femto", "timm:poolformer_s12", "timm:pvt_v2_b0", "timm:edgenext_xx_small"),
    *("timm:levit_128", "timm:xcit_nano_12_p16_224"),
    *(entry.name for entry in ZOO if entry.name.startswith("transformers:")),
)
# What is not "ok", and why.
REASONS = {
    # Its layers hold their weights transposed, which torch-pruning does not know.
    ("transformers:gpt2", "width"): "no channels inside its blocks",
    # Its channels are split into a gate and what it lets through.
    ("timm:mambaout_femto", "width"): "no channels inside its blocks",
}


def test_half_of_the_zoo_is_tested():
    assert 2 * len(set(QUICK)) >= len(ZOO)


@pytest.mark.filterwarnings("ignore")  # of the libraries
@pytest.mark.parametrize("name", QUICK)
def test_a_network_of_the_zoo(name):
    entry = next(entry for entry in ZOO if entry.name == name)
    row = check(entry, fast=name not in ("resnet20", "transformers:swin"))
    assert row["found"] == list(entry.expected)
    steps = [*SURGERY, *LATER, *EXPORTS]
    failed = {step: row[step] for step in steps if row.get(step, "ok") != "ok"}
    known = {step: reason for (network, step), reason in REASONS.items() if network == name}
    assert all(step in known and known[step] in verdict for step, verdict in failed.items()), failed
