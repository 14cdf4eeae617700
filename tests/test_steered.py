"""Networks whose blocks are listened to, steered by, or given more than a feature; and what they are made of."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
import torch.utils.checkpoint
from torch import nn
from torchvision.models import resnet18
from torchvision.models.feature_extraction import create_feature_extractor

from modprune import PruningPlan, count_params, find_blocks, load, save
from modprune.criteria import Ablation
from tests.test_strangers import Net, Residual

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def without_branch(model: nn.Module, branch: str, *inputs: torch.Tensor) -> torch.Tensor:
    """What a model gives in eval mode with all parameters of a branch zero: the block skipped."""
    training, state = model.training, copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for parameter in model.get_submodule(branch).parameters():
            parameter.zero_()
        expected = model.eval()(*inputs)
    model.train(training).load_state_dict(state)
    return expected


class Tapped(Net):
    """Reads a feature through a hook, as dense prediction on backbones does."""

    def __init__(self) -> None:
        super().__init__(Residual(), Residual(), Residual())
        self.taps = {}
        self.handle = self.blocks[1].register_forward_hook(lambda _, __, out: self.taps.update(middle=out))

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head((x + self.taps["middle"]).mean((2, 3)))


def test_who_listens_to_a_block_hears_what_stands_in_for_it():
    model = Tapped().eval()
    expected = without_branch(model, "blocks.1", X)
    PruningPlan(("blocks.1",)).apply(model, X)
    model(torch.randn(5, 3, 8, 8))
    torch.testing.assert_close(model(X), expected)
    model.handle.remove()
    assert not model.blocks[1]._forward_hooks


class Noisy(nn.Module):
    """A transition that goes another way in training."""

    def __init__(self) -> None:
        super().__init__()
        self.branch, self.shortcut = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(3, 8, 1, 2)
        self.stride = 2

    def forward(self, x):
        short = self.shortcut(x)
        return short + torch.randn_like(short) + self.branch(x) if self.training else short + self.branch(x)


class Steered(Net):
    """Looks at an attribute of its first block."""

    def __init__(self) -> None:
        super().__init__(Noisy(), Residual())
        self.stem = nn.Identity()

    def forward(self, x):
        return super().forward(x) * self.blocks[0].stride


@pytest.mark.parametrize("training", [False, True])
def test_a_transition_is_the_one_of_eval_mode_and_keeps_its_attributes(training, tmp_path):
    model = Steered().train(training)
    state = torch.get_rng_state()
    expected = without_branch(model, "blocks.0.branch", X)
    PruningPlan(("blocks.0",)).apply(model, X)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.blocks[0].training is training
    save(model, tmp_path / "pruned.safetensors")
    for pruned in (model, copy.deepcopy(model), load(tmp_path / "pruned.safetensors", Steered())):
        torch.testing.assert_close(pruned.eval()(X), expected)


class Context(nn.Module):
    """A convolution and a context of one value a channel, which is no shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.context = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return self.conv(x) + self.context(x.mean((2, 3), keepdim=True))


def test_a_smaller_value_is_no_shortcut():
    assert not find_blocks(Net(Context()), X)


class Kind(Residual):
    """Has names that a pass-through may want for its own, of the object and of its class."""

    outputs = "wide"

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind


class Kinds(Net):
    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x if (block.kind, block.outputs) == ("wide", "wide") else x.roll(1, 3))
        return self.head((x * torch.arange(8)).mean((2, 3)))


def test_the_attributes_of_a_block_are_read_from_what_stands_in_for_it():
    model = Kinds(Kind("local"), Kind("wide"), Kind("local")).eval()
    expected = without_branch(model, "blocks.1", X)
    PruningPlan(("blocks.1",)).apply(model, X)
    torch.testing.assert_close(model(X), expected)


class Picky(Net):
    """Keeps the features of its blocks, and tells these by their class."""

    def forward(self, x):
        x, kept = self.stem(x), []
        for block in self.blocks:
            x = block(x)
            kept += [x] if isinstance(block, Residual) else []
        return self.head((x + kept[1]).mean((2, 3)))


def test_a_network_that_goes_on_in_another_way_is_refused():
    model = Picky(Residual(), Residual(), Residual(), Residual()).eval()
    expected = model(X)
    with pytest.raises(RuntimeError, match=r"removing blocks\.1 failed: the output is not that of skipped blocks"):
        PruningPlan(("blocks.3", "blocks.1")).apply(model, X)
    assert torch.equal(model(X), expected)
    assert find_blocks(PruningPlan(("blocks.3",)).apply(model, X), X).names == ("blocks.0", "blocks.1", "blocks.2")


class Both(nn.Module):
    """Residual in the first value, not in the second, whatever its shape."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x, z):
        return x + self.f(x), self.g(z).relu()


class Streams(Net):
    def forward(self, x):
        x = self.stem(x)
        z = x.flip(3)
        for block in self.blocks:
            x, z = block(x, z)
        return self.head((x * z).mean((2, 3)))


def test_a_second_value_is_no_argument_for_having_its_shape():
    refused = find_blocks(Streams(Both(), Both()), X).refused
    assert refused == dict.fromkeys(("blocks.0", "blocks.1"), "a second value that it gives back is used")


class Unit(nn.Sequential):
    def __init__(self, before: int, after: int) -> None:
        super().__init__(nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU())


class Functional(nn.Module):
    """The ResNet-9 of tutorials: its shortcut stands in the network's own code."""

    def __init__(self) -> None:
        super().__init__()
        self.prepare, self.plain, self.branch = Unit(3, 8), Unit(8, 8), nn.Sequential(Unit(8, 8), Unit(8, 8))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.plain(self.prepare(x))
        x = x + self.branch(x)
        return self.head(x.mean((2, 3)))


def test_units_that_a_shortcut_leads_around_stay():
    blocks = find_blocks(Functional(), X)
    assert blocks.names == ("plain.0",)
    assert set(blocks.refused) == {"branch.0.0", "branch.1.0"}
    assert not find_blocks(create_feature_extractor(resnet18(), ["flatten"]), torch.zeros(1, 3, 32, 32))


class Shuffled(Residual):
    def __init__(self, after) -> None:
        super().__init__()
        self.after = after

    def forward(self, x):
        return self.after(super().forward(x).unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2))


@pytest.mark.parametrize("after", [lambda x: x, F.silu, F.relu, F.hardtanh])
@pytest.mark.parametrize("example", [X, torch.zeros(1, 3, 8, 8)])
def test_another_order_is_seen_through_activations_and_zeros(after, example):
    model = Net(Shuffled(after))
    nn.init.zeros_(model.stem.bias)
    blocks = find_blocks(model, example)
    assert not blocks or after is F.hardtanh  # which gives one value for all of them


def test_an_activation_keeps_the_order():
    class Activated(Residual):
        def forward(self, x):
            return F.silu(super().forward(x))

    assert find_blocks(Net(Activated()), X).names == ("blocks.0",)


class Heard(Residual):
    def forward(self, x):
        self.hidden = self.norm(self.conv(x))
        return x + self.hidden


@dataclass(slots=True)
class Answer:
    logits: torch.Tensor


class Wrapped(Net):
    def __init__(self, wrap) -> None:
        super().__init__(Heard(), Heard())
        self.wrap = wrap

    def forward(self, x):
        return self.wrap(logits=super().forward(x) + self.blocks[0].hidden.mean())


@pytest.mark.parametrize("wrap", [torch.distributions.Categorical, Answer, dict])
def test_the_output_may_be_an_object(wrap):
    blocks = find_blocks(Wrapped(wrap), X)
    assert blocks.names == ("blocks.1",)
    assert "used outside" in blocks.refused["blocks.0"]


class Writing(Net):
    """Normalises its input in place."""

    def forward(self, x):
        return super().forward(x.sub_(0.5).mul_(3))


def test_what_a_network_writes_into_its_input_is_not_seen_again():
    model, plain = Writing(Residual(), Residual()), Net(Residual(), Residual())
    plain.load_state_dict(model.state_dict())
    example, batch = X.clone(), (X.clone(), torch.tensor([0, 1]))
    blocks = find_blocks(model, example)
    scores = Ablation(2)(model, blocks, [batch])
    assert torch.equal(example, X)
    assert torch.equal(batch[0], X)
    expected = Ablation(2)(plain, blocks, [((X - 0.5) * 3, batch[1])])
    assert scores.mean == pytest.approx(expected.mean, rel=1e-4)


class Conditional(nn.Module):
    """Takes a time, or an adjacency, beside the feature."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.t = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(4, 8)

    def forward(self, x, t):
        return x + self.f(x) * self.t(t)[:, :, None, None]


class Conditioned(Net):
    def forward(self, x, t):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, t)
        return self.head(x.mean((2, 3)))


def test_an_input_of_the_network_may_go_into_every_block():
    model, inputs = Conditioned(Conditional(), Conditional()).eval(), (X, torch.rand(2, 4))
    assert find_blocks(model, inputs).names == ("blocks.0", "blocks.1")
    expected = without_branch(model, "blocks.1", *inputs)
    torch.testing.assert_close(PruningPlan(("blocks.1",)).apply(model, inputs)(*inputs), expected)


@pytest.mark.filterwarnings("ignore")  # torch.jit is on its way out
def test_a_scripted_block_stays_and_no_hook_does():
    model = Net(Residual(), torch.jit.script(Residual()))
    assert find_blocks(model, X).names == ("blocks.0",)
    assert not any(module._forward_hooks for module in (model.blocks, model.blocks[0]))


def test_a_hook_on_gradients_hides_no_block():
    model = Net(Residual())
    model.blocks[0].register_full_backward_hook(lambda *_: None)
    assert find_blocks(model, X)[0].kind == "identity"


def test_a_trunk_that_runs_twice_is_seen_to():
    class Siamese(Net):
        def forward(self, x):
            with torch.no_grad():
                target = super().forward(x)
            return super().forward(x) - target

    assert "called 2 times" in find_blocks(Siamese(Residual()), X).refused["blocks.0"]


def test_the_slopes_of_an_activation_go_with_their_unit():
    def unit(before):
        return nn.Conv2d(before, 8, 3, padding=1), nn.BatchNorm2d(8), nn.PReLU(8)

    model = nn.Sequential(*unit(3), *unit(8), nn.Flatten(), nn.Linear(512, 4))
    block, before = find_blocks(model, X)[0], count_params(model)
    assert "5" in block.layers
    assert before - count_params(PruningPlan((block.name,)).apply(model, X)) == block.params


def test_a_sparse_buffer_is_no_obstacle_but_no_file_holds_it(tmp_path):
    model = Net(Residual())
    model.register_buffer("adjacency", torch.eye(4).to_sparse())
    assert find_blocks(model, X).names == ("blocks.0",)
    with pytest.raises(ValueError, match=r"adjacency: .*sparse_coo"):
        save(model, tmp_path / "pruned.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_model_without_weights_is_named():
    with torch.device("meta"):
        model = Net(Residual())
    with pytest.raises(ValueError, match="meta device"):
        find_blocks(model, X)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_loaded_model_has_the_types_that_were_saved(dtype, tmp_path):
    model = Net(Residual(), Residual()).to(dtype).eval()
    save(PruningPlan(("blocks.0",)).apply(model), tmp_path / "pruned.safetensors")
    loaded = load(tmp_path / "pruned.safetensors", Net(Residual(), Residual())).eval()
    assert torch.equal(loaded(X.to(dtype)), model(X.to(dtype)))


class Experts(nn.Module):
    """Two experts by the sign of the gate, and one for all: as a whole a transition that torch.fx cannot trace."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.one, self.other, self.shared = (nn.Linear(8, n) for n in (1, 8, 8, 8))

    def forward(self, x):
        y = torch.zeros_like(x)
        for sign in (self.gate(x) > 0).unique().tolist():
            y = y + (self.other if sign else self.one)(x) * self.gate(x)
        return y + self.shared(x)


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention, self.experts = nn.LayerNorm(8), nn.Linear(8, 8), Experts()

    def forward(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.experts(self.norm(x))


class Adding(nn.Module):
    """What a block ends with, as a module of its own: it takes the shortcut, then the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.drop = nn.Linear(32, 8), nn.Dropout(0.1)

    def forward(self, x, h):
        return x + self.drop(self.project(h))


class AddedAtLast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.out = nn.LayerNorm(8), nn.Linear(8, 32), Adding()

    def forward(self, x):
        return self.out(x, self.up(self.norm(x)).relu())


class Rolling(nn.Module):
    """Dropout in eval mode as well."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))

    def forward(self, x):
        return x + self.f(F.dropout(x, 0.3, training=True))


@pytest.mark.parametrize("block", [Mixture, AddedAtLast, Rolling])
def test_what_is_inside_a_block_does_not_hide_it(block):
    model = nn.Sequential(nn.Linear(4, 8), block(), block(), block(), nn.Linear(8, 4)).eval()
    x = torch.randn(5, 4)
    blocks = find_blocks(model, x)
    assert (blocks.names, blocks.refused) == (("1", "2", "3"), {})
    assert all(found.params == sum(p.numel() for p in model[1].parameters()) for found in blocks)
    PruningPlan(("1", "2", "3")).apply(model, x)
    assert torch.equal(model(x), model[4](model[0](x)))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_blocks_are_found_or_it_is_said_how_they_are(reentrant):
    class Checkpointed(Net):
        def forward(self, x):
            x = self.stem(x)
            for block in self.blocks:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=reentrant)
            return self.head(x.mean((2, 3)))

    blocks = find_blocks(Checkpointed(Residual(), Residual()), X)
    if reentrant:
        assert blocks == ()
        assert set(blocks.refused) == {"blocks.0", "blocks.1"}
        assert "use_reentrant=False shows it" in blocks.refused["blocks.0"]
    else:
        assert blocks.names == ("blocks.0", "blocks.1")


class Looking(nn.Module):
    """Looks at whether its second block is still there."""

    def __init__(self) -> None:
        super().__init__()
        self.net = resnet18()

    def forward(self, x):
        return self.net(x) * (1 + any(True for _ in self.net.layer2[1].children()))


@pytest.mark.parametrize("others", [(), ("net.layer3.0",)])
def test_a_transition_beside_it_does_not_hide_that_a_network_looks_at_a_block(others):
    model = Looking()
    with pytest.raises(RuntimeError, match="some part of the network looks at them"):
        PruningPlan(("net.layer2.1", *others)).apply(model, torch.randn(2, 3, 32, 32))
    assert isinstance(model.net.layer2[1], type(resnet18().layer2[1]))


class Grabbed(Net):
    """Reads what goes into a block through a hook before it."""

    def __init__(self) -> None:
        super().__init__(*(Residual() for _ in range(3)))
        self.blocks[1].register_forward_pre_hook(lambda _, given: setattr(self, "seen", given[0]))

    def forward(self, x):
        x = super().forward(x)
        return x + self.seen.mean()


def test_hooks_before_a_block_go_on_and_change_what_passes():
    model, halved = Grabbed().eval(), Net(Residual(), Residual()).eval()
    halved.blocks[1].register_forward_pre_hook(lambda _, given: (given[0] / 2,))
    for network in (model, halved):
        expected = without_branch(network, "blocks.1", X)
        PruningPlan(("blocks.1",)).apply(network, X)
        torch.testing.assert_close(network(X), expected)


def test_hooks_that_compute_weights_go_with_them():
    unit = Unit(8, 8)
    nn.utils.prune.random_unstructured(unit[0], "weight", 0.5)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), unit, nn.Conv2d(8, 4, 1)).eval()
    heard = []
    unit[0].register_forward_pre_hook(lambda *_: heard.append(1))
    PruningPlan(("1.0",), ("plain",)).apply(model)
    model(X)
    assert heard == [1]


class Texts(nn.Module):
    """Its inputs are no numbers that gradients reach; its shortcuts stand in its own code."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head, self.scale = nn.Embedding(20, 8), nn.Linear(8, 4), 0.5
        self.units = nn.ModuleList(
            nn.Sequential(nn.Conv1d(8, 8, 3, padding=1), nn.BatchNorm1d(8), nn.ReLU()) for _ in range(3)
        )

    def forward(self, ids):
        x = self.units[0](self.embed(ids).mT)
        for unit in self.units[1:]:
            x = x + self.scale * unit(x)
        return self.head(x.mean(2))


def test_shortcuts_around_units_are_seen_behind_an_embedding():
    blocks = find_blocks(Texts(), torch.randint(20, (2, 6)))
    assert blocks.names == ("units.0.0",)
    assert set(blocks.refused) == {"units.1.0", "units.2.0"}


class Memorizing(Residual):
    def forward(self, x, memory):
        return super().forward(x), x.detach()


class Remembered(Net):
    """As Transformer-XL keeps what went into each layer."""

    def forward(self, x):
        x, self.memories = self.stem(x), []
        given = torch.zeros_like(x)
        for block in self.blocks:
            x, memory = block(x, given)
            self.memories.append(memory)
        return self.head(x.mean((2, 3)))


def test_what_is_given_back_again_is_the_argument_of_its_values():
    model = Remembered(Memorizing(), Memorizing()).eval()
    assert find_blocks(model, X)[1].outputs == (0, 0)
    PruningPlan(("blocks.1",)).apply(model, X)
    model(X)
    assert torch.equal(model.memories[1], model.blocks[0](model.stem(X), X)[0])


def test_a_dataclass_that_a_block_gives_back_is_named():
    class Answering(Residual):
        def forward(self, x):
            return Answer(super().forward(x))

    class Opening(Net):
        def forward(self, x):
            x = self.stem(x)
            for block in self.blocks:
                x = block(x).logits
            return self.head(x.mean((2, 3)))

    assert find_blocks(Opening(Answering()), X).refused == {
        "blocks.0": "it gives back a Answer, neither a tensor nor a tuple"
    }


class Adapted(nn.Module):
    """A layer with one of low rank beside it, as LoRA has it."""

    def __init__(self, base: nn.Conv2d) -> None:
        super().__init__()
        self.base, self.up = base, nn.Conv2d(2, base.out_channels, 1, bias=False)
        self.down = nn.Conv2d(base.in_channels, 2, base.kernel_size, base.stride, base.padding, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def test_adapters_beside_layers_are_no_shortcuts():
    model = resnet18(num_classes=4)
    example = torch.zeros(1, 3, 32, 32)
    expected = find_blocks(model, example).names
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Conv2d) and name.startswith("layer"):
            model.set_submodule(name, Adapted(layer))
    assert find_blocks(model, example).names == expected
