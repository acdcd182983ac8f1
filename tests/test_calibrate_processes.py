"""Calibration over real processes (gloo, CPU), against one process with all the data, in float64."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch import distributed as dist

from normswap import calibrate, convert, recalibrate
from normswap.calibration import plan_groups
from tests.processes import launch
from tests.support import distance, randomise, sample

WORLD = 3
SHARES = {"equal": ([0, 1], [2, 3], [4, 5]), "unequal": ([0, 1, 2, 3], [], [4, 5])}


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 16, 3),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3),
        nn.BatchNorm2d(16),
        nn.Flatten(),
    ]
    model = randomise(nn.Sequential(*layers, nn.Linear(16 * 16, 5)).double()).eval()
    recalibrate(model, data())
    return model


def data() -> list[Tensor]:
    return [sample(4 + seed, 3, 8, 8, seed=seed) for seed in range(6)]


def everything(original: nn.Module, shares: list[int]) -> dict[str, Tensor]:
    """Of a process that has the batches ``shares``: all parameters and buffers that are fitted."""
    batches = [data()[i] for i in shares]
    model, stale = convert(original, "switchable"), randomise(copy.deepcopy(original))
    calibrate(model, original, batches, in_flight=6)
    recalibrate(stale, iter(batches), in_flight=6)
    found = {f"calibrated {name}": value for name, value in model.state_dict().items()}
    found.update((f"recalibrated {name}", value) for name, value in stale.state_dict().items())
    counts = [change.target.groups for change in plan_groups(original, batches).changes]
    return {**found, "groups": torch.tensor(counts)}


def refined(original: nn.Module, shares: list[int]) -> dict[str, Tensor]:
    model = convert(original, "layer")
    calibrate(model, original, [data()[i] for i in shares], refine=8, refine_layers=True)
    return {name: value.detach() for name, value in model.state_dict().items()}


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    original = network()
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    dist.barrier()
    results = {name: everything(original, shares[rank]) for name, shares in SHARES.items()}
    model, error = convert(original, "layer"), ""
    try:
        calibrate(model, original, [data()[0] if rank else data()[0][:, :2]])
    except Exception as raised:
        error = str(raised)
    torch.save((results, refined(original, [2 * rank, 2 * rank + 1]), error), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_processes_agree_with_one() -> None:
    expected = everything(network(), [0, 1, 2, 3, 4, 5])
    with tempfile.TemporaryDirectory() as folder:
        launch(process, WORLD, folder)
        found = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(WORLD)]
    for results, _, _ in found:
        for state in results.values():
            assert state.keys() == expected.keys()
            for name, value in expected.items():
                if value.is_floating_point():
                    assert distance(state[name], value) < 1e-9, name
                else:
                    assert torch.equal(state[name], value), name
    alone = [refined(network(), [2 * rank, 2 * rank + 1]) for rank in range(WORLD)]
    for _, state, _ in found:
        for name, value in state.items():
            assert torch.equal(value, found[0][1][name]), name
    moved = [name for name, value in found[0][1].items() if distance(value, alone[0][name]) > 1e-9]
    assert {"3.weight", "4.weight", "6.weight"} & set(moved), "each learns from the others' batches"
    assert "channels" in found[0][2]
    assert found[1][2].startswith("another process failed: RuntimeError(")
    assert found[2][2].startswith("another process failed: RuntimeError(")
