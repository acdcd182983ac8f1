"""Ways to run a program, behind one interface: inputs in, named outputs out."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from normswap.errors import NormswapError
from normswap.exported import load_exported
from normswap.onnx.export import check_model, one_line, quiet
from normswap.verification.inputs import Arguments, Freedom
from normswap.verification.outputs import Outputs, named_like
from normswap.verification.precision import call

Program = nn.Module | ExportedProgram | str | os.PathLike[str]
"""What can be compared: a module, a program of ``torch.export``, the path of an ``.onnx`` or a ``.pt2`` file."""


class Runner(Protocol):
    """One way to run a program."""

    name: str

    @property
    def freedom(self) -> Freedom:
        """Which axes of its inputs may have other sizes."""

    def __call__(self, inputs: Arguments, own: Outputs) -> Outputs:
        """Outputs by the names of ``own``, those of the reference."""


class EagerRunner:
    """A module, called. The module must be the runner's own."""

    def __init__(self, model: nn.Module, name: str = "eager", freedom: Freedom | None = None) -> None:
        self.model = model
        self.name = name
        self.freedom = freedom or Freedom(batch=True)

    def __call__(self, inputs: Arguments, own: Outputs) -> Outputs:
        return call(self.model, inputs)


class OnnxRunner:
    """An ``.onnx`` file in ONNX Runtime on the CPU, with graph optimizations or without."""

    def __init__(self, path: Path, *, optimized: bool) -> None:
        self.path = path
        self.optimized = optimized
        self.name = "onnxruntime" if optimized else "onnxruntime, graph optimizations off"
        self.session = session(path, optimized=optimized)

    @property
    def freedom(self) -> Freedom:
        shapes = [entry.shape for entry in self.session.get_inputs()]
        batch = all(shape and isinstance(shape[0], str) for shape in shapes)
        sizes = [size for shape in shapes for size in shape[2:]]
        return Freedom(batch, bool(sizes) and all(isinstance(size, str) for size in sizes))

    def check(self, inputs: Arguments) -> None:
        """Raise :class:`NormswapError` for inputs that are not the file's."""
        tensors = _tensors(inputs)
        names = [entry.name for entry in self.session.get_inputs()]
        if len(names) != len(tensors):
            raise NormswapError(
                f"{self.path.name} takes {len(names)} inputs ({', '.join(names)}) "
                f"and example_inputs hold {len(tensors)} tensors"
            )
        for leaf in tensors:
            if leaf.dtype == torch.bfloat16 or leaf.is_complex():
                raise NormswapError(f"ONNX Runtime is not given {leaf.dtype} inputs here; use backend='eager'")

    def __call__(self, inputs: Arguments, own: Outputs) -> Outputs:
        return named_like(map(torch.from_numpy, self.session.run(None, feeds(self.session, inputs))), own)

    def named(self, inputs: Arguments) -> Outputs:
        """Outputs by the names that they have in the file."""
        names = [entry.name for entry in self.session.get_outputs()]
        return dict(zip(names, self(inputs, {}).values(), strict=True))


def _tensors(inputs: Arguments) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]


def feeds(opened: Any, inputs: Arguments) -> dict[str, Any]:
    """What a session is given for ``inputs``."""
    names = [entry.name for entry in opened.get_inputs()]
    return dict(zip(names, (leaf.detach().cpu().numpy() for leaf in _tensors(inputs)), strict=True))


def runtime() -> Any:
    """The ``onnxruntime`` module. Raises :class:`NormswapError` where it is not installed."""
    try:
        import onnxruntime
    except ImportError as error:
        raise NormswapError(f"verification needs onnxruntime ({error}): pip install normswap[onnx]") from error
    return onnxruntime


def session(model: Path | bytes, *, optimized: bool, folder: Path | None = None) -> Any:
    """An ONNX Runtime session on the CPU of a file, or of a model in memory whose external data lie in ``folder``.

    Raises :class:`NormswapError` for a file that is not there or that ONNX Runtime cannot load."""
    onnxruntime = runtime()
    if isinstance(model, Path) and not model.is_file():
        raise NormswapError(f"{model} does not exist or is not a file")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    try:
        source = model if isinstance(model, bytes) else str(model)
        with quiet():  # It prints before it raises.
            return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        name = model.name if isinstance(model, Path) else "the model"
        raise NormswapError(
            f"ONNX Runtime cannot load {name}: {one_line(error)}; backend='eager' compares without it"
        ) from error


def opened(program: Program) -> nn.Module | Path:
    """A program as a module, or as the path of an ``.onnx`` file.

    Raises :class:`NormswapError` for what is none, and for a ``.pt2`` file that cannot be loaded."""
    if isinstance(program, str | os.PathLike):
        path = Path(program)
        if path.suffix != ".pt2":
            return path
        program = load_exported(path)
    if isinstance(program, ExportedProgram):
        guards = "check_guards" in inspect.signature(program.module).parameters  # They refuse float64.
        return program.module(check_guards=False) if guards else program.module()
    check_model(program)
    return program


def batch_is_open(model: nn.Module) -> bool:
    """Whether a module takes other batch sizes, as far as is known: a graph from ``torch.export`` says so itself."""
    nodes = model.graph.find_nodes(op="placeholder") if isinstance(model, GraphModule) else ()
    values = (node.meta.get("val") for node in nodes)
    return not any(isinstance(v, Tensor) and v.dim() and isinstance(v.shape[0], int) for v in values)


def freedom_of(runners: Sequence[Runner]) -> Freedom:
    """What all of them leave open."""
    found = [runner.freedom for runner in runners]
    return Freedom(all(each.batch for each in found), all(each.spatial for each in found))
