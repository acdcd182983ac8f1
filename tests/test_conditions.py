"""Layers that need a style, a label or a domain: their papers' formulas, and how they are told."""

from __future__ import annotations

import copy
import json
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normswap import NormswapError, apply_recipe, convert, plan_convert, plan_fold
from normswap.norms.adaptive_instance import AdaptiveInstanceNorm, AdaptiveInstanceNorm1d, AdaptiveInstanceNorm2d
from normswap.norms.condition import Conditioned, NeedsCondition, condition
from normswap.norms.conditional import ConditionalNorm1d, ConditionalNorm2d
from normswap.norms.domain import DomainBatchNorm, DomainBatchNorm2d
from normswap.norms.tracked import batch_average
from normswap.onnx.export import export
from tests.support import distance, randomise, sample
from tests.test_export import run
from tests.test_layers import EPS, channel, whitened

LABEL = torch.tensor([2, 0, 2, 1])
X = sample(4, 8, 4, 5)
STYLE = sample(4, 8, 3, 7, seed=4) * 2 + 1


def rows(tensor: Tensor, choice: Tensor) -> Tensor:
    return tensor.detach()[choice][..., None, None]


def bent(module: nn.Module) -> nn.Module:
    return randomise(module.double())


class TestAdaptive:
    """arXiv 1703.06868, equation 8."""

    def test_formula_with_a_map_and_with_moments(self) -> None:
        module = AdaptiveInstanceNorm2d(8)
        mean = STYLE.mean((2, 3))
        deviation = torch.sqrt(STYLE.var((2, 3), correction=0) + EPS)
        wanted = whitened(X, (2, 3)) * deviation[..., None, None] + mean[..., None, None]
        for style in (STYLE, (mean, deviation)):
            for training in (True, False):
                with condition(module.train(training), style=style):
                    assert distance(module(X), wanted) < 1e-10
        with condition(module, style=STYLE[:1]):
            out = module(X)
        assert distance(out.mean((2, 3)), mean[:1].expand(4, -1)) < 1e-10
        assert not module.state_dict()

    def test_gradients_flow_to_the_style(self) -> None:
        module, style = AdaptiveInstanceNorm2d(8), STYLE.clone().requires_grad_()

        def call(x: Tensor, style: Tensor) -> Tensor:
            with condition(module, style=style):
                return module(x)

        assert torch.autograd.gradcheck(call, (X[:1, :, :2, :2].clone().requires_grad_(), style[:1, :, :2, :2]))

    def test_large_means(self) -> None:
        x = (sample(3, 8, 30, 30) * 1e-2 + 1e4).float()
        style = (sample(3, 8, 30, 30, seed=3) * 1e-2 + 1e4).float()
        module = AdaptiveInstanceNorm2d(8, eps=1e-9)
        with condition(module, style=style):
            out = module(x)
        with condition(module, style=style.double()):
            wanted = module(x.double())
        assert distance(out - 1e4, wanted - 1e4) < 0.02, "float32 has steps of 1e-3 there, a tenth of the deviation"
        with condition(module, style=(torch.zeros(8), torch.ones(8))):
            assert distance(module(x), module(x.double())) < 1e-5

    def test_conversion_says_what_is_lost(self) -> None:
        model = nn.Sequential(nn.InstanceNorm2d(8, affine=True))
        change = plan_convert(model, "adaptive_instance").changes[0]
        assert change.lost == ("weight", "bias")
        assert change.exactness == "retrain"
        assert any("needs a style" in note for note in change.notes)
        back = convert(convert(model, "adaptive_instance"), "instance")
        assert type(back[0]) is nn.InstanceNorm2d
        plan = plan_convert(nn.Sequential(nn.BatchNorm1d(8)), "adaptive_instance")
        assert "may be (N, C)" in plan.skips[0].reason
        assert "cannot compute the same" in plan_convert(model, "adaptive_instance", init="preserve").skips[0].reason


class TestConditional:
    """arXiv 1610.07629, equation 5, and arXiv 1707.00683, section 3.2, with a table."""

    @pytest.mark.parametrize("over", ["batch", "instance"])
    def test_formula_and_statistics(self, over: Any) -> None:
        module = bent(ConditionalNorm2d(8, momentum=0.2, classes=3, over=over))
        plain = whitened(X, (0, 2, 3) if over == "batch" else (2, 3))
        old = {name: buffer.clone() for name, buffer in module.named_buffers()}
        with condition(module, label=LABEL):
            assert distance(module(X), plain * rows(module.weight, LABEL) + rows(module.bias, LABEL)) < 1e-10
        if over == "instance":
            assert set(module.state_dict()) == {"weight", "bias"}
            return
        assert distance(module.running_mean, 0.8 * old["running_mean"] + 0.2 * X.mean((0, 2, 3))) < 1e-10
        with condition(module.eval(), label=1):
            past = (X - channel(module.running_mean, X)) / torch.sqrt(channel(module.running_var, X) + EPS)
            wanted = past * channel(module.weight[1], X) + channel(module.bias[1], X)
            assert distance(module(X), wanted) < 1e-10

    def test_labels_are_blended(self) -> None:
        module = bent(ConditionalNorm2d(8, classes=3, over="instance"))
        share = torch.tensor([0.5, 0.0, 0.5], dtype=torch.float64)
        weight, bias = ((t[0] + t[2]) / 2 for t in (module.weight, module.bias))
        with condition(module, label=share):
            assert distance(module(X), whitened(X, (2, 3)) * channel(weight, X) + channel(bias, X)) < 1e-10

    def test_autocast_rounds_no_blend(self) -> None:
        module, x = randomise(ConditionalNorm2d(8, classes=3, over="instance")), X.float()
        with condition(module, label=torch.tensor([0.1, 0.2, 0.7])):
            wanted = module(x)
            with torch.autocast("cpu", torch.bfloat16):
                assert distance(module(x), wanted) < 1e-6

    def test_there_and_back(self) -> None:
        batch = bent(nn.BatchNorm2d(8)).eval()
        plan = plan_convert(nn.Sequential(batch), "conditional", classes=3)
        assert plan.changes[0].exactness == "exact"
        model = plan.apply()
        with condition(model, label=LABEL):
            assert distance(model(X), batch(X)) < 1e-12
        back = plan_convert(model, "batch")
        assert back.changes[0].exactness == "exact"
        assert back.changes[0].lost == ("an affine for each label",)
        assert distance(back.apply()(X), batch(X)) < 1e-12
        model[0].weight.data[1] += 1
        back = plan_convert(model, "batch")
        assert back.changes[0].exactness == "approximate"
        assert distance(back.apply()[0].weight, model[0].weight.mean(0)) < 1e-12
        assert "cannot compute the same" in plan_convert(model, "batch", init="preserve").skips[0].reason
        assert plan_convert(model, "conditional").skips[0].reason.startswith("it already is")
        assert plan_convert(model, "conditional", classes=3).skips[0].reason.startswith("it already is")
        assert plan_convert(model, "conditional", classes=2).changes[0].lost == ("an affine for each label",)
        instance = convert(nn.Sequential(nn.InstanceNorm2d(8, affine=True)), "conditional")
        assert instance[0].over == "instance"

    def test_its_affine_is_not_folded_forward(self) -> None:
        model = nn.Sequential(bent(ConditionalNorm2d(8, over="instance")), nn.Conv2d(8, 8, 1).double()).eval()
        plan = plan_fold(model, affine=True)
        assert not plan.changes
        assert "not the same for every sample" in plan.skips[0].reason

    def test_an_affine_that_is_the_same_for_all_folds(self) -> None:
        model = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)).double().eval()
        conditional = convert(randomise(model), "conditional")
        assert distance(plan_fold(conditional).apply()(X), model(X)) < 1e-10
        conditional[1].bias.data[0] += 1
        assert not plan_fold(conditional).changes

    def test_misuse(self) -> None:
        with pytest.raises(NormswapError, match="classes=0: it must be a whole number of at least 1"):
            ConditionalNorm2d(8, classes=0)
        with pytest.raises(NormswapError, match="over='layer': it is 'batch' or 'instance'"):
            ConditionalNorm2d(8, over="layer")  # type: ignore[arg-type]
        module = ConditionalNorm1d(8, over="instance")
        with condition(module, label=0), pytest.raises(ValueError, match="at least 3D"):
            module(torch.zeros(4, 8))


class TestDomain:
    """arXiv 1906.03950, equations 2 to 6."""

    def module(self, **options: Any) -> Any:
        return bent(DomainBatchNorm2d(8, domains=3, **options))

    def test_formula_and_statistics_of_each_domain(self) -> None:
        module = self.module(momentum=0.2)
        means, variances = module.running_mean.clone(), module.running_var.clone()
        wanted = torch.empty_like(X)
        present = LABEL[:3]  # of domains 2 and 0
        for index in (0, 2):
            part = X[:3][present == index]
            wanted[:3][present == index] = whitened(part, (0, 2, 3)) * channel(module.weight[index], X) + channel(
                module.bias[index], X
            )
            means[index] = 0.8 * means[index] + 0.2 * part.mean((0, 2, 3))
            variances[index] = 0.8 * variances[index] + 0.2 * part.var((0, 2, 3), correction=0)
        with condition(module, domain=present):
            assert distance(module(X[:3]), wanted[:3]) < 1e-10
        assert distance(module.running_mean, means) < 1e-10
        assert distance(module.running_var, variances) < 1e-10
        assert module.num_batches_tracked.tolist() == [1, 0, 1]
        past = (X - rows(means, LABEL)) / torch.sqrt(rows(variances, LABEL) + EPS)
        with condition(module.eval(), domain=LABEL):
            assert distance(module(X), past * rows(module.weight, LABEL) + rows(module.bias, LABEL)) < 1e-10

    def test_a_batch_of_one_domain_is_batch_normalization(self) -> None:
        module = self.module(momentum=None)
        for x in (X, 2 * X):
            with condition(module, domain=1):
                wanted = whitened(x, (0, 2, 3)) * channel(module.weight[1], x) + channel(module.bias[1], x)
                assert distance(module(x), wanted) < 1e-10
        assert distance(module.running_mean[1], 1.5 * X.mean((0, 2, 3))) < 1e-10, "a cumulative mean"
        assert module.num_batches_tracked.tolist() == [0, 2, 0]

    def test_gradcheck_of_mixed_domains(self) -> None:
        module = self.module()
        names = ("weight", "bias")

        def call(x: Tensor, *tensors: Tensor) -> Tensor:
            subject = copy.deepcopy(module)
            with condition(subject, domain=LABEL[:3]):
                return torch.func.functional_call(subject, dict(zip(names, tensors, strict=True)), (x,))

        x = X[:3, :, :2, :2].clone().requires_grad_()
        assert torch.autograd.gradcheck(call, (x, module.weight, module.bias))

    def test_batch_average_leaves_a_domain_that_did_not_run(self) -> None:
        module = self.module().eval()
        before = copy.deepcopy(module.state_dict())
        with batch_average(module), condition(module, domain=2):
            module(X)
            module(3 * X)
        assert distance(module.running_mean[2], 2 * X.mean((0, 2, 3))) < 1e-10
        assert module.num_batches_tracked.tolist() == [0, 0, 2]
        assert all(torch.equal(module.state_dict()[name][:2], value[:2]) for name, value in before.items())

    def test_there_and_back(self) -> None:
        batch = bent(nn.BatchNorm2d(8)).eval()
        batch.num_batches_tracked.fill_(7)
        plan = plan_convert(nn.Sequential(batch), "domain", domains=3)
        assert plan.changes[0].exactness == "exact"
        model = plan.apply()
        back = plan_convert(model, "batch")
        assert back.changes[0].exactness == "exact"
        restored = back.apply()[0].state_dict()
        assert all(torch.equal(value, restored[name]) for name, value in batch.state_dict().items())
        randomise(model)
        back = plan_convert(model, "batch")
        assert (back.changes[0].exactness, back.changes[0].lost) == (
            "approximate", ("an affine and statistics for each domain",)
        )  # fmt: skip
        made, own = back.apply()[0], model[0]
        assert distance(made.running_mean, own.running_mean.mean(0)) < 1e-12
        second = (own.running_var + own.running_mean.square()).mean(0)
        assert distance(made.running_var, second - own.running_mean.mean(0).square()) < 1e-12
        assert (
            plan_convert(model, "frozen").skips[0].reason
            == "domain is no fixed affine, whatever its running statistics"
        )


KINDS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "adaptive_instance": ("style", STYLE, {}),
    "conditional": ("label", LABEL, {"classes": 3}),
    "domain": ("domain", LABEL, {"domains": 3}),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu()


@pytest.mark.parametrize("kind", KINDS)
class TestEvery:
    def made(self, kind: str) -> nn.Module:
        return randomise(convert(Net(), kind, **KINDS[kind][2]).double()).eval()

    def test_recipe_and_state_dict(self, kind: str) -> None:
        need, value, options = KINDS[kind]
        plan = plan_convert(Net(), kind, **options)
        model = self.made(kind)
        again = apply_recipe(Net(), json.loads(json.dumps(plan.recipe))).double().eval()
        again.load_state_dict(model.state_dict(), strict=True)
        outputs = []
        for each in (model, again):
            with condition(each, **{need: value}):
                outputs.append(each(X))
        assert torch.equal(*outputs)

    def test_a_layer_that_is_reset_as_itself(self, kind: str) -> None:
        model, wanted = self.made(kind), convert(Net(), kind, **KINDS[kind][2]).norm.state_dict()
        reset = convert(model, kind, init="reset").norm
        assert all(torch.equal(value, wanted[name].to(value.dtype)) for name, value in reset.state_dict().items())
        assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in reset.parameters())
        still = convert(model.requires_grad_(False), kind, init="reset").norm
        assert not any(p.requires_grad for p in still.parameters())

    def test_nothing_given(self, kind: str) -> None:
        need = KINDS[kind][0]
        with pytest.raises(
            NormswapError, match=rf"needs a {need} and was given none.*condition\(model, {need}=\.\.\.\)"
        ):
            self.made(kind)(X)

    def test_given_for_another_number_of_samples(self, kind: str) -> None:
        need, value, _ = KINDS[kind]
        model = self.made(kind)
        with (
            condition(model, **{need: value[:3]}),
            pytest.raises(NormswapError, match="for 3 samples, the input has 4"),
        ):
            model(X)


class All(nn.Module):
    """Every layer on the same input, with its condition."""

    def __init__(self) -> None:
        super().__init__()
        made = {kind: randomise(convert(nn.BatchNorm2d(8), kind, **KINDS[kind][2])) for kind in KINDS}
        self.layers = nn.ModuleList(Conditioned(layer, KINDS[kind][0]) for kind, layer in made.items())

    def forward(self, x: Tensor, *values: Tensor) -> list[Tensor]:
        return [layer(x, value) for layer, value in zip(self.layers, values, strict=True)]


def test_onnx_runtime_computes_the_same(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    model = All().eval()
    given = [X.float(), *(v.float() if v.is_floating_point() else v for _, v, _ in KINDS.values())]
    path = export(model, tmp_path / "model.onnx", tuple(given), dynamic=True)
    for take in (slice(4), slice(1, 3)):
        part = [each[take] for each in given]
        for ours, wanted in zip(run(path, *part), model(*part), strict=True):
            assert distance(torch.from_numpy(ours), wanted) < 1e-5


def test_compiled_without_a_graph_break() -> None:
    model = All().double()
    other = copy.deepcopy(model)
    values = [value for _, value, _ in KINDS.values()]
    x, y = (X.clone().requires_grad_() for _ in range(2))
    outs, wanted = torch.compile(other, backend="aot_eager", fullgraph=True)(x, *values), model(y, *values)
    assert all(distance(*pair) < 1e-12 for pair in zip(outs, wanted, strict=True))
    ours, theirs = (torch.autograd.grad(sum(o.pow(3).sum() for o in os), i)[0] for os, i in ((outs, x), (wanted, y)))
    assert distance(ours, theirs) < 1e-10
    assert all(distance(a.double(), b.double()) < 1e-12 for a, b in zip(model.buffers(), other.buffers(), strict=True))
    inner = other.eval().layers[1].model
    compiled = torch.compile(inner, backend="aot_eager", fullgraph=True)
    for label in (LABEL, LABEL.flip(0)):
        with condition(inner, label=label):
            assert distance(compiled(X), inner(X)) < 1e-12
    torch.compiler.reset()


class TestCondition:
    def test_it_lasts_as_long_as_the_block_in_copies_too(self) -> None:
        module = ConditionalNorm2d(8).double()
        with condition(module, label=0):
            twin, saved = copy.deepcopy(module), pickle.loads(pickle.dumps(module))
            assert torch.equal(twin(X), module(X))
            with condition(module, label=1):
                assert module.condition().tolist() == [1]
            assert module.condition().tolist() == [0]
            with pytest.raises(NormswapError, match="given none"):
                saved(X)
        for each in (module, twin):
            with pytest.raises(NormswapError, match="given none"):
                each(X)

    def test_an_error_inside_takes_it_away(self) -> None:
        module = ConditionalNorm2d(8)
        with pytest.raises(ZeroDivisionError), condition(module, label=0):
            raise ZeroDivisionError
        assert module.given is None

    def test_another_thread_gets_an_error_and_not_this_ones_condition(self) -> None:
        module = DomainBatchNorm2d(8).double()
        found: list[BaseException] = []

        def work(enter: bool) -> None:
            try:
                if enter:
                    with condition(module, domain=1):
                        module(X)
                else:
                    module(X)
            except NormswapError as error:
                found.append(error)

        with condition(module, domain=0):
            for enter in (True, False):
                thread = threading.Thread(target=work, args=(enter,))
                thread.start()
                thread.join()
        assert ["thread" in str(error) for error in found] == [True, True]
        thread = threading.Thread(target=work, args=(True,))
        thread.start()
        thread.join()
        assert len(found) == 2

    def test_each_layer_gets_its_own_by_name(self) -> None:
        model = nn.Sequential(AdaptiveInstanceNorm(8), nn.Conv2d(8, 4, 1).double(), AdaptiveInstanceNorm(4))
        styles = {"0": (torch.zeros(8), torch.ones(8)), "2": (torch.ones(4), 2 * torch.ones(4))}
        with condition(model, style=styles):
            assert distance(model(X).mean((0, 2, 3)), torch.ones(4)) < 1e-6
        with pytest.raises(NormswapError, match=r"0: a style's mean of shape \(1, 4\): it is \(N, 8\)"):
            condition(model, style=(torch.ones(4), torch.ones(4))).__enter__()
        with pytest.raises(NormswapError, match="no layer '1' needs a style; those that do: 0, 2"):
            condition(model, style={"1": STYLE}).__enter__()
        with condition(model, style={"0": styles["0"]}), pytest.raises(NormswapError, match="given none"):
            model(X)

    @pytest.mark.parametrize(
        ("given", "words"),
        [
            ({}, "no condition: give style="),
            ({"domain": 0}, "no layer of the model needs a domain"),
            ({"label": 3}, "label 3 of 3, counted from 0: build the layers with classes=4"),
            ({"label": torch.tensor([0, -1])}, "label -1 of 3"),
            ({"label": True}, "label=True: it is a whole number"),
            ({"label": torch.zeros(2, 2, dtype=torch.long)}, "it is a whole number"),
            ({"label": torch.zeros(4)}, r"weights of shape \(4,\): they are \(N, 3\)"),
        ],
        ids=str,
    )
    def test_misuse(self, given: dict[str, Any], words: str) -> None:
        with pytest.raises(NormswapError, match=words):
            condition(ConditionalNorm2d(8, classes=3), **given).__enter__()

    @pytest.mark.parametrize(
        "style", [torch.zeros(2, 8), torch.zeros(2, 7, 3), torch.zeros(0, 8, 3), "map", (1, 2)], ids=str
    )
    def test_no_style(self, style: Any) -> None:
        with pytest.raises(NormswapError, match="style"):
            condition(AdaptiveInstanceNorm1d(8), style=style).__enter__()

    def test_checkpointing(self) -> None:
        module = bent(DomainBatchNorm(8)).eval()
        x = X.clone().requires_grad_()
        with condition(module, domain=1):
            torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False).sum().backward()
        assert isinstance(module, NeedsCondition)
        assert x.grad is not None
