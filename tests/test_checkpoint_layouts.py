"""Training checkpoints as ten projects lay them out: converted by their keys, all other contents intact."""

from __future__ import annotations

import argparse
import copy
import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import normswap
from normswap.checkpoint import read
from tests.support import randomise
from tests.test_checkpoint import refused
from tests.test_checkpoint_keys import run


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.bn(self.conv(x)).mean((2, 3)))
        return out


def trained(split: bool = False) -> tuple[Net, dict[str, Any]]:
    """A net and the state of its optimizer; with weight decay for what has two axes alone, if ``split``."""
    net: Any = randomise(Net())
    parameters = list(net.parameters())
    groups: Any = parameters
    if split:
        groups = [
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
        ]
    optimizer = torch.optim.AdamW(groups)
    net(torch.randn(2, 3, 5, 5)).square().sum().backward()
    optimizer.step()
    return net, optimizer.state_dict()


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return OrderedDict((prefix + name, value) for name, value in state.items())


def torchvision_reference(net: Net, optimizer: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    ema = {"n_averaged": torch.tensor(3), **prefixed(net.state_dict(), "module.")}
    rest = {"lr_scheduler": {"last_epoch": 3}, "epoch": 3, "args": argparse.Namespace(model="net", lr=0.1)}
    return "model", {"model": net.state_dict(), "optimizer": optimizer, **rest, "model_ema": ema, "scaler": {}}


def timm_train(net: Net, optimizer: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    rest = {"epoch": 3, "arch": "net", "version": 2, "args": argparse.Namespace(lr=0.1), "metric": 71.5}
    ema = prefixed(net.state_dict(), "")
    return "state_dict", {**rest, "state_dict": net.state_dict(), "optimizer": optimizer, "state_dict_ema": ema}


def lightning(net: Net, optimizer: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    rest = {"epoch": 3, "global_step": 90, "pytorch-lightning_version": "2.4.0", "loops": {"fit_loop": {}}}
    state = prefixed(net.state_dict(), "model.")
    rest |= {"callbacks": {"ModelCheckpoint{'monitor': 'loss'}": {"best": torch.tensor(0.2)}}}
    return "state_dict", {**rest, "state_dict": state, "optimizer_states": [optimizer], "lr_schedulers": []}


def mmengine(net: Net, optimizer: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    meta = {"epoch": 3, "iter": 90, "cfg": "model = dict()", "seed": 1, "dataset_meta": {"classes": ("a", "b")}}
    hub = {"log_scalars": {}, "runtime_info": {"lr": 0.1}}
    return "state_dict", {
        "meta": meta, "message_hub": hub, "state_dict": net.state_dict(), "optimizer": optimizer,
        "param_schedulers": [{"last_step": 3}],
    }  # fmt: skip


def detectron2(net: Net, optimizer: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    return "model", {"model": net.state_dict(), "optimizer": optimizer, "scheduler": {"last_epoch": 3}, "iteration": 9}


def ddp_and_ema(net: Net, optimizer: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    ema = prefixed(net.state_dict(), "module.")
    state = prefixed(net.state_dict(), "module.")
    return "model", {"model": state, "ema": ema, "optimizer": optimizer, "step": 3}


def compiled(net: Net, optimizer: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    return "model", {"model": prefixed(net.state_dict(), "_orig_mod."), "optimizer": optimizer, "iter_num": 4}


LAYOUTS = [torchvision_reference, timm_train, lightning, mmengine, detectron2, ddp_and_ema, compiled]
Layout = Callable[[Net, dict[str, Any]], tuple[str, dict[str, Any]]]


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[name], b[name]) for name in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["group", "frozen", "switchable"])
def test_the_rest_is_intact(tmp_path: Path, layout: Layout, kind: str) -> None:
    net, optimizer = trained(split=layout is timm_train)
    key, content = layout(net, optimizer)
    before = copy.deepcopy(content)
    torch.save(content, tmp_path / "in.ckpt")
    done = run("convert", tmp_path / "in.ckpt", "--to", kind, "-o", tmp_path / "out.ckpt")
    with torch.serialization.safe_globals([argparse.Namespace]):
        after = torch.load(tmp_path / "out.ckpt", weights_only=True)
    assert list(after) == list(before)
    optimizers = [name for name in before if name.startswith("optimizer")]
    for name in after:
        if name != key and (name not in optimizers or kind == "group"):
            assert equal(after[name], before[name]), name
    assert "optimizer" in done.stderr

    model = normswap.load(Net(), tmp_path / "out.ckpt")
    assert normswap.read(model.bn).kind == kind  # type: ignore[arg-type]
    assert torch.equal(model.conv.weight, net.conv.weight)  # type: ignore[arg-type,union-attr]
    prefix = next(iter(before[key])).removesuffix("conv.weight")
    assert list(after[key]) == [prefix + name for name in model.state_dict()]
    found = after[optimizers[0]][0] if layout is lightning else after[optimizers[0]]
    check_optimizer(model, net, found, optimizer, kind, split=layout is timm_train)


def check_optimizer(
    model: nn.Module, net: Net, found: dict[str, Any], old: dict[str, Any], kind: str, split: bool
) -> None:
    """An optimizer made anew takes the state, and each parameter that is left has its own."""
    groups: Any = list(model.parameters())
    if split:
        flat = [p for p in groups if p.dim() <= 1]
        groups = [{"params": flat}, {"params": [p for p in groups if p.dim() > 1]}]
    fresh = torch.optim.AdamW(groups)
    fresh.load_state_dict(found)
    original = torch.optim.AdamW(net.parameters())
    if not split:
        original.load_state_dict(old)
        for name, parameter in net.named_parameters():
            if name in dict(model.named_parameters()):
                now = fresh.state[model.get_parameter(name)]
                assert torch.equal(now["exp_avg"], original.state[parameter]["exp_avg"]), name
    gates = [p for name, p in model.named_parameters() if "gate" in name]
    assert all(p not in fresh.state for p in gates)
    assert len(gates) == (2 if kind == "switchable" else 0)
    assert len(found["state"]) == (4 if kind == "frozen" else 6)


def test_an_optimizer_whose_parameters_cannot_be_told_apart_is_left_out(tmp_path: Path) -> None:
    net, optimizer = trained()
    optimizer["param_groups"][0]["params"] = [0, 1, 2]
    torch.save({"model": net.state_dict(), "optimizer": optimizer, "epoch": 1}, tmp_path / "in.pt")
    done = run("convert", tmp_path / "in.pt", "--to", "frozen", "-o", tmp_path / "out.pt")
    assert "left out" in done.stderr
    assert list(torch.load(tmp_path / "out.pt", weights_only=True)) == ["model", "epoch"]
    run("convert", tmp_path / "in.pt", "--to", "group", "-o", tmp_path / "same.pt")
    assert "optimizer" in torch.load(tmp_path / "same.pt", weights_only=True)


def test_ema_is_converted_where_it_is_named(tmp_path: Path) -> None:
    net, optimizer = trained()
    _, content = ddp_and_ema(net, optimizer)
    torch.save(content, tmp_path / "in.pt")
    run("convert", tmp_path / "in.pt", "--key", "ema", "--to", "group", "-o", tmp_path / "out.pt")
    after = torch.load(tmp_path / "out.pt", weights_only=True)
    assert equal(after["model"], content["model"])
    assert "module.bn.running_mean" not in after["ema"]
    assert isinstance(normswap.load(Net(), tmp_path / "out.pt", key="ema").bn, nn.GroupNorm)
    assert isinstance(normswap.load(Net(), tmp_path / "out.pt").bn, nn.BatchNorm2d)


def test_with_the_model_the_rest_is_intact_too(tmp_path: Path) -> None:
    net, optimizer = trained()
    key, content = ddp_and_ema(net, optimizer)
    torch.save(content, tmp_path / "in.pt")
    words = "-m", "tests.test_checkpoint_layouts:Net", "-o", tmp_path / "out.pt"
    run("convert", tmp_path / "in.pt", "--to", "switchable", *words)
    after = torch.load(tmp_path / "out.pt", weights_only=True)
    assert list(after) == list(content)
    assert equal(after["ema"], content["ema"])
    assert "module.bn.mean_gate" in after[key]
    check_optimizer(normswap.load(Net(), tmp_path / "out.pt"), net, after["optimizer"], optimizer, "switchable", False)


def test_tensors_alone_go_into_safetensors_and_the_rest_is_named(tmp_path: Path) -> None:
    _, content = torchvision_reference(*trained())
    torch.save(content, tmp_path / "in.pth")
    done = run("convert", tmp_path / "in.pth", "--to", "group", "-o", tmp_path / "out.safetensors")
    assert "optimizer, lr_scheduler, epoch, args, model_ema" in done.stderr
    assert "bn.weight" in read(tmp_path / "out.safetensors").tensors


@pytest.mark.parametrize("safe", [True, False])
def test_huggingface_trainer_and_accelerate_folders(tmp_path: Path, safe: bool) -> None:
    """Trainer: ``checkpoint-500/``, weights beside the state; accelerate: ``model.safetensors``, ``optimizer.bin``."""
    net, optimizer = trained()
    folder = tmp_path / "checkpoint-500"
    folder.mkdir()
    state = net.state_dict()
    if safe:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        torch.save(state, folder / "pytorch_model.bin")
    torch.save(optimizer, folder / ("optimizer.bin" if safe else "optimizer.pt"))
    (folder / "config.json").write_text('{"model_type": "net"}')
    (folder / "trainer_state.json").write_text('{"global_step": 500}')
    run("convert", folder, "--to", "group", "-o", f"{tmp_path}/out/")
    assert (tmp_path / "out" / "config.json").read_text() == '{"model_type": "net"}'
    assert json.loads((tmp_path / "out" / "trainer_state.json").read_text())["global_step"] == 500
    assert isinstance(normswap.load(Net(), tmp_path / "out").bn, nn.GroupNorm)


def test_a_pickled_model_is_refused_by_name(tmp_path: Path) -> None:
    """Ultralytics saves the model itself, in half precision."""
    net, optimizer = trained()
    content = {"epoch": 1, "best_fitness": None, "model": net.half(), "ema": None, "optimizer": optimizer}
    torch.save(content, tmp_path / "best.pt")
    with refused("tests.test_checkpoint_layouts.Net", "--trust-pickle"):
        read(tmp_path / "best.pt")
    assert "Net" in run("convert", tmp_path / "best.pt", "--to", "group", "-o", tmp_path / "o.pt", status=2).stderr
    with refused("whole model", "model (Net)", "normswap.convert"):
        read(tmp_path / "best.pt", trust_pickle=True)
