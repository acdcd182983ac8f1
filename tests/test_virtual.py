"""Virtual batch normalization (arXiv 1606.03498, section 3.5): a reference batch, and every sample with it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from normswap import NormswapError, convert, plan_convert
from normswap.norms.virtual import VirtualBatchNorm1d, VirtualBatchNorm2d, reference_batch
from tests.support import distance, randomise, sample
from tests.test_layers import affine, whitened

REFERENCE, X = sample(3, 8, 4, 5), sample(4, 8, 4, 5, seed=2)


@pytest.mark.parametrize("training", [True, False])
def test_a_sample_is_normalized_as_if_it_were_the_last_of_the_reference_batch(training: bool) -> None:
    module = randomise(VirtualBatchNorm2d(8).double()).train(training)
    with reference_batch(module):
        assert distance(module(REFERENCE), affine(whitened(REFERENCE, (0, 2, 3)), module)) < 1e-10
    assert distance(module.running_mean, REFERENCE.mean((0, 2, 3))) < 1e-12
    assert distance(module.running_var, REFERENCE.var((0, 2, 3), correction=0)) < 1e-12
    assert (int(module.reference_size), int(module.num_batches_tracked)) == (3, 1)
    kept = copy.deepcopy(module.state_dict())
    wanted = torch.cat([affine(whitened(torch.cat([REFERENCE, x[None]]), (0, 2, 3)), module)[3:] for x in X])
    assert distance(module(X), wanted) < 1e-10
    assert all(torch.equal(value, kept[name]) for name, value in module.state_dict().items())


def test_on_single_values() -> None:
    module = randomise(VirtualBatchNorm1d(8).double())
    with reference_batch(module):
        module(REFERENCE[..., 0, 0])
    both = torch.cat([REFERENCE[..., 0, 0], X[:1, :, 0, 0]])
    assert distance(module(X[:1, :, 0, 0]), affine(whitened(both, (0,)), module)[3:]) < 1e-10


def test_the_reference_goes_through_the_whole_model() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4))
    model = convert(randomise(model.double()), "virtual").eval()
    with reference_batch(model), torch.no_grad():
        model(REFERENCE)
    first = whitened(model[0](REFERENCE), (0, 2, 3))
    second = model[3](affine(first, model[1]).relu())
    assert distance(model[4].running_mean, second.mean((0, 2, 3))) < 1e-10
    assert not any(layer.collecting for layer in (model[1], model[4]))


def test_a_reference_batch_must_run() -> None:
    with pytest.raises(NormswapError, match="the model has no virtual batch norm"), reference_batch(nn.ReLU()):
        pass
    model = nn.ModuleList([VirtualBatchNorm2d(8), VirtualBatchNorm2d(8)]).double()
    with pytest.raises(NormswapError, match="no reference batch ran through 1: "), reference_batch(model):
        model[0](REFERENCE)
    with pytest.raises(ZeroDivisionError), reference_batch(model):
        raise ZeroDivisionError
    assert not model[0].collecting


def test_conversion() -> None:
    batch = randomise(nn.BatchNorm2d(8).double()).eval()
    errors = []
    for size in (8, 64, 4096):
        plan = plan_convert(nn.Sequential(batch), "virtual", reference_size=size)
        assert plan.changes[0].exactness == "approximate"
        errors.append(distance(plan.apply()(X), batch(X)))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-2, "of a large reference batch, a sample changes little"
    back = convert(plan.apply(), "batch")[0]
    assert all(torch.equal(value, back.state_dict()[name]) for name, value in batch.state_dict().items())
    instance = randomise(nn.InstanceNorm2d(8, affine=True).double())
    made = plan_convert(nn.Sequential(instance), "virtual", init="preserve")
    assert made.changes[0].exactness == "exact"
    assert distance(made.apply()(X), instance(X)) < 1e-10
    assert "cannot compute the same" in plan_convert(nn.Sequential(batch), "virtual", init="preserve").skips[0].reason
    with pytest.raises(NormswapError, match="reference_size=0: it must be a whole number of at least 1"):
        plan_convert(nn.Sequential(batch), "virtual", reference_size=0)
