"""Checkpoints of torch.distributed.checkpoint, pickles of arrays: no code in them is run, and all in them is kept."""

from __future__ import annotations

import filecmp
import io
import os
import pickle
import socket
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import distributed as dist
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from typer.testing import CliRunner, Result

import normswap
from normswap import checkpoint
from normswap.checkpoints.distributed import NAME
from normswap.cli import app
from normswap.errors import NormswapError
from tests.processes import launch
from tests.support import randomise

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch.distributed", "ignore::FutureWarning:torch")


def network() -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    return randomise(model.double()).eval()  # type: ignore[return-value]


def trained() -> tuple[nn.Sequential, torch.optim.Optimizer]:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 3, 5, 5, dtype=torch.float64)).sum().backward()
    optimizer.step()
    return model, optimizer


def saved(folder: Path, **more: Any) -> nn.Sequential:
    model, optimizer = trained()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3, **more}
    dcp.save(state, checkpoint_id=folder)
    return model


def command(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def loaded(folder: Path, state: dict[str, Any]) -> dict[str, Any]:
    """What torch itself loads into a state of these names."""
    blank = {k: {n: torch.zeros_like(v) for n, v in s.items()} if isinstance(s, dict) else s for k, s in state.items()}
    dcp.load(blank, checkpoint_id=folder)
    return blank


def test_it_is_read_as_a_checkpoint(tmp_path: Path) -> None:
    model = saved(tmp_path / "step_3", rng=torch.get_rng_state())
    read = checkpoint.read(tmp_path / "step_3")
    assert (read.format, read.key, read.left_out) == ("distributed", "model", ("optimizer", "epoch", "rng"))
    assert {name: value.tolist() for name, value in read.tensors.items()} == {
        name: value.tolist() for name, value in model.state_dict().items()
    }
    assert normswap.load(network(), tmp_path / "step_3")[0].weight.equal(model[0].weight)


def test_converted_by_its_keys_it_stays_one_with_everything_else_in_it(tmp_path: Path) -> None:
    model = saved(tmp_path / "a", rng=torch.get_rng_state())
    result = command("convert", tmp_path / "a", "--to", "group", "-o", tmp_path / "b/")
    assert result.exit_code == 0, result.output
    wanted = normswap.convert(model, "group").state_dict()
    found = loaded(tmp_path / "b", {"model": dict(wanted), "epoch": 0})
    assert found["epoch"] == 3
    assert all(torch.equal(found["model"][name], value) for name, value in wanted.items())
    assert isinstance(normswap.load(network(), tmp_path / "b")[1], nn.GroupNorm)
    before, after = (checkpoint.read(tmp_path / name).stored for name in "ab")
    assert before is not None
    assert after is not None
    name = "optimizer.state.0.exp_avg"
    assert after.bytes(after.items[name][0]) == before.bytes(before.items[name][0])
    assert command("diff", tmp_path / "a", tmp_path / "b").stdout.endswith("5 the same, 3 not (3 removed)\n")
    assert checkpoint.read(tmp_path / "b").metadata


def test_an_optimizer_follows_parameters_that_come(tmp_path: Path) -> None:
    saved(tmp_path / "a")
    result = command("convert", tmp_path / "a", "--to", "batch_instance", "-o", tmp_path / "b/")
    assert "optimizer: 5 parameters keep their state, 0 dropped, 1 new without one" in result.output
    read = checkpoint.read(tmp_path / "b")
    assert read.stored is not None
    optimizer = read.stored.nested["optimizer"]
    assert optimizer["param_groups"][0]["params"] == [0, 1, 2, 3, 4, 5]
    assert sorted(optimizer["state"]) == [0, 1, 2, 4, 5]


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_into_other_formats_and_with_the_model(tmp_path: Path, suffix: str) -> None:
    model = saved(tmp_path / "a")
    factory = f"{Path(__file__).resolve()}:network"
    out = tmp_path / f"b{suffix}"
    assert command("fold", tmp_path / "a", "--model", factory, "-o", out).exit_code == 0
    assert torch.equal(checkpoint.read(out).tensors["0.bias"], normswap.fold(model).state_dict()["0.bias"])
    if suffix == ".pt":
        whole = torch.load(out, weights_only=True)
        assert whole["epoch"] == 3
        assert "0.bias" in whole["model"]
    folded = tmp_path / "c/"
    assert command("fold", tmp_path / "a", "--model", factory, "-o", folded).exit_code == 0
    assert not list(tmp_path.glob(".*"))
    assert "1.weight" not in checkpoint.read(folded).tensors


# --- what is refused -------------------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch /tmp/normswap-was-here",)


def _changed(change: Callable[[Metadata], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        metadata = pickle.loads((folder / NAME).read_bytes())
        change(metadata)
        (folder / NAME).write_bytes(pickle.dumps(metadata))

    return apply


def _everywhere(**fields: Any) -> Callable[[Metadata], object]:
    def change(metadata: Metadata) -> None:
        for info in metadata.storage_data.values():
            for name, value in fields.items():
                setattr(info, name, value)

    return change


def _resized(metadata: Metadata) -> None:
    metadata.state_dict_metadata["model.0.weight"].size = torch.Size([2**40, 3, 3, 3])  # type: ignore[union-attr]


def _cut(folder: Path) -> None:
    file = next(folder.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-100])


def _swapped(folder: Path) -> None:
    file = next(folder.glob("*.distcp"))
    buffer = io.BytesIO()
    torch.save(Evil(), buffer)
    file.write_bytes(buffer.getvalue() + file.read_bytes()[buffer.tell() :])


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "code in the metadata": (lambda f: (f / NAME).write_bytes(pickle.dumps(Evil())), "posix.system"),
    "another object": (lambda f: (f / NAME).write_bytes(pickle.dumps([1])), "is no metadata"),
    "truncated metadata": (lambda f: (f / NAME).write_bytes((f / NAME).read_bytes()[:99]), "is damaged or no metadata"),
    "a file elsewhere": (_changed(_everywhere(relative_path="../other")), "which is no file in it"),
    "a file that is not there": (_changed(_everywhere(relative_path="__9_0.distcp")), "which is not there"),
    "beyond the end": (_changed(_everywhere(offset=2**40)), "is truncated or damaged"),
    "another length": (_changed(_everywhere(length=-1)), "is truncated or damaged"),
    "an extension": (_changed(_everywhere(transform_descriptors=["zstd"])), "went through an extension"),
    "a size that is not there": (_changed(_resized), "makes no sense"),
    "no place": (_changed(lambda m: m.storage_data.clear()), "is damaged"),
    "a truncated file": (_cut, "is truncated or damaged"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_is_damaged_or_hostile_is_refused(tmp_path: Path, case: str) -> None:
    saved(tmp_path / "a")
    spoil, words = HOSTILE[case]
    spoil(tmp_path / "a")
    result = command("convert", tmp_path / "a", "--to", "group", "-o", tmp_path / "b/")
    assert result.exit_code == 2
    assert words in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "b").exists()
    assert not Path("/tmp/normswap-was-here").exists()


def test_code_among_the_values_is_not_run(tmp_path: Path) -> None:
    saved(tmp_path / "a")
    _swapped(tmp_path / "a")
    with pytest.raises(NormswapError, match=r"damaged, or|not what the metadata says"):
        dict(checkpoint.read(tmp_path / "a").tensors)


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "a")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("normswap.checkpoints.distributed_writing._copy", full)
    result = command("convert", tmp_path / "a", "--to", "group", "-o", tmp_path / "b/")
    assert result.exit_code == 2
    assert "No space left on device" in result.output
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


# --- several processes -----------------------------------------------------------------------------------------------

WORLD = 4


def in_a_job(rank: int, folder: Path, ports: tuple[int, int, int]) -> None:
    """What one process of a job does: it shards a model, converts it, saves it, and converts what was saved."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(WORLD), "MASTER_ADDR": "localhost"}
    os.environ["MASTER_PORT"] = str(ports[0])
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (WORLD,))
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    before = normswap.convert(network(), "group")
    wanted = before(x)
    fully_shard(before, mesh=mesh)
    assert torch.equal(before(x), wanted)
    model = network()
    fully_shard(model, mesh=mesh)
    for plan in (normswap.plan_convert(model, "group"), normswap.plan_fold(model)):
        assert not plan.changes
        assert "before fully_shard" in plan.skips[0].reason
    with pytest.raises(NormswapError, match="are DTensors, of which this process has a part"):
        checkpoint.write(folder / "x.pt", model.state_dict())
    state, optimizer = get_state_dict(model, torch.optim.AdamW(model.parameters()))
    dcp.save({"model": state, "optimizer": optimizer, "epoch": 3}, checkpoint_id=folder / "sharded")
    dist.destroy_process_group()
    arguments = ("convert", folder / "sharded", "--to", "batch_instance", "-o")
    os.environ["MASTER_PORT"] = str(ports[1])
    assert command(*arguments, f"{folder}/four/").exit_code == 0
    os.environ["MASTER_PORT"] = str(ports[2])
    refused = command(*arguments, f"{folder}/four.pt")
    assert refused.exit_code == 2
    assert bool(rank) or "several processes write only a folder" in refused.output


@pytest.mark.slow
def test_several_processes_write_what_one_writes(tmp_path: Path) -> None:
    with ExitStack() as stack:
        free = [stack.enter_context(socket.socket()) for _ in range(3)]
        for each in free:
            each.bind(("localhost", 0))
        ports = tuple(each.getsockname()[1] for each in free)
    launch(in_a_job, WORLD, tmp_path, ports)
    source, outputs = tmp_path / "sharded", [tmp_path / "one", tmp_path / "four"]
    assert len(list(source.glob("*.distcp"))) == WORLD
    result = command("convert", source, "--to", "batch_instance", "-o", f"{outputs[0]}/")
    assert "optimizer: 5 parameters keep their state, 0 dropped, 1 new without one" in result.output
    names = sorted(entry.name for entry in outputs[0].iterdir())
    assert names == sorted(entry.name for entry in outputs[1].iterdir())
    assert filecmp.cmpfiles(*outputs, names, shallow=False) == (names, [], [])
    before, after = (checkpoint.read(path) for path in (source, outputs[1]))
    assert torch.equal(after.tensors["0.weight"], before.tensors["0.weight"])
    assert after.stored is not None
    assert after.stored.nested["optimizer"]["param_groups"][0]["params"][-1] == "1.share"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["four", "one", "sharded"]


# --- pickles of arrays -----------------------------------------------------------------------------------------------


def zoo(path: Path, protocol: int = 2, **more: Any) -> nn.Sequential:
    """A model zoo's file: a pickle of arrays under "model"."""
    model = network()
    arrays = {name: value.numpy() for name, value in model.state_dict().items()}
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "somebody", **more}, protocol))
    return model


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_arrays_are_read_and_converted(tmp_path: Path, protocol: int) -> None:
    model = zoo(tmp_path / "a.pkl", protocol, iteration=np.int64(7))
    read = checkpoint.read(tmp_path / "a.pkl")
    assert (read.format, read.key, read.left_out) == ("arrays", "model", ("__author__", "iteration"))
    assert all(torch.equal(read.tensors[name], value) for name, value in model.state_dict().items())
    result = command("convert", tmp_path / "a.pkl", "--to", "group", "-o", tmp_path / "b.pth")
    assert result.exit_code == 0, result.output
    whole = torch.load(tmp_path / "b.pth", weights_only=True)
    assert (whole["__author__"], whole["iteration"]) == ("somebody", 7)
    assert whole["model"].keys() == normswap.convert(model, "group").state_dict().keys()


def test_code_in_a_pickle_is_refused_by_name(tmp_path: Path) -> None:
    zoo(tmp_path / "a.pkl", evil=Evil())
    result = command("convert", tmp_path / "a.pkl", "--to", "group", "-o", tmp_path / "b.pth")
    assert result.exit_code == 2
    assert "posix.system" in result.output
    assert "--trust-pickle" in result.output
    assert not Path("/tmp/normswap-was-here").exists()


class Harmless:
    """What a script may have pickled beside its arrays."""


@pytest.mark.parametrize("name", ["inspect", "fold", "verify", "export"])
def test_trust_is_asked_for_by_every_command_that_reads(tmp_path: Path, name: str) -> None:
    zoo(tmp_path / "a.pkl", args=Harmless())
    model = ("--model", f"{Path(__file__).resolve()}:network")
    rest: dict[str, tuple[object, ...]] = {
        "inspect": (),
        "fold": ("-o", tmp_path / "b.safetensors"),
        "verify": (tmp_path / "a.pkl", "-i", "2x3x5x5"),
        "export": ("-o", tmp_path / "b.pt2", "-i", "2x3x5x5"),
    }
    arguments = (name, tmp_path / "a.pkl", *rest[name], *model)
    refused = command(*arguments)
    assert refused.exit_code == 2
    assert "Harmless" in refused.output
    assert command(*arguments, "--trust-pickle").exit_code == 0
