"""Switchable normalization on a GPU against the bandwidth of its memory, ``torch.compile`` and ``nn.BatchNorm2d``.

    python scripts/bench_gpu.py [--repeats 50] [--out docs/performance.md]

Without a GPU it says so and measures nothing. What is measured, and how, is in ``METHOD``."""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

from normswap.norms.moments import plain
from normswap.norms.passes import KernelPasses, passes
from normswap.norms.switchable import Mixture, SwitchableNorm2d

SHAPE = (64, 256, 56, 56)
MOVED = 8
"""Tensors of the size of x that go through memory."""
METHOD = f"""\
Forward and backward of Switchable at {SHAPE}, bfloat16 and float32, either memory format. The bound is the
time in which the GPU copies the bytes that must move. No cache holds x between its moments and its use, so it is
read twice forward and the result written; backward x and the gradient are read twice and the gradient of x written:
{MOVED} times the bytes of x, where a copy moves 2. Times are medians between CUDA events, taken in turns after a
warm-up. Captured is the same work replayed as a CUDA graph, without the time of launching; the kernels are also
timed alone. Gradients are compared first with those of the plain formula in float64."""
FORMATS = {"NCHW": torch.contiguous_format, "channels last": torch.channels_last}
Run = Callable[[], object]


class Plain(SwitchableNorm2d):
    """The formula in torch's operations, for ``torch.compile``."""

    def forward(self, x: Tensor) -> Tensor:
        tensors = (self.mean_gate, self.var_gate, self.weight, self.bias, None, None)
        out, seen = plain(x, Mixture(self.eps, instance=True), *tensors)
        self.track(*seen)
        return out


def step(module: nn.Module, x: Tensor, gradient: Tensor) -> None:
    x.grad = None
    module.zero_grad(set_to_none=True)
    module(x).backward(gradient)


def milliseconds(runs: dict[str, Run], repeats: int) -> dict[str, float]:
    """Median time of each, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 10):
        for name, run in runs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            if turn >= 10:
                times[name].append(start.elapsed_time(end))
    return {name: statistics.median(each) for name, each in times.items()}


def captured(run: Run) -> Run:
    """``run`` as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def check(x: Tensor, gradient: Tensor) -> None:
    """Raise ``RuntimeError`` where the kernels are not used, or wrong."""
    x, gradient = x.detach()[:8].clone(memory_format=torch.preserve_format).requires_grad_(), gradient[:8]
    exact = x.detach().double().requires_grad_()
    for module, each in ((SwitchableNorm2d(x.shape[1]), x), (Plain(x.shape[1]).double(), exact)):
        step(module.to(x.device), each, gradient.to(each.dtype))
    assert x.grad is not None
    assert exact.grad is not None
    error = float((x.grad.double() - exact.grad).abs().max() / exact.grad.abs().max())
    bound = 4 * torch.finfo(x.dtype).eps + 1e-5
    if type(passes(x.detach())) is not KernelPasses or not error <= bound:
        raise RuntimeError(
            f"{x.dtype}: {type(passes(x.detach())).__name__}, gradient off by {error:.1e} of {bound:.1e}"
        )


def alone(x: Tensor, gradient: Tensor) -> dict[str, Run]:
    """The kernels without what is between them."""
    over = passes(x)
    mean, var = over.measure(x)
    scale = var.rsqrt()
    return {
        "kernel moments": lambda: over.measure(x),
        "kernel affine": lambda: over.affine(x, scale, mean),
        "kernel sums": lambda: over.sums(x, gradient),
        "kernel gradient": lambda: over.combine(x, gradient, scale, mean, var),
    }


def table(repeats: int) -> list[str]:
    lines = ["| case | " + " | ".join(["ms", "share of the bound"]) + " |", "|---|---|---|"]
    for dtype in (torch.bfloat16, torch.float32):
        for name, layout in FORMATS.items():
            torch.compiler.reset()
            x = (torch.randn(SHAPE, device="cuda") + 1).to(dtype).to(memory_format=layout).requires_grad_()
            gradient = torch.randn(SHAPE, device="cuda").to(dtype).to(memory_format=layout)
            check(x, gradient)
            modules: dict[str, nn.Module] = {"switchable": SwitchableNorm2d(SHAPE[1]).cuda()}
            compiled = torch.compile(Plain(SHAPE[1]).cuda())
            modules["torch.compile of the formula"] = compiled  # type: ignore[assignment]
            modules["nn.BatchNorm2d"] = nn.BatchNorm2d(SHAPE[1]).cuda()
            runs: dict[str, Run] = {each: partial(step, module, x, gradient) for each, module in modules.items()}
            for each in ("switchable", "torch.compile of the formula"):
                runs[f"{each}, captured"] = captured(runs[each])
            runs.update(alone(x.detach(), gradient))
            runs["copy"] = partial(torch.empty_like(gradient).copy_, gradient)
            found = milliseconds(runs, repeats)
            bound = found.pop("copy") * MOVED / 2
            case = f"{str(dtype).removeprefix('torch.')}, {name}"
            lines.append(f"| {case}: the bound | {bound:.3f} | 1.00 |")
            for each, time in found.items():
                share = "" if each.startswith("kernel") else f"{bound / time:.2f}"
                lines.append(f"| {case}: {each} | {time:.3f} | {share} |")
            print("\n".join(lines[-len(found) - 1 :]), flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--out", type=Path, help="replace the section of a Markdown file")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU is at hand (torch.cuda.is_available() is False): nothing was measured")
        return
    head = f"{torch.cuda.get_device_name()}; torch {torch.__version__}, Python {platform.python_version()}."
    command = f"`python scripts/bench_gpu.py --repeats {arguments.repeats}`; {head}"
    section = "\n".join(["## gpu", "", command, "", METHOD, "", *table(arguments.repeats), ""])
    print(section)
    if arguments.out is not None:
        from scripts.bench import write_section

        write_section(arguments.out, "gpu", section)


if __name__ == "__main__":
    main()
