"""Blocks are found by structure; counts are written down by hand from the papers; the model is left as found."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from benchmarks.zoo import ZOO
from modprune.blocks import find_blocks
from modprune.cost import count_params
from modprune.models import resnet20, resnet56
from modprune.surgery import remove_blocks

# Of the other half of the zoo, see test_zoo.
LARGER = ("resnet50", "efficientnet_b0", "convnext_tiny", "swin_v2_t", "vgg11_bn")


@pytest.mark.parametrize("name", LARGER)
def test_counts_of_torchvision_networks(name):
    entry = next(entry for entry in ZOO if entry.name == f"torchvision:{name}")
    blocks = find_blocks(*entry.build())
    kinds = Counter(block.kind for block in blocks)
    assert (kinds["identity"], kinds["transition"], kinds["plain"]) == entry.expected
    assert all(block.exact for block in blocks if block.kind == "identity")
    assert not blocks.refused


def test_every_layer_of_a_transformer_is_one_block():
    model = torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=3, num_heads=2, hidden_dim=16, mlp_dim=32
    )
    blocks = find_blocks(model, torch.randn(2, 3, 32, 32))
    assert blocks.names == tuple(f"encoder.layers.encoder_layer_{i}" for i in range(3))
    # Hand count: two norms, attention (query, key, value and output), two linear layers; 17 tokens.
    assert {block.params for block in blocks} == {2 * 32 + 4 * (16 * 16 + 16) + (16 * 32 + 32) + (32 * 16 + 16)}
    assert {block.macs for block in blocks} == {17 * (4 * 16 * 16 + 2 * 16 * 32) + 2 * 17 * 17 * 16}


def test_resnet56():
    blocks = find_blocks(resnet56(), torch.zeros(2, 3, 32, 32))
    assert blocks.names == tuple(f"layer{s}.{b}" for s in (1, 2, 3) for b in range(9))
    assert [b.name for b in blocks if b.kind == "transition"] == ["layer2.0", "layer3.0"]
    assert [blocks[i].params for i in (0, 10, 20)] == [4672, 18560, 73984]
    assert all(b.macs == 2 * 16 * 16 * 9 * 32 * 32 and b.exact for b in blocks if b.kind == "identity")
    assert blocks[0].layers == tuple(f"layer1.0.{layer}" for layer in ("conv1", "bn1", "conv2", "bn2"))


def test_costs_are_per_sample_and_finding_takes_at_most_three_passes():
    model, calls = resnet20(), []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda m, args, out: calls.append(m))
    blocks = find_blocks(model, torch.zeros(3, 3, 32, 32))
    assert max(Counter(calls).values()) <= 3
    assert blocks == find_blocks(model, torch.zeros(1, 3, 32, 32))


class Residual(nn.Module):
    """`x + f(x)`, with what a test wants wrong about it."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(body, nn.ReLU())

    def forward(self, x, other=None):
        return x + self.body(x) if other is None else x + self.body(other)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Linear(4, 4), Residual(nn.Linear(4, 4)), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.block(self.block(self.stem(x))))


class Fed(Twice):
    def forward(self, x):
        return self.head(self.block(self.stem(x), torch.tanh(self.head.weight[:1] * x)))


class Leaking(Residual):
    def forward(self, x):
        self.inner = self.body[0](x)
        return x + self.body[1](self.inner)


class Leak(Twice):
    def __init__(self) -> None:
        super().__init__()
        self.block = Leaking(nn.Linear(4, 4))

    def forward(self, x):
        return self.head(self.block(self.stem(x)) * self.block.inner)


class Named(Residual):
    def forward(self, x):
        return {"out": super().forward(x)}


class Naming(Twice):
    def __init__(self) -> None:
        super().__init__()
        self.block = Named(nn.Linear(4, 4))

    def forward(self, x):
        return self.head(self.block(self.stem(x))["out"])


class Keys(Residual):
    def forward(self, x):
        keys = self.body(x)
        return x + keys.softmax(1) * keys, keys


class Cached(Twice):
    def __init__(self) -> None:
        super().__init__()
        self.block = Keys(nn.Linear(4, 4))

    def forward(self, x):
        x, keys = self.block(self.stem(x))
        return self.head(x), keys


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Cached(), "a second value that it gives back is used"),
        (Twice(), "called 2 times"),
        (Fed(), "another layer feeds"),
        (Leak(), "used outside"),
        (Naming(), "gives back a dict"),
    ],
)
def test_refusals_say_why(model, reason):
    blocks = find_blocks(model, torch.randn(3, 4))
    assert not blocks
    assert reason in blocks.refused["block"]


class ByHand(nn.Module):
    """A norm of one's own, of which autograd sees means and roots."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))

    def forward(self, x):
        return self.weight * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6) + self.bias


class Scaled(ByHand):
    def forward(self, x):
        return self.weight * x + self.bias


class Turned(nn.Module):
    """The same for an input twice as large, and no norm."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(4))

    def forward(self, x):
        return F.linear(F.normalize(x, dim=-1), self.weight)


@pytest.mark.parametrize(("layer", "kinds"), [(ByHand, {"identity"}), (Scaled, {"branch"}), (Turned, {"branch"})])
def test_a_norm_of_ones_own_may_follow_the_sum(layer, kinds):
    class Post(Residual):
        def __init__(self) -> None:
            super().__init__(nn.Linear(4, 4))
            self.last = layer()

        def forward(self, x):
            return self.last(super().forward(x))

    blocks = find_blocks(nn.Sequential(nn.Linear(4, 4), Post(), Post()), torch.randn(3, 4))
    assert {block.kind for block in blocks} == kinds
    assert not any(block.exact for block in blocks)


def test_a_body_without_shortcut_is_no_block():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 4))
    assert find_blocks(model, torch.randn(2, 4)) == ()


class Sum(Residual):
    """Ends in what `join(x, f(x))` gives."""

    def __init__(self, join) -> None:
        super().__init__(nn.Linear(4, 4))
        self.join, self.offset = join, nn.Parameter(torch.ones(4))

    def forward(self, x):
        return self.join(x, self.body(x), self.offset)


@pytest.mark.parametrize(
    ("join", "kinds"),
    [
        (lambda x, f, _: f + x, ["identity"]),
        (lambda x, f, _: x - f, ["identity"]),
        (lambda x, f, g: torch.addcmul(x, g, f), ["identity"]),
        (lambda x, f, _: (x.unsqueeze(0) + f).squeeze(0), ["identity"]),
        (lambda x, f, _: torch.add(f, x, alpha=2), []),
        (lambda x, f, _: f - x, []),
        (lambda x, f, _: f * x, []),
        (lambda x, f, g: x + g, []),  # a position embedding is no branch
        (lambda x, f, g: f + g, []),
    ],
)
def test_what_counts_as_a_shortcut(join, kinds):
    model = nn.Sequential(nn.Linear(4, 4), Sum(join), nn.Linear(4, 2))
    blocks = find_blocks(model, torch.randn(3, 4))
    assert [block.kind for block in blocks] == kinds
    assert not blocks.refused


class Bare(nn.Module):
    """A block of one module, with its weight in it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return x + nn.functional.linear(x, self.weight).relu()


def test_a_block_may_hold_its_weights_itself():
    model, x = nn.Sequential(nn.Linear(4, 4), Bare(), Bare(), nn.Linear(4, 2)), torch.randn(3, 4)
    assert [(b.name, b.kind, b.params, b.macs, b.exact) for b in find_blocks(model, x)] == [
        (name, "identity", 16, 16, True) for name in "12"
    ]
    expected = model[3](model[2](model[0](x)))
    for example in (x, None):
        assert torch.equal(remove_blocks(copy.deepcopy(model), ["1"], example_inputs=example)(x), expected)


def test_a_block_right_at_the_input_and_arguments_by_name():
    class Model(Twice):
        def forward(self, a, b):
            return self.block(x=a), b

    model = Model()
    with torch.inference_mode():
        assert find_blocks(model, {"a": torch.randn(2, 4), "b": torch.arange(2)}).names == ("block",)


def test_parameters_shared_with_other_layers_do_not_go():
    model = nn.Sequential(nn.Linear(4, 4), Residual(nn.Linear(4, 4)), nn.Linear(4, 4))
    model[2].weight = model[1].body[0].weight
    assert [block.params for block in find_blocks(model, torch.randn(2, 4))] == [4]


def test_blocks_that_return_tuples_say_what_stands_in_for_each():
    class Pair(Residual):
        def forward(self, x, size, other):
            return super().forward(x), [2, 2], x.sum(), other + 1, None

    class Model(Twice):
        def __init__(self) -> None:
            super().__init__()
            self.block = Pair(nn.Linear(4, 4))

        def forward(self, x):
            x, size, _, other, _ = self.block(self.stem(x), (2, 2), other=x)
            return self.head(x * size[0] + other)

    assert [block.outputs for block in find_blocks(Model(), torch.randn(2, 4))] == [(0, 1, -1, 2, -1)]


def test_small_blocks_inside_a_block_give_way_but_those_of_a_stage_do_not():
    class Outer(Residual):
        """A block of its own: a small one inside the branch or the shortcut."""

        def __init__(self, head: nn.Module) -> None:
            super().__init__(nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 4)))
            self.inner, self.head = Residual(nn.Linear(4, 4)), head

        def forward(self, x):
            x = self.inner(x)
            return self.head(x) + self.body(x)

    class Stage(nn.Module):
        """Adds a large learned position to what its blocks make: nothing of its own to remove."""

        def __init__(self) -> None:
            super().__init__()
            self.position = nn.Parameter(torch.ones(50, 4))
            self.blocks = nn.Sequential(Residual(nn.Linear(4, 4)), Residual(nn.Linear(4, 4)))

        def forward(self, x):
            return self.blocks(x + self.position.sum(0))

    class PostNorm(Residual):
        """As a layer of BERT: the residual of the attention is inside a sub-module, that of the MLP is not."""

        def __init__(self) -> None:
            super().__init__(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)))
            self.attention, self.norm = nn.Sequential(Residual(nn.Linear(4, 4)), nn.LayerNorm(4)), nn.LayerNorm(4)

        def forward(self, x):
            return self.norm(super().forward(self.attention(x)))

    class Mixture(nn.Module):
        """Two experts; their sum looks like a transition, but the layer around it is the block."""

        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 99), nn.Linear(99, 4))

        def forward(self, x):
            return self.one(x) + self.other(x)

    strided = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), Residual(nn.Linear(4, 4)))
    outer = Outer(nn.Identity()), Outer(nn.Linear(4, 4))
    model = nn.Sequential(*outer, Stage(), strided, PostNorm(), Residual(Mixture()), nn.Linear(4, 4))
    found = {block.name: block.kind for block in find_blocks(model, torch.randn(2, 4))}
    stages = {"2.blocks.0": "identity", "2.blocks.1": "identity", "3.3": "identity"}
    assert found == {"0": "identity", "1": "transition", **stages, "4": "identity", "5": "identity"}


def test_plain_units_are_norm_and_convolution_by_the_name_of_the_convolution():
    block = find_blocks(torchvision.models.vgg11_bn(init_weights=False), torch.zeros(1, 3, 32, 32))[0]
    assert (block.name, block.kind, block.layers) == ("features.11", "plain", ("features.11", "features.12"))
    assert block.params == 256 * 256 * 9 + 256 + 2 * 256
    assert block.macs == 256 * 256 * 9 * 8 * 8


def test_a_plain_unit_may_be_normalised_by_instance():
    unit = nn.Conv2d(4, 4, 3, padding=1), nn.InstanceNorm2d(4, affine=True), nn.ReLU()
    assert find_blocks(nn.Sequential(nn.Conv2d(3, 4, 1), *unit), torch.randn(2, 3, 8, 8)).names == ("1",)


@pytest.mark.parametrize("inputs", [(1, 3, 32, 32), (1, 1, 32, 32)], ids=["runs", "fails"])
def test_the_model_is_left_as_found(inputs):
    model = resnet20().train()
    model.layer1.eval()
    model.conv1.weight.requires_grad_(False)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    with contextlib.suppress(RuntimeError):
        find_blocks(model, torch.randn(inputs, generator=torch.Generator().manual_seed(0)))
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()].count(False) == 1
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize(
    ("wrap", "mend"),
    [
        (nn.DataParallel, r"pass model\.module"),
        (torch.compile, "pass the module as it was before"),
        (
            lambda model: torch.jit.trace(model.eval(), torch.zeros(1, 3, 32, 32)),
            "scripted or traced: pass it as it was",
        ),
    ],
)
def test_wrapped_models_are_refused(wrap, mend):
    with pytest.raises(ValueError, match=mend):
        find_blocks(wrap(resnet20()), torch.zeros(1, 3, 32, 32))


def test_frozen_weights_of_inference_mode_are_refused_with_the_way_out():
    with torch.inference_mode():
        model = resnet20().requires_grad_(False)
    with pytest.raises(ValueError, match="made in inference mode and are frozen: make it outside"):
        find_blocks(model, torch.zeros(1, 3, 32, 32))


def test_inputs_that_do_not_fit_are_one_line():
    with pytest.raises(RuntimeError, match="CifarResNet does not run on the example inputs") as caught:
        find_blocks(resnet20(), torch.zeros(1, 1, 32, 32))
    assert "\n" not in str(caught.value)


def test_a_projection_shortcut_is_kept_out_of_the_cost():
    model = torchvision.models.resnet18()
    block = next(b for b in find_blocks(model, torch.zeros(1, 3, 64, 64)) if b.name == "layer2.0")
    assert block.params == count_params(model.layer2[0]) - count_params(model.layer2[0].downsample)
    assert not any("downsample" in layer for layer in block.layers)


def test_gelu_after_the_sum_is_inexact():
    class Post(Residual):
        def forward(self, x):
            return F.gelu(x + self.body(x))

    model = nn.Sequential(nn.Linear(4, 4), Post(nn.Linear(4, 4)), nn.Linear(4, 2))
    assert [(b.kind, b.exact) for b in find_blocks(model, torch.randn(3, 4))] == [("identity", False)]


def test_a_block_on_the_input_itself_is_seen():
    model = nn.Sequential(Residual(nn.Linear(4, 4)), Residual(nn.Linear(4, 4)), nn.Linear(4, 2))
    assert find_blocks(model, torch.randn(3, 4)).names == ("0", "1")
    assert find_blocks(model, (torch.randn(3, 4),)).names == ("0", "1")


class Remembering(nn.Linear):
    """Keeps what it gave in a buffer that was empty."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.register_buffer("last", None)

    def forward(self, x):
        self.last = super().forward(x)
        return self.last


def test_empty_buffers_are_empty_afterwards():
    model = nn.Sequential(Remembering(), Residual(nn.Linear(4, 4)))
    assert len(find_blocks(model, torch.randn(2, 4))) == 1
    assert model[0].last is None
