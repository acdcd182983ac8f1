"""The sweep over real models: its list is complete, its measurements can fail, and a few small models pass."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scripts import zoo, zoo_health
from tests.zoo.models import EXCLUDED, MODELS, TIMM_FAMILIES, Entry, flatten, is_norm
from tests.zoo.watch import relative_error, watch

BY_NAME = {entry.name: entry for entry in MODELS}
SMOKE = [
    "torchvision/mobilenet_v3_small",
    "torchvision/shufflenet_v2_x0_5",
    "torchvision/fasterrcnn_resnet18_fpn_frozen",
    "timm/test_byobnet",
    "timm/levit_128s",
    "timm/lcnet_050",
    "timm/convnext_atto",
]


@pytest.fixture(autouse=True)
def _one_thread():
    with zoo.one_thread():
        yield


class Functions(nn.Module):
    """Norm functions called in a ``forward``, at every level; a standardized weight; a norm module."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))
        self.norm = nn.InstanceNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        weight = F.batch_norm(self.conv.weight.reshape(1, 4, -1), None, None, training=True).reshape_as(
            self.conv.weight
        )
        x = F.conv2d(x, weight)
        x = F.batch_norm(x, self.mean, self.var)
        x = torch.batch_norm(x, None, None, self.mean, self.var, False, 0.1, 1e-5, False)
        x = torch.ops.aten.native_batch_norm(x, None, None, self.mean, self.var, False, 0.1, 1e-5)[0]
        x = F.group_norm(x, 2)
        return self.norm(F.layer_norm(x, x.shape[-1:]))


@cache
def subject_of(name: str) -> zoo.Subject:
    return zoo.Subject.of(BY_NAME[name])


def entry_of(make: type[nn.Module], *shape: int) -> Entry:
    return Entry("test/model", "test", make, (shape,))


def test_every_family_is_in_the_zoo_or_excluded_with_a_reason():
    from timm.models._registry import _module_to_models

    modules = {module for module in _module_to_models if not module.startswith("_")}
    listed = set(TIMM_FAMILIES) | {name.removeprefix("timm/") for name in EXCLUDED}
    assert modules - listed == set()
    assert all(EXCLUDED.values())


def test_zoo_is_large_and_names_are_unique():
    assert len(MODELS) >= 190
    assert len(BY_NAME) == len(MODELS)


def test_watch_counts_every_batch_norm_and_no_other():
    entry = entry_of(Functions, 2, 3, 4, 4)
    run = watch(entry, entry.build(), entry.inputs())
    assert [call.family for call in run.calls] == ["batch"] * 4 + ["group", "layer", "instance"]
    assert len(run.batch_calls()) == 3
    assert sum(call.of_parameter for call in run.calls) == 1


def test_relative_error():
    a = [torch.tensor([1.0, -4.0])]
    assert relative_error(a, [torch.tensor([1.0, -4.0])]) == 0
    assert relative_error(a, [torch.tensor([1.0, -3.0])]) == pytest.approx(0.25)
    assert relative_error(a, [torch.tensor([1.0, float("nan")])]) == float("inf")
    assert relative_error(a, [torch.tensor([1.0])]) == float("inf")


def test_flatten_keeps_order():
    a, b, c = (torch.full((), float(i)) for i in range(3))
    assert [float(t) for t in flatten({"x": [a, (b, None)], "y": c})] == [0, 1, 2]


@pytest.mark.parametrize("name", SMOKE[:4])
def test_randomise_makes_norms_matter(name):
    subject = subject_of(name)
    for module in subject.model.modules():
        if is_norm(module):
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                assert tensor is None or tensor.numel() < 2 or float(tensor.detach().double().std()) > 0
    assert zoo.sensitivity(subject) > 1e-6
    assert subject.untouched() is None


@pytest.mark.parametrize("name", SMOKE)
@pytest.mark.parametrize("kind", list(zoo.REPLACED))
def test_convert(name, kind):
    subject = subject_of(name)
    cell = zoo.guarded(lambda: zoo.convert_cell(subject, kind))
    assert (cell["status"], cell["detail"]) == ("ok", "")
    assert subject.untouched() is None


def test_a_cell_is_wrong_when_a_norm_is_left_or_unlisted(monkeypatch):
    plan_convert = zoo.normswap.plan_convert

    def forgetful(model, to, **options):
        plan = plan_convert(model, to, **options)
        plan.changes.pop()
        return plan

    monkeypatch.setattr(zoo.normswap, "plan_convert", forgetful)
    cell = zoo.convert_cell(subject_of("timm/test_byobnet"), "group")
    assert cell["status"] == "wrong"
    assert "1 not in the plan" in cell["detail"]
    assert "1 batch norms left" in cell["detail"]


def test_a_cell_is_wrong_when_the_function_changes(monkeypatch):
    subject = subject_of("timm/test_byobnet")
    plan_convert = zoo.normswap.plan_convert
    monkeypatch.setattr(zoo.normswap, "plan_convert", lambda model, to, **options: plan_convert(model, "switchable"))
    cell = zoo.convert_cell(subject, "frozen")
    assert cell["status"] == "wrong"
    assert "relative error" in cell["detail"]


def test_the_input_model_is_watched():
    subject = zoo.Subject.of(BY_NAME["timm/test_byobnet"])
    subject.model.cache = {"a": 1}
    assert "attributes changed: root" in subject.untouched()
    del subject.model.cache
    subject.model.act = nn.Identity()
    assert "other modules" in subject.untouched()
    del subject.model.act
    assert subject.untouched() is None
    subject.model.get_parameter("stem.bn.weight").data[0] += 1e-12
    assert "tensors changed" in subject.untouched()


def test_contrast():
    subject = subject_of("timm/test_byobnet")
    assert "relative error" in zoo.guarded(lambda: zoo.torch_cell(subject))["detail"]
    opacus = zoo.guarded(lambda: zoo.opacus_cell(subject))
    assert opacus["left"] > 0
    assert "is_valid says True" in opacus["detail"]
    assert subject.untouched() is None


def test_page():
    rows = [{"name": "timm/a", "family": "timm a", **zoo.convert_row(BY_NAME["timm/test_byobnet"], ["frozen"])}]
    page = zoo.convert_page(rows, ["frozen"], "python scripts/zoo.py convert")
    assert "| timm/a | " in page
    assert "1 models of 1 families, 1 of them with batch norms" in page


def test_a_sweep_goes_on_where_it_was(tmp_path, capsys):
    entries, calls = MODELS[:3], []

    def measure(entry):
        calls.append(entry.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return {"cells": {"frozen": {"status": "ok"}}}

    results = tmp_path / "rows.jsonl"
    with pytest.raises(KeyboardInterrupt):
        list(zoo.sweep("convert", entries, results, measure, ["frozen"]))
    rows = list(zoo.sweep("convert", entries, results, measure, ["frozen"]))
    assert [row["name"] for row in rows] == [entry.name for entry in entries]
    assert calls == [entries[position].name for position in (0, 1, 1, 2)]


@pytest.mark.parametrize("name", ["timm/test_byobnet", "timm/convnext_atto"])
def test_health(name):
    subject = subject_of(name)
    cell = zoo_health.health_cell(subject.model, fresh=False)
    assert (cell["status"], cell["detail"]) == ("ok", "")
    assert cell["placed"] == cell["norms"]
    assert subject.untouched() is None


def test_a_false_alarm_is_wrong_and_a_true_one_is_not():
    model = nn.Sequential(nn.LayerNorm(1), nn.BatchNorm2d(3)).double().eval()
    cell = zoo_health.health_cell(model, fresh=True)
    assert (cell["status"], cell["true"]) == ("ok", 1)
    model[1].running_var[0] = -1
    assert "negative-variance at 1" in zoo_health.health_cell(model, fresh=False)["detail"]
