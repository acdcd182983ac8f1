"""The Triton kernels: in the interpreter, on a GPU where there is one, and compiled for one that is not there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from normswap.norms import passes
from normswap.norms.passes import NativePasses
from normswap.norms.switchable import SwitchableNorm2d
from scripts import bench_gpu

ROOT = Path(__file__).resolve().parent.parent
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
"""It has wheels for Linux alone."""
GPU = pytest.param("gpu", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"))


@needs_triton
@pytest.mark.parametrize("where", ["interpreter", GPU])
def test_against_the_plain_passes(where: str) -> None:
    """In a process of its own: triton decides when it is imported whether it interprets."""
    environment = {**os.environ, "TRITON_INTERPRET": "1" if where == "interpreter" else "0"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/kernel_checks.py"]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-5000:] + ran.stderr[-2000:]
    assert re.search(r"^[.\s]+\[100%\]$", ran.stdout, re.MULTILINE), ran.stdout[-500:]  # none was skipped


def test_without_a_gpu_they_are_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "normswap.norms.kernels", None)  # Its import would fail.
    x = torch.randn(2, 3, 4, 5, requires_grad=True)
    SwitchableNorm2d(3)(x).sum().backward()
    assert type(passes.passes(x)) is NativePasses


def test_without_triton_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(2, 3, 4, 5)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert passes.has_kernels(x) == (find_spec("triton") is not None)
    monkeypatch.setattr(passes, "_installed", lambda: False)
    assert not passes.has_kernels(x)
    assert type(passes.passes(x)) is NativePasses


@needs_triton
@pytest.mark.parametrize("last", [False, True])
def test_they_compile_for_a_gpu(last: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without one, for Hopper: values come in pieces of 16 bytes, whichever axis is the innermost."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from normswap.norms import kernels

    layout = kernels.Layout.of(64, 256, 56 * 56, last)
    rows, chunk = layout.tile
    one = "kept_stride" if last else "step"
    for kernel in (kernels._moments, kernels._sums, kernels._combine):
        names = kernel.arg_names
        fixed = {"ROWS": rows, "CHUNK": chunk, "WIDE": kernels.tl.float32, "GRADIENT": True, one: 1}
        fixed = {name: value for name, value in fixed.items() if name in names}
        kinds = {name: "constexpr" if name in fixed else "i32" for name in names}
        kinds.update({name: "*bf16" for name in names if name in ("x", "grad", "out")})
        small = ("mean", "square", "totals", "products", "slope", "factor", "level")
        kinds.update({name: "*fp64" for name in names if name in small})
        even = {(index,): [["tt.divisibility", 16]] for index, name in enumerate(names) if name not in fixed}
        constants = {(names.index(name),): value for name, value in fixed.items()}
        source = ASTSource(kernel, kinds, constants, even)
        code = compile_kernel(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
        large = 2 if "grad" in names else 1
        assert len(re.findall(r"ld\.global\.v4\.b32", code)) >= 2 * large


def test_the_benchmark_says_that_there_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py", "--out", str(tmp_path / "out.md")])
    bench_gpu.main()
    assert capsys.readouterr().out.startswith("no GPU is at hand")
    assert list(tmp_path.iterdir()) == []


@needs_triton
@pytest.mark.parametrize("last", [False, True])
def test_tiles(last: bool) -> None:
    from normswap.norms.kernels import PROGRAMS, TILE, Layout

    for sizes in ((1, 1, 1), (64, 256, 3136), (2, 3, 1 << 20), (4096, 8, 1), (1, 5000, 7), (70000, 3, 49)):
        layout = Layout.of(*sizes, last)
        rows, chunk = layout.tile
        assert rows * chunk <= TILE
        assert rows & (rows - 1) == chunk & (chunk - 1) == 0
        assert layout.part % chunk == 0
        parts = -(-layout.length // layout.part)
        programs = layout.outer * -(-layout.kept // rows)
        assert parts == 1 or programs * (parts - 1) < PROGRAMS
