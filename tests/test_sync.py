"""Synchronised batch norm over real processes (gloo, CPU), against one process with the whole batch, in float64."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch import multiprocessing as mp

from normswap import convert, read
from normswap.norms.sync import SyncBatchNorm
from tests.support import DOUBLE, distance, randomise, sample

RANKS = 2
CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "maps, one sample against three": ((4, 3, 4, 5), (1, 3), {}),
    "vectors": ((5, 3), (2, 3), {"momentum": 0.3}),
    "volumes": ((3, 3, 2, 3, 4), (2, 1), {"eps": 1e-2}),
    "sequences, a cumulative mean": ((4, 3, 6), (2, 2), {"momentum": None}),
    "a process without data": ((3, 3, 4, 4), (3, 0), {}),
    "no affine": ((4, 3, 4, 5), (2, 2), {"affine": False}),
    "no statistics": ((4, 3, 4, 5), (3, 1), {"track_running_stats": False}),
    "a large mean": ((4, 3, 4, 5), (2, 2), {"eps": 1e-12}),
}
CLASSES = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
STEPS = 3


def model_of(name: str) -> nn.Module:
    shape, _, options = CASES[name]
    return nn.Sequential(randomise(CLASSES[len(shape)](3, **options).double()), nn.Tanh())


def batch(name: str, step: int) -> Tensor:
    x = sample(*CASES[name][0], seed=step)
    return x + 1e4 if name == "a large mean" else x


def train(model: nn.Module, xs: list[Tensor]) -> dict[str, Any]:
    """What ``STEPS`` training steps give: outputs, gradients of inputs and parameters, and the statistics."""
    outs, gradients = [], []
    for x in xs:
        x.requires_grad_()
        out = model(x)
        weight = torch.arange(1.0, out.shape[1] + 1, dtype=out.dtype).reshape(-1, *[1] * (out.dim() - 2))
        (out**3 * weight).sum().backward()
        outs.append(out.detach())
        gradients.append(x.grad)
    return {
        "outs": outs,
        "gradients": gradients,
        "parameters": [p.grad for p in model.parameters()],
        "buffers": dict(model.named_buffers()),
    }


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    results: dict[str, Any] = {}
    for name, (_, sizes, _) in CASES.items():
        model = convert(model_of(name), "sync").train()
        xs = [batch(name, step).split(list(sizes))[rank].clone() for step in range(STEPS)]
        results[name] = train(model, xs)
        for gradient in results[name]["parameters"]:
            dist.all_reduce(gradient)
        results[name]["eval"] = model.eval()(batch(name, 0))
    alone = dist.new_group([0]), dist.new_group([1])
    model = convert(model_of("vectors"), "sync", process_group=alone[rank])
    results["alone"] = model(batch("vectors", rank)).detach()
    try:
        nn.SyncBatchNorm.convert_sync_batchnorm(model_of("vectors")).train()(batch("vectors", 0))
        results["torch"] = "trains"
    except ValueError as error:
        results["torch"] = str(error)
    torch.save(results, f"{folder}/{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results() -> Iterator[list[dict[str, Any]]]:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(process, args=(folder,), nprocs=RANKS)
        yield [torch.load(Path(folder) / str(rank)) for rank in range(RANKS)]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_like_one(name: str, results: list[dict[str, Any]]) -> None:
    bound = 1e-4 if name == "a large mean" else 1e-9
    model = model_of(name).train()
    wanted = train(model, [batch(name, step) for step in range(STEPS)])
    ours = [result[name] for result in results]
    for step in range(STEPS):
        assert distance(torch.cat([o["outs"][step] for o in ours]), wanted["outs"][step]) < bound
        assert distance(torch.cat([o["gradients"][step] for o in ours]), wanted["gradients"][step]) < bound
    for one in ours:
        for gradient, parameter in zip(one["parameters"], wanted["parameters"], strict=True):
            assert distance(gradient, parameter) < bound
        for key, value in wanted["buffers"].items():
            assert distance(one["buffers"][key], value) < bound, key
    if model[0].track_running_stats:
        assert distance(ours[0]["eval"], model.eval()(batch(name, 0))) < bound
        assert torch.equal(ours[0]["eval"], ours[1]["eval"])


def test_a_group_of_one_process_is_plain_batch_norm(results: list[dict[str, Any]]) -> None:
    for rank, result in enumerate(results):
        assert distance(result["alone"], model_of("vectors")(batch("vectors", rank))) < DOUBLE


def test_torchs_own_refuses_to_train_here(results: list[dict[str, Any]]) -> None:
    assert "expected input tensor to be on GPU" in results[0]["torch"]


def test_without_processes_it_is_batch_norm() -> None:
    source = randomise(nn.BatchNorm2d(3).double())
    new, x = convert(copy.deepcopy(source), "sync"), sample(4, 3, 4, 5)
    assert type(new) is SyncBatchNorm
    for training in (True, False):
        assert distance(new.train(training)(x), source.train(training)(x)) < DOUBLE
    for key, value in source.state_dict().items():
        assert distance(new.state_dict()[key], value) < DOUBLE


def test_one_process_trains_too(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        source = randomise(nn.BatchNorm2d(3).double())
        new, x = convert(copy.deepcopy(source), "sync"), sample(4, 3, 4, 5)
        assert distance(new(x), source(x)) < DOUBLE
        assert distance(new.running_var, source.running_var) < DOUBLE
    finally:
        dist.destroy_process_group()


def test_low_precision_is_kept() -> None:
    new = convert(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)).bfloat16(), "sync")
    assert new(torch.randn(2, 3, 4, 4).bfloat16()).dtype == torch.bfloat16


def test_it_is_torchs_class_to_others() -> None:
    norm = convert(nn.BatchNorm2d(8), "sync")
    assert isinstance(norm, nn.SyncBatchNorm)
    assert read(norm).kind == "sync"
    assert norm.process_group is None
