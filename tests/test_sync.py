"""Synchronised norms over real processes (gloo, CPU), against one process with the whole batch, in float64."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from normswap import NormswapError, convert, plan_convert, read
from normswap.norms import sync
from normswap.norms.batch_instance import BatchInstanceNorm2d
from normswap.norms.renorm import BatchRenorm2d
from normswap.norms.switchable import SwitchableNorm, SwitchableNorm2d
from normswap.norms.sync import SyncBatchNorm
from tests.processes import launch
from tests.support import DOUBLE, distance, randomise, sample

BOUND = 1e-10
STEPS = 3
CLASSES = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
KINDS: dict[str, dict[str, Any]] = {
    "sync": {},
    "switchable": {"synchronised": True},
    "batch_instance": {"synchronised": True},
    "renorm": {"synchronised": True, "start": 0, "r_end": 3, "d_end": 2},
}


@dataclass(frozen=True)
class Case:
    """A batch norm to convert, the whole batch, and how many samples each process gets."""

    shape: tuple[int, ...]
    sizes: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    kinds: tuple[str, ...] = ("sync",)
    offset: float = 0.0

    def source(self) -> nn.Module:
        return randomise(nn.Sequential(CLASSES[len(self.shape)](self.shape[1], **self.options), nn.Tanh()).double())

    def batch(self, step: int) -> Tensor:
        return sample(*self.shape, seed=step) + self.offset


ALL = tuple(KINDS)
CASES = {
    "two, one sample against three": Case((4, 3, 4, 5), (1, 3), kinds=ALL),
    "two, vectors": Case((5, 3), (2, 3), {"momentum": 0.3}, kinds=ALL),
    "two, volumes": Case((3, 3, 2, 3, 4), (2, 1), {"eps": 1e-2}),
    "two, sequences, a cumulative mean": Case((4, 3, 6), (2, 2), {"momentum": None}, kinds=ALL),
    "two, one without data": Case((3, 3, 4, 4), (3, 0), kinds=ALL),
    "two, no affine": Case((4, 3, 4, 5), (2, 2), {"affine": False}, kinds=ALL),
    "two, no statistics": Case((4, 3, 4, 5), (3, 1), {"track_running_stats": False}),
    "two, a mean of 10,000": Case((4, 3, 4, 5), (2, 2), {"eps": 1e-6}, kinds=ALL, offset=1e4),
    "four, one without data": Case((6, 3, 4, 5), (2, 0, 3, 1), kinds=ALL),
    "four, one value each": Case((4, 3), (1, 1, 1, 1), kinds=ALL),
}
RUNS = [(name, kind) for name, case in CASES.items() for kind in case.kinds]


def train(model: nn.Module, xs: list[Tensor]) -> dict[str, Any]:
    """What training steps give: outputs, gradients of inputs and parameters, and the statistics."""
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


class Exchanges:
    """Counts what goes between processes."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __enter__(self) -> list[int]:
        self.originals = dist.all_reduce, dist.all_gather

        def counted(original: Callable[..., Any], position: int) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                self.sizes.append(args[position].numel())
                return original(*args, **kwargs)

            return call

        dist.all_reduce, dist.all_gather = counted(self.originals[0], 0), counted(self.originals[1], 1)
        return self.sizes

    def __exit__(self, *_: object) -> None:
        dist.all_reduce, dist.all_gather = self.originals


WRAPPED = {2: tuple(KINDS), 4: ("sync", "switchable")}
SHARES = {2: (1, 3), 4: (2, 0, 1, 1)}
RATE = 1e-3


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 4, 2), nn.BatchNorm2d(4), nn.Flatten()]
    return randomise(nn.Sequential(*layers, nn.Linear(36, 2)).double())


def descend(model: nn.Module, wrapped: nn.Module, xs: list[Tensor], rate: float) -> dict[str, Tensor]:
    """The state after steps of gradient descent on a sum over the samples."""
    optimizer = torch.optim.SGD(model.parameters(), rate)
    for x in xs:
        optimizer.zero_grad()
        wrapped(x).square().sum().mul(0.1).backward()
        optimizer.step()
    state = model.state_dict()
    return {name: getattr(tensor, "full_tensor", tensor.clone)() for name, tensor in state.items()}


def network_batches() -> list[Tensor]:
    return [sample(4, 3, 5, 5, seed=step) for step in range(STEPS)]


def wrapped(rank: int, world: int) -> dict[str, Any]:
    """The state of a network that two wrappers of torch trained."""
    results: dict[str, Any] = {}
    xs = [x.split(SHARES[world])[rank] for x in network_batches()]
    for kind in WRAPPED[world]:
        model = convert(network(), kind, **KINDS[kind]).train()
        results[f"ddp {kind}"] = descend(model, DistributedDataParallel(model), xs, RATE * world)
        model = convert(network(), kind, **KINDS[kind]).train()
        mesh = init_device_mesh("cpu", (world,))
        for module in (model[0], model[1], model[4]):
            fully_shard(module, mesh=mesh)
        results[f"fsdp {kind}"] = descend(model, fully_shard(model, mesh=mesh), xs, RATE * world)
    return results


def subgroups(rank: int, world: int) -> dict[str, Any]:
    """Training with the batches of a part of the processes."""
    case, half = CASES["two, vectors"], world // 2
    groups = [dist.new_group(list(range(first, first + half))) for first in (0, half)]
    group, other = groups[rank // half], groups[1 - rank // half]
    results = {}
    for kind in ("sync", "switchable"):
        model = convert(case.source(), kind, process_group=group, **KINDS[kind]).train()
        shares = case.batch(rank // half).split(case.sizes if half == 2 else [5])
        results[kind] = train(model, [shares[rank % half].clone()])
        back = convert(model, "batch")  # which copies the model, and the group cannot be copied
        results[f"{kind} back"] = type(back[0]).__name__, hasattr(back[0], "process_group")
    outsider = convert(case.source(), "sync", process_group=other)
    results["outsider"] = outsider(case.batch(0)).detach()
    return results


def process(rank: int, folder: str, world: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    results: dict[Any, Any] = {}
    for name, kind in RUNS:
        case = CASES[name]
        if len(case.sizes) != world:
            continue
        model = convert(case.source(), kind, **KINDS[kind]).train()
        xs = [case.batch(step).split(case.sizes)[rank].clone() for step in range(STEPS)]
        with Exchanges() as sizes:
            results[name, kind] = train(model, xs)
        for gradient in results[name, kind]["parameters"]:
            dist.all_reduce(gradient)
        results[name, kind].update(exchanges=sizes, eval=model.eval()(case.batch(0)).detach())
    results.update(wrapped(rank, world), groups=subgroups(rank, world))
    if world == 2:
        results.update(others(rank))
    torch.save(results, f"{folder}/{rank}")
    dist.destroy_process_group()


def others(rank: int) -> dict[str, Any]:
    """What needs two processes and no table."""
    results: dict[str, Any] = {}
    case = CASES["two, one sample against three"]
    try:
        nn.SyncBatchNorm.convert_sync_batchnorm(case.source()).train()(case.batch(0))
        results["torch"] = "trains"
    except ValueError as error:
        results["torch"] = str(error)

    model = convert(case.source(), "switchable", synchronised=True).train()
    x = case.batch(0).split(case.sizes)[rank].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).pow(3).sum(), x, create_graph=True)
    results["twice"] = torch.autograd.grad(gradient.square().sum(), x)[0]

    compiled = torch.compile(convert(case.source(), "switchable", synchronised=True), backend="aot_eager")
    results["compiled"] = train(compiled, [case.batch(0).split(case.sizes)[rank].clone()])

    model = convert(case.source(), "sync").train()
    results["nothing"] = train(model, [torch.empty(0, 3, 4, 5, dtype=torch.float64)])
    narrow = torch.empty(2, 3, 0, 5, dtype=torch.float64) if rank else case.batch(0)
    results["no space"] = train(convert(case.source(), "switchable", synchronised=True).train(), [narrow])
    half = convert(nn.BatchNorm2d(3).bfloat16(), "sync").train()
    results["half"] = half(case.batch(0).split(case.sizes)[rank].bfloat16())
    return results


@pytest.fixture(scope="module")
def results() -> Callable[[int], list[dict[Any, Any]]]:
    found: dict[int, list[dict[Any, Any]]] = {}

    def of(world: int) -> list[dict[Any, Any]]:
        if world not in found:
            found[world] = []  # Launched once, if it fails too.
            with tempfile.TemporaryDirectory() as folder:
                launch(process, world, folder, world)
                found[world] = [torch.load(Path(folder) / str(rank)) for rank in range(world)]
        assert found[world], "the processes failed"
        return found[world]

    return of


Results = Callable[[int], list[dict[Any, Any]]]


def alone(kind: str, source: nn.Module) -> nn.Module:
    """The same layer for one process."""
    options = {name: value for name, value in KINDS[kind].items() if name != "synchronised"}
    return source if kind == "sync" else convert(source, kind, **options)


def agree(ours: list[dict[str, Any]], wanted: dict[str, Any], bound: float = BOUND) -> None:
    for step, (out, gradient) in enumerate(zip(wanted["outs"], wanted["gradients"], strict=True)):
        assert distance(torch.cat([o["outs"][step] for o in ours]), out) < bound
        assert distance(torch.cat([o["gradients"][step] for o in ours]), gradient) < bound
    for one in ours:
        for key, value in wanted["buffers"].items():
            assert distance(one["buffers"][key], value) < bound, key


@pytest.mark.parametrize(("name", "kind"), RUNS)
def test_processes_train_like_one(name: str, kind: str, results: Results) -> None:
    case = CASES[name]
    bound = 1e-8 if case.offset else BOUND  # x has 12 digits left behind such a mean
    model = alone(kind, case.source()).train()
    wanted = train(model, [case.batch(step) for step in range(STEPS)])
    ours = [result[name, kind] for result in results(len(case.sizes))]
    agree(ours, wanted, bound)
    for one in ours:
        for gradient, parameter in zip(one["parameters"], wanted["parameters"], strict=True):
            assert distance(gradient, parameter) < bound
        assert one["exchanges"] == [2 * case.shape[1] + 1, 2 * case.shape[1]] * STEPS  # one there and one back
    if model[0].track_running_stats:
        assert distance(ours[0]["eval"], model.eval()(case.batch(0))) < bound
        assert torch.equal(ours[0]["eval"], ours[1]["eval"])


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
@pytest.mark.parametrize(("world", "kind"), [(world, kind) for world in WRAPPED for kind in WRAPPED[world]])
def test_networks_train_in_torchs_wrappers(world: int, wrapper: str, kind: str, results: Results) -> None:
    ours = [result[f"{wrapper} {kind}"] for result in results(world)]
    model = alone(kind, network()).train()
    wanted = descend(model, model, network_batches(), RATE)
    assert distance(wanted["0.weight"], network().state_dict()["0.weight"]) > 1e-3  # it did train
    for one in ours:
        for name, tensor in wanted.items():
            assert distance(one[name], tensor) < BOUND, name


@pytest.mark.parametrize("kind", ["sync", "switchable"])
@pytest.mark.parametrize("world", [2, 4])
def test_a_group_of_processes(world: int, kind: str, results: Results) -> None:
    case, half = CASES["two, vectors"], world // 2
    groups = [result["groups"] for result in results(world)]
    for first in (0, half):
        wanted = train(alone(kind, case.source()).train(), [case.batch(first // half)])
        agree([group[kind] for group in groups[first : first + half]], wanted)
    for group in groups:
        assert group[f"{kind} back"] == ("BatchNorm1d", False)
        assert distance(group["outsider"], case.source()(case.batch(0))) < DOUBLE


def test_torchs_own_refuses_to_train_here(results: Results) -> None:
    assert "expected input tensor to be on GPU" in results(2)[0]["torch"]


def test_differentiated_twice_and_compiled(results: Results) -> None:
    case = CASES["two, one sample against three"]
    x = case.batch(0).requires_grad_()
    model = alone("switchable", case.source()).train()
    (gradient,) = torch.autograd.grad(model(x).pow(3).sum(), x, create_graph=True)
    wanted = torch.autograd.grad(gradient.square().sum(), x)[0]
    assert distance(torch.cat([result["twice"] for result in results(2)]), wanted) < BOUND
    once = train(alone("switchable", case.source()).train(), [case.batch(0)])
    assert distance(torch.cat([result["compiled"]["outs"][0] for result in results(2)]), once["outs"][0]) < BOUND
    assert distance(torch.cat([r["compiled"]["gradients"][0] for r in results(2)]), once["gradients"][0]) < BOUND


def test_batches_without_values(results: Results) -> None:
    case = CASES["two, one sample against three"]
    for result in results(2):  # no process had any: nothing is learned from it
        for name, buffer in case.source().named_buffers():
            assert torch.equal(result["nothing"]["buffers"][name], buffer), name
        assert all(bool((gradient == 0).all()) for gradient in result["nothing"]["parameters"])
    wanted = train(alone("switchable", case.source()).train(), [case.batch(0)])
    agree([results(2)[0]["no space"]], wanted)
    assert results(2)[1]["no space"]["outs"][0].shape == (2, 3, 0, 5)


def test_low_precision_is_kept(results: Results) -> None:
    case = CASES["two, one sample against three"]
    halves = torch.cat([result["half"] for result in results(2)])
    assert halves.dtype == torch.bfloat16
    assert distance(halves, nn.BatchNorm2d(3)(case.batch(0).bfloat16().float())) < 0.01


def test_without_processes_it_is_batch_norm() -> None:
    source = randomise(nn.BatchNorm2d(3).double())
    new, x = convert(copy.deepcopy(source), "sync"), sample(4, 3, 4, 5)
    assert type(new) is SyncBatchNorm
    for training in (True, False):
        assert distance(new.train(training)(x), source.train(training)(x)) < DOUBLE
    for key, value in source.state_dict().items():
        assert distance(new.state_dict()[key], value) < DOUBLE
    with pytest.raises(ValueError, match="3 channels on axis 1"):
        new(sample(4, 2, 4, 5))


def test_one_process_trains_too(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for kind, options in KINDS.items():
            source = randomise(nn.BatchNorm2d(3).double())
            new, other, x = convert(source, kind, **options), alone(kind, copy.deepcopy(source)), sample(4, 3, 4, 5)
            assert distance(new(x), other(x)) < DOUBLE
            assert distance(new.running_var, other.running_var) < DOUBLE
    finally:
        dist.destroy_process_group()


def test_the_way_back_to_the_right_class() -> None:
    for cls in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
        source = nn.Sequential(cls(8))
        for path in (["sync"], ["switchable", "sync"], ["sync", "renorm"]):
            model: nn.Module = source
            for kind in path:
                model = convert(model, kind)
            back = convert(model, "batch")[0]
            assert type(back) is cls
            assert vars(back).keys() - vars(cls(8)).keys() <= {"r_max", "d_max", "start", "r_end", "d_end"}


def test_where_torchs_own_synchronises_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sync, "torchs", lambda device: device == "cpu")
    new = convert(randomise(nn.BatchNorm2d(8)), "sync", process_group=None)
    assert type(new) is nn.SyncBatchNorm
    assert read(new).kind == "sync"
    assert type(convert(new, "batch", example_inputs=(torch.randn(2, 8, 4, 4),))) is nn.BatchNorm2d


def test_where_torchs_own_synchronises_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a model that was moved there after its conversion: torch's ``forward`` finds all that it asks for."""
    source = randomise(nn.BatchNorm2d(3).double())
    new, x = convert(copy.deepcopy(source), "sync"), sample(4, 3, 4, 5)
    monkeypatch.setattr(sync, "torchs", lambda device: True)
    monkeypatch.setattr(sync, "several", lambda group: True)
    monkeypatch.setattr(sync, "normalize", None)
    assert distance(new(x), source(x)) < DOUBLE
    assert distance(new.running_var, source.running_var) < DOUBLE


class TestOptions:
    def test_what_is_synchronised_stays_so(self) -> None:
        model = convert(nn.Sequential(nn.BatchNorm2d(8)), "sync")
        for kind in ("switchable", "batch_instance", "renorm"):
            plan = plan_convert(model, kind)
            new = plan.apply()[0]
            assert new.synchronised
            assert "processes" in read(new).pools
            assert "synchronised" in str(plan.changes[0].target)
            assert "synchronised=True" in repr(new)
            assert read(convert(model, kind, synchronised=False)[0]).pools.isdisjoint({"processes"})
            assert not convert(nn.Sequential(nn.BatchNorm2d(8)), kind)[0].synchronised
        assert not convert(model, "switchable", batch=False)[0].synchronised

    def test_a_recipe_has_it(self) -> None:
        model = nn.Sequential(nn.BatchNorm2d(8))
        recipe = plan_convert(model, "switchable", synchronised=True).recipe
        assert recipe["steps"][0]["options"] == {"synchronised": True}

    @pytest.mark.parametrize("cls", [SwitchableNorm2d, BatchInstanceNorm2d, BatchRenorm2d])
    def test_misuse(self, cls: type) -> None:
        with pytest.raises(NormswapError, match="synchronised='yes': it is True or False"):
            cls(8, synchronised="yes")
        with pytest.raises(NormswapError, match="process_group=3: it is a group of"):
            cls(8, synchronised=True, process_group=3)
        with pytest.raises(NormswapError, match="process_group='world': it is a group"):
            convert(nn.BatchNorm2d(8), "sync", process_group="world")

    def test_a_group_that_would_not_be_used(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("normswap.norms.processes.dist.ProcessGroup", object)
        with pytest.raises(NormswapError, match="without synchronised=True"):
            SwitchableNorm2d(8, process_group=object())
        plan = plan_convert(nn.BatchNorm2d(8), "sync", process_group=object())
        assert "a recipe cannot hold its process group" in plan.changes[0].notes[0]
        assert "process_group" not in plan.recipe["steps"][0]["options"]

    def test_nothing_to_synchronise(self) -> None:
        with pytest.raises(NormswapError, match="nothing is pooled"):
            SwitchableNorm(8, batch=False, synchronised=True)
