"""Benchmarks: ratios against a named peer in the same run.

    python scripts/bench.py convert    ResNet-152 to sync against torch's own converter; memory; growth to 10,000 norms
    python scripts/bench.py layers     the layers that torch lacks against BatchNorm2d: time and memory
    python scripts/bench.py fold       folding against torch.fx's fuse; memory; growth to 5,000 layers; inference
    python scripts/bench.py calibrate  accuracy kept on digits (``--repeats`` seeds); the cost on ResNet-50
    python scripts/bench.py verify     seeded faults in real models: which are seen, and where; time
    python scripts/bench.py files      converting checkpoint files against cp: time and memory

Figures are written to a section of a Markdown file with ``--out``. Timed on whatever machine runs it; only the ratios
travel.
"""

from __future__ import annotations

import argparse
import copy
import gc
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import normswap
import tests.zoo.schemas  # noqa: F401  before torchvision
from scripts.bench_layers import bench_layers

warnings.simplefilter("ignore")


def median_time(run: Callable[[Any], Any], setup: Callable[[], Any], repeats: int) -> float:
    """Median seconds of ``run(setup())``, the setup not timed."""
    times = []
    for _ in range(repeats):
        argument = setup()
        gc.collect()
        start = time.perf_counter()
        run(argument)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


class Allocations(TorchDispatchMode):
    """Counts bytes of new storages made by operators, and the most memory that was held at once beyond the model's."""

    def __init__(self, model: nn.Module | None = None) -> None:
        super().__init__()
        self.total = 0
        self.largest = 0
        self.alive: dict[int, tuple[Any, int]] = {}
        self.peak = 0
        self.start = 0
        for tensor in () if model is None else (*model.parameters(), *model.buffers()):
            self._watch(StorageWeakRef(tensor.untyped_storage()), tensor.untyped_storage().nbytes())
        self.start, self.peak = self.peak, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in known and tensor.device.type != "meta":
                self.total += storage.nbytes()
                self.largest = max(self.largest, storage.nbytes())
                self._watch(StorageWeakRef(storage), storage.nbytes())
        return result

    def _watch(self, reference: StorageWeakRef, size: int) -> None:
        """Follow the larger storages only: the small ones are many and do not matter."""
        if size >= 1 << 16:
            self.alive[reference.cdata] = (reference, size)
            self.alive = {key: held for key, held in self.alive.items() if not held[0].expired()}
            self.peak = max(self.peak, sum(size for _, size in self.alive.values()) - self.start)


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def stack(count: int, channels: int = 8) -> nn.Module:
    """``count`` norms, each behind a convolution, in blocks of ten."""
    blocks = []
    for _ in range(count // 10):
        layers = []
        for _ in range(10):
            layers += [nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels)]
        blocks.append(nn.Sequential(*layers))
    return nn.Sequential(*blocks).eval()


def randomise(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean, 0.0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.3)
    return model.eval()


def bench_convert(repeats: int) -> list[str]:
    from torchvision.models import resnet152

    model = resnet152().eval()
    torchs = median_time(nn.SyncBatchNorm.convert_sync_batchnorm, lambda: copy.deepcopy(model), repeats)
    copied = median_time(lambda m: nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(m)), lambda: model, repeats)
    ours = median_time(lambda m: normswap.convert(m, "sync"), lambda: model, repeats)
    inplace = median_time(lambda m: normswap.convert(m, "sync", inplace=True), lambda: copy.deepcopy(model), repeats)
    lines = [
        f"| ResNet-152 to sync | median of {repeats}, ms | ratio to torch's converter on a deep copy |",
        "|---|---|---|",
        f"| `convert_sync_batchnorm(copy.deepcopy(m))` | {copied * 1e3:.0f} | 1 |",
        f"| `normswap.convert(m, 'sync')` | {ours * 1e3:.0f} | {ours / copied:.2f} |",
        f"| `convert_sync_batchnorm(m)`, in place | {torchs * 1e3:.0f} | {torchs / copied:.2f} |",
        f"| `normswap.convert(m, 'sync', inplace=True)` | {inplace * 1e3:.0f} | {inplace / copied:.2f} |",
        "",
    ]
    for kind in ("sync", "group"):
        copied_model = copy.deepcopy(model)
        with Allocations() as allocations:
            normswap.convert(copied_model, kind, inplace=True)
        kernels = sum(m.weight.nbytes for m in model.modules() if isinstance(m, nn.Conv2d))
        lines.append(
            f"In place to {kind}: {allocations.total / 1024:.0f} KiB of new tensors in all, the largest "
            f"{allocations.largest / 1024:.1f} KiB; the convolutions hold {kernels / 2**20:.0f} MiB."
        )
    lines += ["", "| norms | seconds | ms a norm | KiB of new tensors a norm |", "|---|---|---|---|"]
    for count in (1000, 2500, 5000, 10000):
        big = stack(count)
        again = copy.deepcopy(big)
        start = time.perf_counter()
        plan = normswap.plan_convert(big, "group")
        plan.apply(inplace=True)
        seconds = time.perf_counter() - start
        assert len(plan.changes) == count
        with Allocations() as allocations:
            normswap.convert(again, "group", inplace=True)
        lines.append(
            f"| {count} | {seconds:.2f} | {seconds / count * 1e3:.2f} | {allocations.total / count / 1024:.2f} |"
        )
    return lines


LARGE = (
    "resnet152", "densenet201", "regnet_y_16gf", "wide_resnet101_2", "efficientnet_v2_m", "inception_v3",
    "resnext101_32x8d",     "googlenet", "mnasnet1_3", "efficientnet_b4",
)  # fmt: skip


def bench_fold(repeats: int) -> list[str]:
    import torchvision
    from torch.fx.experimental.optimization import fuse

    lines = ["| model | torch.fx fuse, s | normswap.fold, s | ratio | in place, s |", "|---|---|---|---|---|"]
    ratios = []
    for name in LARGE:
        model = randomise(getattr(torchvision.models, name)(weights=None))
        theirs, ours, inplace = [], [], []
        for _ in range(repeats):  # alternating: the machine's mood falls on both
            theirs.append(median_time(fuse, lambda model=model: model, 1))
            ours.append(median_time(normswap.fold, lambda model=model: model, 1))
            inplace.append(
                median_time(lambda m: normswap.fold(m, inplace=True), lambda model=model: copy.deepcopy(model), 1)
            )
        a, b, c = (statistics.median(times) for times in (theirs, ours, inplace))
        ratios.append(b / a)
        lines.append(f"| {name} | {a:.2f} | {b:.2f} | {b / a:.2f} | {c:.2f} |")
        print(lines[-1], flush=True)
    lines += ["", f"Median ratio: {statistics.median(ratios):.2f}.", ""]
    model = randomise(torchvision.models.resnet152())
    largest = max(p.nbytes for p in model.parameters())
    with Allocations(model) as allocations:
        normswap.fold(model, inplace=True)
    lines.append(
        f"ResNet-152 in place: at most {allocations.peak / 2**20:.1f} MiB beyond the model's own at once, "
        f"{allocations.peak / largest:.2f} times its largest layer ({largest / 2**20:.1f} MiB)."
    )
    lines += ["", "| layers | seconds | ms a layer |", "|---|---|---|"]
    for count in (1000, 2500, 5000):
        big = randomise(stack(count))
        start = time.perf_counter()
        plan = normswap.plan_fold(big)
        plan.apply(inplace=True)
        seconds = time.perf_counter() - start
        assert all(change.into for change in plan.changes)
        lines.append(f"| {count} | {seconds:.2f} | {seconds / count * 1e3:.2f} |")
    return [*lines, "", *inference(repeats), "", *left_of_a_norm(repeats)]


DEPLOYED = ("resnet50", "densenet121", "efficientnet_b0", "mobilenet_v3_large", "regnet_y_1_6gf")


def session(model: nn.Module, x: torch.Tensor, optimized: bool) -> Callable[[], Any]:
    """A call of the model in ONNX Runtime, with or without the runtime's own fusions."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        path = normswap.export(model, Path(folder) / "model.onnx", (x,), optimize=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        if not optimized:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        loaded = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {loaded.get_inputs()[0].name: x.numpy()}
    return lambda: loaded.run(None, feed)


def alternating(runs: list[Callable[[], Any]], repeats: int) -> list[float]:
    """The fastest of ``repeats`` times of each, taken in turns: the machine's mood falls on all."""
    times: list[list[float]] = [[] for _ in runs]
    for run in runs:
        run()
    for _ in range(repeats):
        for run, taken in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            taken.append(time.perf_counter() - start)
    return [min(taken) for taken in times]


def inference(repeats: int) -> list[str]:
    """Time of a forward pass of the original, the torch.fx-fused and the folded model."""
    import torchvision
    from torch.fx.experimental.optimization import fuse

    lines = [
        "Time of one forward pass, batch 1, 224 x 224, relative to the original in the same runtime (fastest of "
        f"{3 * repeats}):",
        "",
        "| model | eager: fx | folded | ONNX Runtime, plain: fx | folded | optimizing: fx | folded |",
        "|---|---|---|---|---|---|---|",
    ]
    x = torch.randn(1, 3, 224, 224)
    for name in DEPLOYED:
        model = randomise(getattr(torchvision.models, name)(weights=None))
        models = [model, fuse(model), normswap.fold(model)]
        row = []
        with torch.no_grad():
            for runs in (
                [lambda each=each: each(x) for each in models],
                [session(each, x, optimized=False) for each in models],
                [session(each, x, optimized=True) for each in models],
            ):
                original, theirs, ours = alternating(runs, 3 * repeats)
                row += [theirs / original, ours / original]
        lines.append(f"| {name} | " + " | ".join(f"{ratio:.2f}" for ratio in row) + " |")
        print(lines[-1], flush=True)
    return lines


def left_of_a_norm(repeats: int) -> list[str]:
    """Time of a ``ChannelAffine`` relative to the BatchNorm that it stands for."""
    lines = [
        f"`ChannelAffine` relative to the BatchNorm it stands for (fastest of {10 * repeats}):",
        "",
        "| input | memory format | eager | ONNX Runtime plain | optimizing |",
        "|---|---|---|---|---|",
    ]
    for shape in ((1, 64, 56, 56), (8, 256, 28, 28), (1, 1024, 7, 7), (32, 512), (4, 128, 196), (2, 32, 8, 28, 28)):
        last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(len(shape))
        for layout in (torch.contiguous_format, last):
            if layout is None:
                continue
            kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)]
            norm = randomise(nn.Sequential(nn.Identity(), kind(shape[1])))
            affine = normswap.fold(norm)
            x = torch.randn(shape).to(memory_format=layout)
            row = []
            with torch.no_grad():
                for runs in (
                    [lambda each=each, x=x: each(x) for each in (norm, affine)],
                    [session(each, x, optimized=False) for each in (norm, affine)],
                    [session(each, x, optimized=True) for each in (norm, affine)],
                ):
                    theirs, ours = alternating(runs, 10 * repeats)
                    row.append(ours / theirs)
            name = "contiguous" if layout is torch.contiguous_format else "channels last"
            lines.append(f"| {tuple(shape)} | {name} | " + " | ".join(f"{ratio:.2f}" for ratio in row) + " |")
            print(lines[-1], flush=True)
    return lines


def bench_calibrate(seeds: int) -> list[str]:
    from scripts import bench_calibrate

    return [*bench_calibrate.bench(seeds), "", *bench_calibrate.cost()]


def bench_verify(repeats: int) -> list[str]:
    from scripts import bench_verify

    return bench_verify.bench(repeats)


def bench_files(repeats: int) -> list[str]:
    from scripts import bench_files

    return bench_files.bench(repeats)


BENCHES = {
    "convert": bench_convert,
    "fold": bench_fold,
    "layers": bench_layers,
    "calibrate": bench_calibrate,
    "verify": bench_verify,
    "files": bench_files,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", choices=BENCHES)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="replace this bench's section in a Markdown file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    lines = BENCHES[arguments.bench](arguments.repeats)
    command = f"python scripts/bench.py {arguments.bench} --repeats {arguments.repeats} --threads {arguments.threads}"
    head = f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}."
    section = "\n".join([f"## {arguments.bench}", "", f"`{command}`; {head}", "", *lines, ""])
    print(section)
    if arguments.out is not None:
        write_section(arguments.out, arguments.bench, section)


def write_section(path: Path, name: str, section: str) -> None:
    """Replace the section ``## name`` of a Markdown file, or append it."""
    title = "# Performance\n\nMeasured by `scripts/bench.py`: ratios within one run; the seconds are one machine's.\n\n"
    text = path.read_text() if path.exists() else title
    start = text.find(f"## {name}\n")
    if start < 0:
        path.write_text(text.rstrip("\n") + "\n\n" + section)
        return
    end = text.find("\n## ", start + 1)
    path.write_text(text[:start] + section + (text[end:] if end >= 0 else ""))


if __name__ == "__main__":
    main()
