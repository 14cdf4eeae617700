"""Networks that are written in ways of their own: what can go is taken out rightly, what cannot is said."""

from __future__ import annotations

import copy
import io
from collections import namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import modprune.surgery
from modprune import (
    ModularityPruner,
    PruningPlan,
    compare,
    count_macs,
    evaluate,
    find_blocks,
    finetune,
    load,
    modularity_curve,
    save,
)
from modprune.criteria import Ablation, BnScale
from modprune.data import ImageLoader, digits
from modprune.models import CifarVGG
from modprune.surgery import removed_blocks

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Residual(nn.Module):
    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)

    def forward(self, x):
        return x + F.relu(self.norm(self.conv(x)))


class Net(nn.Module):
    """A stem, blocks in a ModuleList, a head."""

    def __init__(self, *blocks: nn.Module, channels: int = 8) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(channels, 4)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


class Listed(Net):
    """The old idiom: a list of Python's beside add_module."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [Residual(), Residual()]
        for i, layer in enumerate(self.layers):
            self.add_module(f"layer{i}", layer)

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean((2, 3)))


class Hidden(Listed):
    """The same, where no attribute shows it."""

    def __init__(self) -> None:
        super().__init__()
        layers, self.layers = self.layers, ()
        self.run = lambda x: layers[1](layers[0](x))

    def forward(self, x):
        return self.head(self.run(self.stem(x)).mean((2, 3)))


def test_a_block_that_a_list_holds_too_is_refused():
    blocks = find_blocks(Listed(), X)
    assert not blocks
    assert set(blocks.refused) == {"layer0", "layer1"}
    assert "the list layers holds it too" in blocks.refused["layer0"]
    model = Hidden()
    with pytest.raises(RuntimeError, match="layer0 is not called by that name"):
        PruningPlan(("layer0",)).apply(model, X)
    assert isinstance(model.layer0, Residual)


class Twice(Net):
    """The same blocks under two names."""

    def __init__(self) -> None:
        super().__init__(Residual(), Residual(), Residual())
        self.body = nn.Sequential(*self.blocks)

    def forward(self, x):
        return self.head(self.body(self.stem(x)).mean((2, 3)))


def test_a_block_with_two_names_goes_under_both(tmp_path):
    model = Twice().eval()
    blocks = find_blocks(model, X)
    assert blocks.names == ("blocks.0", "blocks.1", "blocks.2")
    assert {block.params for block in blocks} == {8 * 8 * 9 + 8 + 16}
    scores = Ablation(samples=8)(model, blocks, [(torch.randn(8, 3, 8, 8), torch.arange(8) % 4)])
    assert any(scores.mean.values())
    expected = model.head(model.blocks[1](model.stem(X)).mean((2, 3)))
    PruningPlan(("blocks.0", "blocks.2")).apply(model, X)
    torch.testing.assert_close(model(X), expected)
    save(model, tmp_path / "m.safetensors")
    assert torch.equal(load(tmp_path / "m.safetensors", Twice()).eval()(X), model(X))


def test_an_encoder_of_torch_with_a_padding_mask():
    class Texts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 4)
            self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 3)

        def forward(self, ids, padded=None):
            return self.head(self.encoder(self.embed(ids), src_key_padding_mask=padded).mean(1))

    ids, padded = torch.randint(20, (8, 6)), torch.arange(6).expand(8, 6) > 3
    model = Texts().eval()
    whole = copy.deepcopy(model)
    loader = [{"ids": ids, "padded": padded, "labels": torch.arange(8) % 4}]
    assert len(modularity_curve(model, loader, samples=8, repeats=1).layers) == 4
    for example in ((ids, padded), None):
        pruned = copy.deepcopy(whole)
        PruningPlan(("encoder.layers.0",), ("identity",)).apply(pruned, example)
        y = whole.embed(ids)
        for layer in (1, 2):
            y = whole.encoder.layers[layer](y, src_key_padding_mask=padded)
        rest = pruned.encoder(pruned.embed(ids), src_key_padding_mask=padded)
        torch.testing.assert_close(rest[:, :4], y[:, :4])  # what is padded nobody reads
    assert torch.backends.mha.get_fastpath_enabled()
    assert model.encoder.use_nested_tensor


class Doubling(nn.Module):
    """A transition with dropout on its shortcut."""

    def __init__(self, shortcut) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.short, self.shortcut = nn.Conv2d(8, 16, 1), shortcut
        self.one, self.two = nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x):
        return self.shortcut(self, self.short(x)) + self.two(F.relu(self.one(x)))


def by_function(block, x):
    return F.dropout(x, 0.5, block.training)


def by_module(block, x):
    return block.drop(x)


def test_a_shortcut_that_asks_for_the_mode_is_refused_and_a_module_follows_it():
    refused = find_blocks(Net(Doubling(by_function), channels=16), X).refused
    assert "mode of the moment" in refused["blocks.0"]
    model = Net(Doubling(by_module), channels=16).eval()
    PruningPlan(("blocks.0",)).apply(model, X)
    assert torch.equal(model(X), model(X))
    model.train()
    assert not torch.equal(model(X), model(X))


def test_the_mark_of_a_transition_outlives_copies_and_pickle():
    model = Net(Doubling(by_module), channels=16)
    PruningPlan(("blocks.0",)).apply(model, X)
    file = io.BytesIO()
    torch.save(copy.deepcopy(model), file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    for copied in (copy.deepcopy(model), again):
        assert removed_blocks(copied).remove == ("blocks.0",)


class Kept(Net):
    """What goes into the first block is read again at the end; the activation after it writes in place."""

    def __init__(self, inplace: bool) -> None:
        super().__init__(Residual(), Residual(), channels=16)
        self.act = nn.ReLU(inplace=inplace)

    def forward(self, x):
        kept = self.stem(x)
        x = self.blocks[1](self.act(self.blocks[0](kept)))
        return self.head(torch.cat([x, kept], 1).mean((2, 3)))


def test_what_would_be_overwritten_is_named():
    for example in (X, torch.zeros_like(X)):  # of which a network without biases makes nothing
        model = Kept(inplace=True)
        model.stem.bias = None
        with pytest.raises(RuntimeError, match=r"writes in place into what now goes through blocks\.0"):
            PruningPlan(("blocks.0",)).apply(model, example)
    PruningPlan(("blocks.0",)).apply(Kept(inplace=False), X)
    act = lambda: nn.ReLU(inplace=True)  # noqa: E731
    chain = nn.Sequential(nn.Conv2d(3, 8, 1), act(), Residual(), act(), nn.Flatten(), nn.Linear(512, 4))
    with pytest.raises(
        RuntimeError, match="writes in place into what now goes through 2"
    ):  # what ReLU's gradient reads
        PruningPlan(("2",)).apply(chain, X)
    chain = nn.Sequential(nn.Conv2d(3, 8, 1), Residual(), act(), nn.Flatten(), nn.Linear(512, 4))
    PruningPlan(("1",)).apply(chain, X)
    chain.train()(X).sum().backward()


def test_nor_is_what_dropout_would_write_in_training_or_the_input():
    model = Kept(inplace=False)
    model.act = nn.Dropout(0.5, inplace=True)
    with pytest.raises(RuntimeError, match=r"writes in place into what now goes through blocks\.0"):
        PruningPlan(("blocks.0",)).apply(model, X)
    drop = nn.Dropout(0.5, inplace=True)
    chain = nn.Sequential(nn.Conv2d(3, 8, 1), Residual(), drop, nn.Flatten(), nn.Linear(512, 4))
    expected = chain[4](chain[3](chain[0](X)))
    torch.testing.assert_close(PruningPlan(("1",)).apply(chain, X).eval()(X), expected)
    chain = nn.Sequential(Residual(3), nn.ReLU(inplace=True), nn.Conv2d(3, 8, 1))
    with pytest.raises(RuntimeError, match="writes in place into what now goes through 0"):
        PruningPlan(("0",)).apply(chain, X)


class Early(Residual):
    """Its activation writes into what goes in."""

    def forward(self, x):
        return super().forward(x.relu_())


def test_a_network_that_writes_into_its_input_anyhow_may():
    x = torch.randn(2, 3, 8, 8)
    model = nn.Sequential(Early(3), Early(3), nn.Conv2d(3, 8, 1)).eval()
    expected = model[2](model[1](x.clone()))
    torch.testing.assert_close(PruningPlan(("0",)).apply(model, x)(x.clone()), expected)


@pytest.mark.parametrize("before", [[], ["something"]])  # and the search for what failed
def test_a_proof_that_is_interrupted_leaves_the_model_whole(before, monkeypatch):
    found = list(before)

    def interrupted(*_):
        if found:
            return found.pop()
        raise KeyboardInterrupt

    model = Net(Residual(), Residual())
    monkeypatch.setattr(modprune.surgery, "problem_with", interrupted)
    with pytest.raises(KeyboardInterrupt):
        PruningPlan(("blocks.0",)).apply(model, X)
    assert not removed_blocks(model).remove


class Graph(nn.Module):
    """Takes its sparse adjacency first."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Line(), Line())

    def forward(self, adjacency, x):
        return self.blocks(torch.sparse.mm(adjacency, x))


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return x + self.linear(x).relu()


@pytest.mark.parametrize("form", [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr])
@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_inputs_may_be_sparse(form):
    inputs = form(torch.eye(6)), torch.randn(6, 8)
    model = Graph()
    expected = model.blocks[1](inputs[1])
    torch.testing.assert_close(PruningPlan(("blocks.0",)).apply(model, inputs)(*inputs), expected)


class Cropped(nn.Module):
    """A valid convolution whose shortcut is a view; the activation after the sum writes in place."""

    def __init__(self, within: bool) -> None:
        super().__init__()
        self.conv, self.within = nn.Conv2d(8, 8, 3), within

    def forward(self, x):
        total = self.conv(x) + x[:, :, 1:-1, 1:-1]
        return total.relu_() if self.within else total


class Recalled(Net):
    def forward(self, x):
        kept = self.stem(x)
        block = self.blocks[0]
        y = block(kept) if block.within else block(kept).relu_()
        return self.head(y.mean((2, 3)) + kept.mean((2, 3)))


def test_a_shortcut_that_is_a_view_is_not_written_into():
    with pytest.raises(RuntimeError, match=r"writes in place into what now goes through blocks\.0"):
        PruningPlan(("blocks.0",)).apply(Recalled(Cropped(within=False)), X)
    model = Recalled(Cropped(within=True)).eval()
    expected = copy.deepcopy(model)
    for parameter in expected.blocks[0].parameters():
        nn.init.zeros_(parameter)
    assert find_blocks(model, X)[0].kind == "transition"
    assert torch.equal(PruningPlan(("blocks.0",)).apply(model, X)(X), expected(X))


class Widening(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.shortcut = nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(8, 16, 1)

    def forward(self, x):
        return self.shortcut(x) + F.relu(self.conv(x))


class Rewritten(Net):
    """Writes itself into what the block was given, so that it can never be trained."""

    def forward(self, x):
        x = self.stem(x)
        y = self.blocks[0](x)
        return self.head(torch.cat([y, x.relu_()], 1).mean((2, 3)))


def test_what_goes_through_no_block_may_be_written_into():
    model = Rewritten(Widening(), channels=24).eval()
    expected = copy.deepcopy(model)
    nn.init.zeros_(expected.blocks[0].conv.weight)
    nn.init.zeros_(expected.blocks[0].conv.bias)
    torch.testing.assert_close(PruningPlan(("blocks.0",)).apply(model, X)(X), expected(X))


def test_a_criterion_that_leaves_blocks_out_is_not_misled_by_what_writes_in_place():
    batches = [(torch.randn(40, 3, 8, 8), torch.arange(40) % 4)]
    model = Kept(inplace=True).eval()
    aside = copy.deepcopy(model)
    aside.act = nn.ReLU()
    scores = [Ablation(samples=40)(net, find_blocks(net, X), batches).values for net in (model, aside)]
    np.testing.assert_allclose(*scores, rtol=1e-5)


class Active(nn.Module):
    """An activation that is given more than it takes."""

    def forward(self, x, y):
        return y.relu()


class Summed(nn.Module):
    """`relu(f(x)) + h(x)`, where x itself is not added."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.h, self.act = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1), Active()

    def forward(self, x):
        return self.act(x, self.f(x)) + self.h(x)


class Adding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, y, x):
        return x + self.gain * y


class Apart(Residual):
    def __init__(self) -> None:
        super().__init__()
        self.act = Adding()

    def forward(self, x):
        return self.act(self.norm(self.conv(x)), x)


@pytest.mark.parametrize("block", [Summed, Apart])
def test_hooks_on_gradients_change_nothing_of_what_is_found(block):
    model = Net(block())
    before = find_blocks(model, X)
    model.blocks[0].act.register_full_backward_hook(lambda *_: None)
    after = find_blocks(model, X)
    assert (after, after.refused) == (before, before.refused)
    assert [b.kind for b in before] == ["transition" if block is Summed else "identity"]


class Collecting(Residual):
    """Adds in place to what the network collects."""

    def forward(self, x, collected):
        y = F.relu(self.norm(self.conv(x)))
        collected.add_(y.mean((2, 3)))
        return x + y


class Collected(Net):
    def forward(self, x):
        x = self.stem(x)
        collected = x.new_zeros(len(x), 8)
        for block in self.blocks:
            x = block(x, collected)
        return self.head(x.mean((2, 3)) + collected)


def test_what_a_block_writes_into_an_argument_is_used_outside():
    blocks = find_blocks(Collected(Collecting(), Collecting()), X)
    assert not blocks
    assert blocks.refused == dict.fromkeys(("blocks.0", "blocks.1"), "a value from inside it is used outside")


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(8, 8, dtype=torch.cfloat)

    def forward(self, x):
        return x + self.f(x)


@pytest.mark.parametrize("frozen", [False, True])
def test_blocks_of_complex_numbers_are_found_at_the_input_and_frozen_too(frozen):
    model = nn.Sequential(Complex(), Complex()).requires_grad_(not frozen)
    x = torch.randn(2, 8, dtype=torch.cfloat)
    assert find_blocks(model, x).names == ("0", "1")
    expected = model[1](x)
    torch.testing.assert_close(PruningPlan(("0",)).apply(model, x)(x), expected)


class Looking(nn.Sequential):
    def forward(self, x):
        return super().forward(x) * (2 if isinstance(self[0], Complex) else 1)


def test_complex_outputs_are_compared():
    with pytest.raises(RuntimeError, match="not that of skipped blocks"):
        PruningPlan(("0",)).apply(Looking(Complex(), Complex()), torch.randn(2, 8, dtype=torch.cfloat))


class Diced(Residual):
    """Draws from a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.dice = torch.Generator().manual_seed(3)

    def forward(self, x):
        return x + self.conv(x + torch.randn(x.shape, generator=self.dice))


def test_generators_of_a_network_are_left_as_found_and_known():
    model = Net(Diced(), Diced())
    before = model.blocks[1].dice.get_state()
    find_blocks(model, X)
    count_macs(model, X)
    PruningPlan(("blocks.0",)).apply(model, X)  # whose outputs are never twice the same
    assert torch.equal(model.blocks[1].dice.get_state(), before)


class Joined(nn.Module):
    """What goes around the convolution comes together with it in another way than a sum."""

    def __init__(self, join) -> None:
        super().__init__()
        self.join = join
        self.branch = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1))

    def forward(self, x):
        return self.join(x, self.branch(x))


@pytest.mark.parametrize(
    "join",
    [
        lambda x, y: torch.lerp(x, y, 0.3),
        torch.maximum,
        torch.minimum,
        lambda x, y: torch.where(x > 0, x, y),
        lambda x, y: x.index_add(1, torch.arange(8), y),
    ],
)
def test_no_plain_unit_is_taken_from_under_a_shortcut_that_is_no_sum(join):
    blocks = find_blocks(Net(Joined(join)), X)
    assert not blocks
    assert list(blocks.refused) == ["blocks.0.branch.0"]
    assert "a shortcut leads around it" in blocks.refused["blocks.0.branch.0"]


@pytest.mark.parametrize("join", [torch.mul, lambda x, y: torch.cat([x, y], 1)[:, ::2], lambda x, y: y * x.std()])
def test_gates_scales_and_branches_side_by_side_are_no_shortcuts(join):
    assert find_blocks(Net(Joined(join)), X).names == ("blocks.0.branch.0",)


class Aside(Residual):
    """Gives back a number of its own as well."""

    def forward(self, x):
        return super().forward(x), self.conv.weight.square().sum()


class Numbered(Residual):
    def forward(self, i, x):
        return super().forward(x) * 1 if i < 0 else super().forward(x)


class Paired(Residual):
    def forward(self, both):
        return super().forward(both[0])


class Own(Net):
    def __init__(self, block, run) -> None:
        super().__init__(block(), block())
        self.run = run

    def forward(self, x):
        x, total = self.stem(x), 0
        for block in self.blocks:
            x, total = self.run(block, x, total)
        return self.head(x.mean((2, 3))) + total


def with_aside(block, x, total):
    x, own = block(x)
    return x, total + own


@pytest.mark.parametrize(
    ("block", "run"),
    [(Numbered, lambda block, x, total: (block(1, x), 0)), (Paired, lambda block, x, total: (block((x, x)), 0))],
)
def test_the_tensor_goes_on_wherever_it_stands(block, run):
    model = Own(block, run).eval()
    assert len(find_blocks(model, X)) == 2
    PruningPlan(("blocks.0", "blocks.1")).apply(model, X)
    torch.testing.assert_close(model(X), model.head(model.stem(X).mean((2, 3))))


State = namedtuple("State", "x scale")


class Threaded(Residual):
    """Takes and gives all that goes on in one tuple, as blocks of a Sequential have to."""

    def forward(self, state):
        x, scale = state
        return State(x + scale * F.relu(self.norm(self.conv(x))), scale)


class Handing(Net):
    def forward(self, x):
        state = State(self.stem(x), x.mean())
        for block in self.blocks:
            state = block(state)
        return self.head(state.x.mean((2, 3)))


def test_blocks_that_hand_on_one_tuple():

    model = Handing(Threaded(), Threaded(), Threaded()).eval()
    assert [block.outputs for block in find_blocks(model, X)] == [(0, 1)] * 3
    PruningPlan(("blocks.0", "blocks.2")).apply(model, X)
    out = model.blocks[1](State(model.stem(X), X.mean()))
    torch.testing.assert_close(model(X), model.head(out.x.mean((2, 3))))


def test_a_second_value_that_is_used_keeps_the_block():
    refused = find_blocks(Own(Aside, with_aside), X).refused
    assert refused == dict.fromkeys(("blocks.0", "blocks.1"), "a second value that it gives back is used")


def test_a_layer_that_two_blocks_share_stays_with_the_other():
    model = Net(Residual(), Residual(), Residual())
    model.blocks[1].conv = model.blocks[0].conv
    blocks = find_blocks(model, X)
    assert [block.params for block in blocks] == [16, 16, 8 * 8 * 9 + 8 + 16]
    PruningPlan(("blocks.0", "blocks.2")).apply(model, X)


@pytest.mark.parametrize(
    "after", [lambda x: x.transpose(2, 3), lambda x: x.roll(1, 2), lambda x: x.unflatten(1, (2, 4)).mT.flatten(1, 2)]
)
def test_an_input_in_another_order_is_no_identity(after):
    class Turned(Residual):
        def forward(self, x):
            return after(super().forward(x)).reshape(x.shape)

    blocks = find_blocks(Net(Turned(), Residual()), X)
    assert blocks.names == ("blocks.1",)
    assert blocks.refused == {"blocks.0": "it gives its input back in another order"}


def test_ignored_layers_keep_a_plain_unit_by_its_norm():
    parts = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()]
    parts += [nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()] * 1
    parts += [nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 4)]
    model = nn.Sequential(*parts)
    for kept, gone in ((4, "6"), (7, "3")):
        pruner = ModularityPruner(model, X, [], "l1_norm", blocks=1, ignored_layers=[model[kept]])
        assert pruner.plan().remove == (gone,)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("layer", "gates"), [(nn.LSTM, 4), (nn.GRU, 3)])
def test_recurrent_layers_count(layer, gates, bias):
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer(8, 8, bias=bias, batch_first=True)

        def forward(self, x):
            return self.layer(x)[0]

    assert count_macs(Recurrent(), torch.randn(3, 5, 8)) == 5 * gates * (8 * 8 + 8 * 8)


def test_the_first_point_is_a_layer_with_a_row_for_each_sample():
    class Placed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.place, self.embed, self.head = nn.Embedding(6, 8), nn.Embedding(20, 8), nn.Linear(8, 4)
            self.layers = nn.Sequential(*(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(2)))

        def forward(self, ids):
            return self.head(self.layers(self.place(torch.arange(6)) + self.embed(ids)).mean(1))

    loader = [(torch.randint(20, (8, 6)), torch.arange(8) % 4)]
    curve = modularity_curve(Placed(), loader, samples=8, repeats=1)
    assert curve.layers == ("embed", "layers.0", "layers.1")

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.act = nn.Parameter(torch.randn(3, 3)), nn.ReLU()

        def forward(self, x):
            return x + self.act(F.linear(x, self.weight))

    with pytest.raises(ValueError, match="Sequential has no layer with parameters that runs once"):
        modularity_curve(nn.Sequential(Bare(), Bare()), [(torch.randn(8, 3), torch.arange(8) % 4)], samples=8)


def test_what_a_pass_assigns_anew_comes_back():
    class Counting(Residual):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            self.seen = self.seen + len(x)
            return super().forward(x)

    model = Net(Counting(), Counting())
    buffer = model.blocks[0].seen
    assert len(find_blocks(model, X)) == 2
    assert model.blocks[0].seen is buffer
    assert buffer.item() == 0


def test_named_tuples_as_inputs():
    pair = namedtuple("pair", "images scale")

    class Scaled(Net):
        def forward(self, given):
            return super().forward(given.images * given.scale)

    assert len(find_blocks(Scaled(Residual(), Residual()), (pair(X, 2.0),))) == 2


def test_a_network_that_cannot_be_copied_is_named(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 8, 1), Residual())
    save(model, tmp_path / "m.safetensors")
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(model[0])(X)
    with pytest.raises(ValueError, match="the Sequential given cannot be copied"):
        load(tmp_path / "m.safetensors", model)
    with pytest.raises(ValueError, match="the Sequential given cannot be copied"):
        ModularityPruner(model, X, [], "l1_norm", blocks=1, iterative_steps=2).plan()


def test_a_criterion_is_an_instance():
    with pytest.raises(ValueError, match=r"criterion Ablation is a class: give an instance, Ablation\(\)"):
        ModularityPruner(Net(Residual()), X, [], Ablation, blocks=1)


class After(Residual):
    """An activation after the sum, as in a ResNet."""

    def forward(self, x):
        return F.relu(super().forward(x))


def test_neighbours_go_where_only_the_first_makes_the_input_of_the_second_positive():
    model = Net(After(), After(), After())  # nothing is rectified before the first
    blocks = find_blocks(model, X)
    assert [block.exact for block in blocks] == [False, True, True]
    for names in (("blocks.0", "blocks.1"), ("blocks.1", "blocks.2"), blocks.names):
        pruned = PruningPlan(names).apply(copy.deepcopy(model), X)
        assert removed_blocks(pruned).remove == names
    bare = PruningPlan(blocks.names).apply(model, X)
    torch.testing.assert_close(bare(X), model.head(model.stem(X).mean((2, 3))))


@dataclass
class Answer:
    logits: torch.Tensor


class Answering(Net):
    def forward(self, x):
        return Answer(super().forward(x))


def test_what_comes_in_a_dataclass_is_measured_trained_and_cut():
    torch.manual_seed(0)
    model, batches = Answering(Deep(), Deep()), ImageLoader(digits(True).subset(torch.arange(100)), 50)
    model.head = nn.Linear(8, 10)
    original, x = copy.deepcopy(model), next(iter(batches))[0][:2]
    ModularityPruner(model, x, batches, Ablation(samples=100), blocks=1, width=0.25).step()
    finetune(model, batches, teacher=original, epochs=1, progress=False)
    report = compare(original, model, x, batches)
    assert report.pruned.accuracy.samples == 100
    assert report.params_removed > 0.4


class Deep(Residual):
    """With channels inside."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(8, 16, 3, padding=1)
        self.conv = nn.Conv2d(16, 8, 3, padding=1)

    def forward(self, x):
        return x + self.norm(self.conv(F.relu(self.inner(x))))


def test_scales_of_norms_are_read_without_a_step_of_spectral_norm():
    model = Net(Residual(), Residual()).train()
    for block in model.blocks:
        block.conv = nn.utils.parametrizations.spectral_norm(block.conv)
    before = copy.deepcopy(model.state_dict())
    BnScale()(model, find_blocks(model, X))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_some_of_the_blocks_are_blocks():
    blocks = find_blocks(Net(Residual(), Residual(), Residual()), X)
    assert blocks[1:].names == blocks.names[1:]
    assert blocks[-1] == tuple(blocks)[-1]


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: find_blocks(Net(Residual()), X[:0]), "hold no sample: give at least one"),
        (lambda: count_macs(Net(Residual()), X[:0]), "hold no sample: give at least one"),
        (lambda: ImageLoader(digits(True), 0), "batch_size=0: at least 1"),
        (lambda: CifarVGG(12), "depth=12: one of 11, 13, 16, 19"),
    ],
)
def test_what_would_divide_by_zero_or_miss_a_key_is_named(act, message):
    with pytest.raises(ValueError, match=message):
        act()


def test_a_block_in_a_list_of_lists_is_refused():
    model = Net(Residual(), Residual())
    model.stages = [("first", [(0, model.blocks[0])])]
    blocks = find_blocks(model, X)
    assert blocks.names == ("blocks.1",)
    assert "the list stages holds it too" in blocks.refused["blocks.0"]


Given = namedtuple("Given", "hidden attention")


def test_a_named_tuple_is_given_back_only_in_the_place_of_one():
    class Naming(Residual):
        def forward(self, x):
            return Given(super().forward(x), None)

    class Reading(Net):
        def forward(self, x):
            x = self.stem(x)
            for block in self.blocks:
                x = block(x).hidden
            return self.head(x.mean((2, 3)))

    assert find_blocks(Reading(Naming()), X).refused == {
        "blocks.0": "it gives back a Given, neither a tensor nor a tuple"
    }


@pytest.mark.parametrize(
    "batch",
    [{"x": X, "label": torch.zeros(2)}, ((X, X), torch.zeros(2).long())],
)
def test_a_batch_that_the_model_does_not_take_is_told(batch):
    model = Net(Residual())
    for work in (lambda: evaluate(model, [batch]), lambda: modularity_curve(model, [batch], 1, samples=2)):
        with pytest.raises(RuntimeError, match=r"Net (fails on its inputs with TypeError|does not run)"):
            work()
