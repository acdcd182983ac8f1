"""Writing a model to an ONNX file with torch's own exporter, checked, and whole or not at all.

The exporter (``torch.onnx.export`` over ``torch.export``) traces the forward pass and translates it. Here it is
made safe to call from a library:

- It is given a copy that shares the parameters: what a ``forward`` caches while traced does not stay in the model.
- It writes a batch normalization in train mode as one in eval mode, in silence. A model in train mode is refused.
- It falls back in silence to a fixed batch axis or another operator set. Its result is searched for both, and refused.
- Its prints, log lines and warnings are kept back; its errors are not.
"""

from __future__ import annotations

import copy
import io
import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from normswap.errors import NormswapError
from normswap.files import check_output, whole_file

LARGEST = 2**31 - 1
"""Bytes a protobuf message, and so one ``.onnx`` file, can hold."""


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: tuple[Any, ...],
    *,
    opset: int | None = None,
    optimize: bool = True,
    dynamic: Mapping[str, Any] | bool | None = None,
    force: bool = False,
) -> Path:
    """Write ``model`` in eval mode to the ``.onnx`` file ``path`` and return that path.

    ``example_inputs`` are the positional arguments of one call; tensors become inputs of the graph, everything else a
    constant in it. ``opset`` is the version of the ONNX operator set (the exporter's own default when ``None``).
    ``optimize=False`` leaves the graph as it was translated, with batch normalizations in it where the model has them.
    ``dynamic=True`` makes the first axis of every input tensor one dynamic axis named ``batch``; a mapping goes to the
    exporter as ``dynamic_shapes`` (argument name to ``{axis: torch.export.Dim}``); otherwise all shapes are fixed. The
    model is left as it was.

    Raises :class:`NormswapError` for a path that cannot be written or exists (without ``force``), a missing ``onnx`` or
    ``onnxscript``, a model in train mode, weights of more than 2 GiB, a model the exporter cannot translate (with the
    exporter's error in one line), a dynamic axis that came out fixed, and a graph that the ONNX checker refuses.
    """
    target = Path(path)
    if target.suffix != ".onnx":
        raise NormswapError(f"{target}: an ONNX file is named *.onnx")
    check_output(target, force=force)
    check_inputs(example_inputs)
    onnx = _onnx()
    check_model(model)
    check_eval(model, "export")
    program = _translate(isolated(model, share=True), example_inputs, opset, optimize, dynamic)
    size = sum(
        value.const_value.nbytes for value in program.model.graph.initializers.values() if value.const_value is not None
    )
    if size > LARGEST:
        raise NormswapError(
            f"{target}: the weights take {size / 2**30:.1f} GiB and one .onnx file holds 2 GiB; "
            "export in a smaller dtype, or in parts"
        )
    proto = program.model_proto
    version = next((entry.version for entry in proto.opset_import if not entry.domain), None)
    if opset is not None and version != opset:
        raise NormswapError(
            f"{target}: the exporter could not convert the graph to opset {opset} and left it at {version}"
        )
    if dynamic is True:
        _check_batch_axis(proto, target)
    try:
        with quiet():
            onnx.checker.check_model(proto, full_check=True)
    except Exception as error:
        raise NormswapError(f"{target}: the ONNX checker refuses the exported graph: {one_line(error)}") from error
    with whole_file(target, force=force) as temporary:
        temporary.write_bytes(proto.SerializeToString())
    return target


def _onnx() -> Any:
    try:
        import onnx
        import onnx.checker
        import onnxscript  # noqa: F401  (what torch's exporter imports late)
    except ImportError as error:
        raise NormswapError(f"ONNX export needs onnx and onnxscript ({error}): pip install normswap[onnx]") from error
    return onnx


def _translate(
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    opset: int | None,
    optimize: bool,
    dynamic: Mapping[str, Any] | bool | None,
) -> Any:
    shapes: Any = dict(dynamic) if isinstance(dynamic, Mapping) else None
    try:
        with quiet(), torch.no_grad():
            if dynamic is True:
                shapes = _batch_axes(model, example_inputs)
            return torch.onnx.export(
                model,
                (*example_inputs, {}),  # A dict in last place would be taken for keyword arguments.
                dynamo=True,
                optimize=optimize,
                opset_version=opset,
                dynamic_shapes=shapes,
                verbose=False,
            )
    except Exception as error:
        raise NormswapError(
            f"the ONNX exporter cannot translate {type(model).__name__}: {_exporter_error(error)}"
        ) from error


def _batch_axes(model: nn.Module, example_inputs: tuple[Any, ...]) -> Any:
    batch = torch.export.Dim("batch")
    shapes: Any = torch.export.ShapesCollection()
    for leaf in tree_leaves(example_inputs):
        if isinstance(leaf, Tensor) and leaf.dim() > 0:
            shapes[leaf] = {0: batch}
    return shapes.dynamic_shapes(model, example_inputs)


def _check_batch_axis(proto: Any, target: Path) -> None:
    """Require a dynamic first axis on every input of rank at least 1, and name it ``batch`` throughout the graph."""
    names = set()
    for value in proto.graph.input:
        dims = value.type.tensor_type.shape.dim
        if not dims:
            continue
        if not dims[0].dim_param:
            raise NormswapError(
                f"{target}: the exporter fixed the batch axis of input {value.name!r} at {dims[0].dim_value}, "
                "because the model's code depends on it; export without dynamic=True, or name the axes that may vary"
            )
        names.add(dims[0].dim_param)
    if len(names) != 1:
        return  # Several symbols that the exporter did not unify: each keeps its own name.
    symbol = re.compile(rf"\b{re.escape(names.pop())}\b")
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = symbol.sub("batch", dim.dim_param)


def _exporter_error(error: BaseException) -> str:
    """The causes below the exporter's own wrapper (which only says at which step it was), outermost first."""
    chain = [error]
    while (below := chain[-1].__cause__) is not None:
        chain.append(below)
    return "; ".join(one_line(part) for part in (chain[1:] or chain))


def one_line(error: BaseException) -> str:
    """Type and first line of an error, without terminal colours, at most 300 characters."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    first = text.splitlines()[0] if text else ""
    return f"{type(error).__name__}: {first}"[:300] if first else type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back prints, log records and warnings of the code inside; exceptions pass."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def check_model(model: object) -> None:
    """Raise :class:`NormswapError` for what is not an ``nn.Module``, or is one compiled by TorchScript."""
    if isinstance(model, torch.jit.ScriptModule):
        raise NormswapError(f"{type(model).__name__} is a TorchScript module; pass the Python module it was made from")
    if not isinstance(model, nn.Module):
        raise NormswapError(f"expected an nn.Module, got {type(model).__name__}")


def check_inputs(example_inputs: object) -> None:
    """Raise :class:`NormswapError` unless ``example_inputs`` is a tuple."""
    if not isinstance(example_inputs, tuple):
        raise NormswapError(
            f"example_inputs is a {type(example_inputs).__name__}; it must be a tuple of arguments, as in (x,)"
        )


def training_modules(model: nn.Module) -> list[str]:
    """Dotted names of the modules in train mode; ``""`` is the root.

    Modules whose flag says nothing are not listed: the bare containers that torch.fx makes, and a graph from
    ``torch.export``, whose mode is built in.
    """
    names = []
    fixed: set[nn.Module] = set()
    for name, module in model.named_modules():
        if "eval" in vars(module):  # torch.export puts a method that raises over it.
            fixed.update(module.modules())
        if module.training and module not in fixed and type(module) is not nn.Module:
            names.append(name)
    return names


def check_eval(model: nn.Module, purpose: str) -> None:
    """Raise :class:`NormswapError` when a module of ``model`` is in train mode."""
    if training := training_modules(model):
        named = ", ".join(name or f"the model itself ({type(model).__name__})" for name in training[:3])
        more = f" and {len(training) - 3} more" if len(training) > 3 else ""
        raise NormswapError(
            f"cannot {purpose} a model in train mode ({named}{more}): an ONNX graph computes what eval mode does. "
            "Call model.eval() first"
        )


def isolated(model: nn.Module, *, share: bool) -> nn.Module:
    """A copy of ``model`` whose ``forward`` cannot change the original.

    With ``share``, parameters, buffers and other tensors in the modules' attributes are those of the original; without,
    they are copies. A data-parallel or compiled wrapper is left off. Tensors that autograd made (a cache, the weight of
    an old-style weight norm), which ``copy.deepcopy`` refuses, are detached. Raises :class:`NormswapError` when a
    module cannot be copied.
    """
    model = _unwrapped(model)
    memo: dict[int, Any] = {}
    for module in model.modules():
        for tensor in _attributes(module):
            if share:
                memo[id(tensor)] = tensor
            elif not tensor.is_leaf:
                memo[id(tensor)] = tensor.detach().clone()
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise NormswapError(
            f"{type(model).__name__} cannot be copied ({one_line(error)}); make its modules work with copy.deepcopy"
        ) from error


def _unwrapped(model: nn.Module) -> nn.Module:
    while True:
        inner = getattr(model, "_orig_mod", None)  # torch.compile
        if inner is None and isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _attributes(module: nn.Module) -> Iterator[Tensor]:
    values = {name: value for name, value in vars(module).items() if name != "_modules"}
    yield from (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))
