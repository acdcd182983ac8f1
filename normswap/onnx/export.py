"""Writing a model to an ``.onnx`` or ``.pt2`` file with torch's own exporters, checked, and whole or not at all.

The exporters (``torch.onnx.export`` over ``torch.export``, and ``torch.export`` alone) trace the forward pass and
translate it. Here they are made safe to call from a library:

- They are given a copy that shares the parameters: what a ``forward`` caches while traced does not stay in the model.
- They build the mode in, and write a batch normalization in train mode as one in eval mode, in silence. A model in
  train mode is refused.
- They fall back in silence to a fixed axis or another operator set. Their result is searched for both, and refused.
- Their prints, log lines and warnings are kept back; their errors are not.
- What the file was made of is written into it (:mod:`normswap.provenance`).
"""

from __future__ import annotations

import copy
import io
import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from normswap import archive, provenance
from normswap.dynamic import Request, Sizes, request
from normswap.errors import NormswapError
from normswap.files import check_output, whole_file, whole_files
from normswap.graph.reach import is_compiled_wrapper

LARGEST = 2**31 - 2**25
"""Bytes of weights that go into one ``.onnx`` file: a protobuf message holds 2 GiB, with the graph."""

SMALL = 256
"""Bytes of a tensor that stays in the ``.onnx`` file when the weights are beside it: a shape, a scalar."""

SUFFIXES = (".onnx", ".pt2")


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: tuple[Any, ...],
    *,
    opset: int | None = None,
    optimize: bool = True,
    dynamic: Mapping[str, Any] | bool | None = None,
    external_data: bool = False,
    recipe: provenance.Recipe | Sequence[provenance.Recipe] | None = None,
    metadata: Mapping[str, str] | None = None,
    force: bool = False,
) -> Path:
    """Write ``model`` in eval mode to ``path``, an ``.onnx`` file or a ``.pt2`` archive, and return that path.

    ``example_inputs`` are the positional arguments of one call; tensors become inputs of the graph, everything else a
    constant in it. ``dynamic=True`` makes the first axis of every input tensor one dynamic axis named ``batch``. A
    mapping names axes for each argument of ``forward``, ``{"x": {0: "batch", 2: "height", 3: "width"}}``
    (:func:`normswap.dynamic.request` says what else it takes). Otherwise all shapes are fixed. For sizes at which the
    code takes another way, a ``.pt2`` program raises when it runs. The model is left as it was.

    Only for ``.onnx``: ``opset`` is the version of the operator set (the exporter's own default when ``None``).
    ``optimize=False`` leaves the graph as it was translated, with batch normalizations in it where the model has them.
    Weights of more than 2 GiB, and with ``external_data`` any of more than 256 bytes, go to ``NAME.onnx.data`` beside
    the file; the two belong together, and both appear or neither.

    Versions, a digest of the weights, ``recipe`` (that of a plan, or a list of them, oldest first) and ``metadata``
    (text by name) are written into the file; :func:`normswap.read_metadata` reads them.

    Raises :class:`NormswapError` for a path that cannot be written or exists (without ``force``), a missing ``onnx`` or
    ``onnxscript``, a model in train mode, a model the exporter cannot translate (with the exporter's error in one
    line), a dynamic axis that came out fixed, and a graph that the ONNX checker refuses.
    """
    target = Path(path)
    if target.suffix not in SUFFIXES:
        raise NormswapError(f"{target}: an ONNX file is named *.onnx, an archive of torch.export *.pt2")
    check_output(target, force=force)
    check_inputs(example_inputs)
    if target.suffix == ".pt2":
        if opset is not None or external_data:
            raise NormswapError(f"{target}: opset and external_data are for .onnx files")
        onnx = None
    else:
        onnx = _onnx()
    check_model(model)
    check_eval(model, "export")
    subject = isolated(model, share=True)
    asked = request(subject, example_inputs, dynamic)
    entries = provenance.origin(subject, recipe, metadata)
    if onnx is None:
        return _write_archive(subject, target, example_inputs, asked, entries, force=force)
    if external_data:
        check_output(_data_path(target), force=force)
    program = _translate(subject, example_inputs, opset, optimize, asked)
    version = program.model.opset_imports.get("")
    if opset is not None and version != opset:
        raise NormswapError(
            f"{target}: the exporter could not convert the graph to opset {opset} and left it at {version}"
        )
    sizes = [(value.name, _sizes(value.shape)) for value in program.model.graph.inputs]
    _check_axes(asked, sizes, target)
    entries |= {provenance.ONNXSCRIPT: _onnxscript_version(), provenance.OPSET: str(version)}
    program.model.metadata_props.update(entries)
    names = asked.renamed(sizes)
    if external_data or _weight_bytes(program) > LARGEST:
        _write_parts(onnx, program, names, target, force=force)
        return target
    proto = _renamed(program.model_proto, names)
    _check_graph(onnx, proto, target)
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


def _onnxscript_version() -> str:
    import onnxscript

    return str(onnxscript.__version__)


def _translate(
    model: nn.Module, example_inputs: tuple[Any, ...], opset: int | None, optimize: bool, asked: Request
) -> Any:
    try:
        with quiet(), torch.no_grad():
            return torch.onnx.export(
                model,
                (*example_inputs, {}),  # A dict in last place would be taken for keyword arguments.
                dynamo=True,
                optimize=optimize,
                opset_version=opset,
                dynamic_shapes=asked.shapes,
                verbose=False,
            )
    except Exception as error:
        raise NormswapError(
            f"the ONNX exporter cannot translate {type(model).__name__}: {_exporter_error(error)}"
        ) from error


def _sizes(shape: Any) -> list[int | str | None]:
    return [size if isinstance(size, int) else size.value for size in shape or ()]


def _check_axes(asked: Request, sizes: Sizes, target: Path) -> None:
    if problem := asked.problem(sizes):
        raise NormswapError(f"{target}: {problem}")


def _weight_bytes(program: Any) -> int:
    values = program.model.graph.initializers.values()
    return sum(value.const_value.nbytes for value in values if value.const_value is not None)


def _data_path(target: Path) -> Path:
    return target.with_name(target.name + ".data")


def _write_parts(onnx: Any, program: Any, names: Mapping[str, str], target: Path, *, force: bool) -> None:
    """The graph to ``target`` and the weights beside it; the graph names their file, relative to its own place."""
    from onnx_ir import external_data

    data = _data_path(target)
    with whole_files((data, target), force=force) as folder:
        (folder / data.name).touch()  # All weights may be too small to be put there.
        external_data.unload_from_model(program.model, folder, data.name, size_threshold_bytes=SMALL)
        file = folder / target.name
        file.write_bytes(_renamed(program.model_proto, names).SerializeToString())
        _check_graph(onnx, file, target)


def _check_graph(onnx: Any, graph: Any, target: Path) -> None:
    try:
        with quiet():
            onnx.checker.check_model(graph, full_check=True)
    except Exception as error:
        raise NormswapError(f"{target}: the ONNX checker refuses the exported graph: {one_line(error)}") from error


def _renamed(proto: Any, names: Mapping[str, str]) -> Any:
    """``proto`` with the symbols of its sizes under other names, in place."""
    if names:
        symbols = re.compile(rf"\b({'|'.join(map(re.escape, names))})\b")
        for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
            for dim in value.type.tensor_type.shape.dim:
                if dim.dim_param:
                    dim.dim_param = symbols.sub(lambda found: names[found[0]], dim.dim_param)
    return proto


def _write_archive(
    model: nn.Module,
    target: Path,
    example_inputs: tuple[Any, ...],
    asked: Request,
    entries: Mapping[str, str],
    *,
    force: bool,
) -> Path:
    try:
        with quiet(), torch.no_grad():
            program = archive.translate(model, example_inputs, asked.shapes)
    except Exception as error:
        name = type(model).__name__
        raise NormswapError(f"torch.export cannot translate {name}: {_exporter_error(error)}") from error
    _check_axes(asked, archive.sizes(program), target)
    with whole_file(target, force=force) as temporary:
        try:
            with quiet():
                archive.save(program, temporary, entries)
        except OSError:
            raise
        except Exception as error:
            raise NormswapError(f"{target}: torch.export cannot save the graph: {one_line(error)}") from error
    return target


def _exporter_error(error: BaseException) -> str:
    """The causes below the exporter's own wrapper (which only says at which step it was), outermost first."""
    violated = r"Constraints violated \((.*?)\).*?specialized it to be a constant \((\d+)\)"
    if fixed := re.search(violated, str(error), re.DOTALL):
        return f"its code fixes the dynamic axis {fixed[1]} at {fixed[2]}; leave that axis out of dynamic"
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
            f"cannot {purpose} a model in train mode ({named}{more}): an exported graph is for inference, with "
            "its mode built in. Call model.eval() first"
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
        with quiet():
            return copy.deepcopy(model, memo)
    except Exception as error:
        raise NormswapError(
            f"{type(model).__name__} cannot be copied ({one_line(error)}); make its modules work with copy.deepcopy"
        ) from error


def _unwrapped(model: nn.Module) -> nn.Module:
    while True:
        inner = getattr(model, "_orig_mod", None) if is_compiled_wrapper(model) else None
        if inner is None and isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _attributes(module: nn.Module) -> Iterator[Tensor]:
    values = {name: value for name, value in vars(module).items() if name != "_modules"}
    yield from (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))
