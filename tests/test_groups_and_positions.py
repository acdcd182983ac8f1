"""Learned groups, and positional normalization with its moment shortcut."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from normswap import NormswapError, apply_recipe, convert, exactness, plan_convert, read
from normswap.norms.layer import ChannelLayerNorm
from normswap.norms.learned_groups import LearnedGroupNorm2d, harden
from normswap.norms.positional import PositionalNorm1d, PositionalNorm2d, inject
from tests.support import distance, randomise, sample
from tests.test_layers import EPS, affine, whitened

X = sample(3, 8, 4, 5)


class TestPositional:
    """arXiv 1907.04312, equations 1 to 3."""

    def test_formula_and_moments(self) -> None:
        module = randomise(PositionalNorm2d(8).double())
        wanted = affine(whitened(X, (1,)), module)
        for training in (True, False):
            assert distance(module.train(training)(X), wanted) < 1e-10
        out, mean, deviation = module.extract(X)
        assert distance(out, wanted) < 1e-10
        assert distance(mean, X.mean(1, keepdim=True)) < 1e-12
        assert distance(deviation, torch.sqrt(X.var(1, keepdim=True, correction=0) + EPS)) < 1e-12

    def test_the_shortcut_puts_the_moments_back(self) -> None:
        module = PositionalNorm2d(8, affine=False).double()
        assert distance(inject(*module.extract(X)), X) < 1e-12
        single = PositionalNorm1d(8, affine=False).double()
        assert distance(inject(*single.extract(X[..., 0, 0])), X[..., 0, 0]) < 1e-12
        x = X[:1, :, :2, :2].clone().requires_grad_()
        assert torch.autograd.gradcheck(module.extract, (x,))

    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
    def test_large_means(self, layout: torch.memory_format) -> None:
        x = (sample(3, 64, 10, 10) * 1e-2 + 1e4).float().to(memory_format=layout)
        module = PositionalNorm2d(64, eps=1e-9)
        wanted = whitened(x.double(), (1,), 1e-9)
        assert distance(module(x), wanted) < 1e-5
        out, _, deviation = module.extract(x)
        assert distance(out, wanted) < 1e-5
        assert distance(deviation, x.double().std(1, correction=0, keepdim=True)) < 1e-5

    def test_large_means_compiled(self) -> None:
        x = (sample(3, 64, 4, 4) * 1e-2 + 1e4).float()
        for layer in (PositionalNorm2d(64, eps=1e-9), ChannelLayerNorm(64, eps=1e-9)):
            compiled = torch.compile(layer, backend="eager", fullgraph=True)
            assert distance(compiled(x), whitened(x.double(), (1,), 1e-9)) < 1e-5
        torch.compiler.reset()

    def test_it_is_layer_normalization_over_channels(self) -> None:
        layer = randomise(ChannelLayerNorm(8).double())
        plan = plan_convert(nn.Sequential(layer), "positional")
        assert plan.changes[0].exactness == "exact"
        assert distance(plan.apply()(X), layer(X)) < 1e-12
        back = convert(plan.apply(), "layer")
        assert type(back[0]) is ChannelLayerNorm
        assert torch.equal(back(X), layer(X))
        assert (
            plan_convert(nn.Sequential(nn.LayerNorm(8)), "positional").skips[0].reason.startswith("its channels are on")
        )
        assert plan_convert(nn.Sequential(nn.BatchNorm2d(8)), "positional").changes[0].exactness == "approximate"


class TestLearnedGroups:
    """Group normalization by shares, and by a choice."""

    def test_formula(self) -> None:
        module = randomise(LearnedGroupNorm2d(8, groups=4, temperature=0.5).double())
        shares = (module.logits / 0.5).softmax(1)
        mean, var = torch.zeros(3, 8, 1, 1).double(), torch.zeros(3, 8, 1, 1).double()
        for group in range(4):
            share = shares[:, group, None, None]
            own = (share * X).mean((1, 2, 3), keepdim=True) / share.mean()
            spread = (share * (X - own).square()).mean((1, 2, 3), keepdim=True) / share.mean()
            mean, var = mean + share * own, var + share * spread
        wanted = affine((X - mean) / torch.sqrt(var + EPS), module)
        for training in (True, False):
            assert distance(module.train(training)(X), wanted) < 1e-10

    def test_hardened_it_is_group_normalization_of_the_channels_chosen(self) -> None:
        module: Any = randomise(LearnedGroupNorm2d(8, groups=2).double())
        module.logits.data[:, 0] = torch.tensor([1.0, -1, 1, -1, -1, 1, -1, -1])
        module.logits.data[:, 1] = 0.0
        chosen = module.logits.argmax(1)
        assert harden(nn.Sequential(module, nn.ReLU())) == 1
        assert not module.logits.requires_grad
        wanted = torch.empty_like(X)
        for group in (0, 1):
            wanted[:, chosen == group] = whitened(X[:, chosen == group], (1, 2, 3))
        assert sorted((chosen == group).sum().item() for group in (0, 1)) == [3, 5]
        assert distance(module(X), affine(wanted, module)) < 1e-10
        other = LearnedGroupNorm2d(8, groups=2).double()
        other.load_state_dict(module.state_dict())
        assert torch.equal(other(X), module(X)), "the choice is in the state"
        module.logits.data[:, 1] = -100.0  # nobody chooses the second group
        harden(module)
        assert distance(module(X), affine(whitened(X, (1, 2, 3)), module)) < 1e-10

    def test_a_choice_made_when_cold_is_the_same_when_loaded_warm(self) -> None:
        module = randomise(LearnedGroupNorm2d(8, groups=4).double())
        module.temperature = 0.1
        module.harden()
        other = LearnedGroupNorm2d(8, groups=4).double()
        other.load_state_dict(module.state_dict())
        assert distance(other(X), module(X)) < 1e-12

    def test_channels_learn_their_group(self) -> None:
        """Channels of two kinds, interleaved; the loss asks that each keep what sets it off within its kind."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(8, 8, 3, 3, generator=generator, dtype=torch.float64)
        level = torch.randn(2, 8, 1, 1, 1, generator=generator, dtype=torch.float64)
        x = x + 5 * torch.cat([level[index % 2] for index in range(8)], 1)
        wanted = torch.empty_like(x)
        for start in (0, 1):
            wanted[:, start::2] = whitened(x[:, start::2], (1, 2, 3))
        module = LearnedGroupNorm2d(8, groups=2, gap=0.1).double()
        optimizer = torch.optim.Adam([module.logits], lr=0.3)
        for _ in range(60):
            optimizer.zero_grad()
            (module(x) - wanted).square().mean().backward()
            optimizer.step()
        harden(module)
        assert distance(module(x), wanted) < 1e-10

    def test_conversion(self) -> None:
        group = randomise(nn.GroupNorm(4, 8).double())
        plan = plan_convert(nn.Sequential(group), "learned_groups")
        assert plan.changes[0].exactness == "approximate"
        made = plan.apply()
        assert tuple(made[0].logits.shape) == (8, 4)
        assert distance(made(X), group(X)) > 1e-3
        harden(made)
        assert distance(made(X), group(X)) < 1e-10
        back = plan_convert(made, "group", groups=4)
        assert (back.changes[0].exactness, back.changes[0].lost) == ("exact", ("learned groups",))
        assert torch.equal(back.apply()(X), group(X))
        preserved = plan_convert(nn.Sequential(group), "learned_groups", init="preserve")
        assert preserved.changes[0].exactness == "exact"
        assert distance(preserved.apply()(X), group(X)) < 1e-10
        batch = plan_convert(nn.Sequential(nn.BatchNorm2d(8)), "learned_groups", init="preserve")
        assert "cannot compute the same" in batch.skips[0].reason
        made[0].logits.data = made[0].logits.data[[1, 0, 7, 2, 3, 4, 5, 6]]  # hard, but in another order
        assert exactness(read(made[0]), read(back.apply()[0])) == "approximate"

    def test_recipe_and_options(self) -> None:
        model = nn.Sequential(nn.BatchNorm2d(8))
        plan = plan_convert(model, "learned_groups", groups=2, temperature=0.5)
        made, again = plan.apply(), apply_recipe(model, json.loads(json.dumps(plan.recipe)))
        again.load_state_dict(made.state_dict(), strict=True)
        assert torch.equal(again(X.float()), made(X.float()))
        other = convert(convert(made, "evonorm_s0", groups=2), "learned_groups")
        assert other[0].temperature == 1.0
        with pytest.raises(NormswapError, match="temperature=0: it must be a number above 0"):
            plan_convert(model, "learned_groups", temperature=0)
        with pytest.raises(NormswapError, match="gap=-1"):
            LearnedGroupNorm2d(8, gap=-1)
        with pytest.raises(NormswapError, match="groups=3 does not divide 8 channels"):
            LearnedGroupNorm2d(8, groups=3)
