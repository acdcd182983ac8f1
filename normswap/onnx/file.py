"""Reading and writing ``.onnx`` files: no code is run, nothing outside the folder is read, no output is partial.

External data stays where it is until it is used, and stays external: it is streamed, tensor by tensor, to
``NAME.onnx.data`` beside the output. What was in the ``.onnx`` file itself stays there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import onnx
import onnx.checker
import onnx_ir as ir
from onnx_ir.external_data import convert_tensors_to_external
from onnx_ir.passes.common import CheckerPass

from normswap.errors import NormswapError
from normswap.files import check_output, whole_file
from normswap.onnx.export import one_line, quiet
from normswap.onnx.graph import Tensor, shape_of

STREAMED = (ir.ExternalTensor, ir.LazyTensor)
"""Tensors that are in an external file, or computed from one while they are written."""
LARGEST = 2**31 - 1
"""Bytes a protobuf message, and so one ``.onnx`` file, can hold."""
FILES = "normswap.files"
"""In ``model.meta``: the files that a model was read from, which are never written."""


def read(path: str | os.PathLike[str]) -> ir.Model:
    """The model in the ``.onnx`` file ``path``; tensors in external files are mapped into memory when they are used.

    Raises :class:`NormswapError` for a file that is none, is truncated or is refused by the ONNX checker, and for
    external data that is missing, too short or outside the folder of the file.
    """
    path = Path(path).resolve()
    if not path.is_file():
        raise NormswapError(f"{path}: there is no such file" if not path.exists() else f"{path} is not a file")
    if path.stat().st_size > LARGEST:
        raise NormswapError(f"{path}: an .onnx file holds at most 2 GiB; larger weights are in files beside it")
    try:
        proto = onnx.load_model(str(path), format="protobuf", load_external_data=False)
    except Exception as error:
        raise NormswapError(f"{path} is not an ONNX model, or is truncated ({one_line(error)})") from error
    if not proto.ir_version or not proto.opset_import or not proto.graph.ByteSize():
        raise NormswapError(f"{path} is not an ONNX model: it has no graph, or no operator set")
    if proto.training_info or any(graph.sparse_initializer for graph in _graphs(proto.graph)):
        raise NormswapError(f"{path} has training information or sparse weights, which would be lost")
    try:
        with quiet():
            model = ir.serde.deserialize_model(proto)
        check_external(model, path)
        locations = (path.parent / str(tensor.location) for _, tensor in _external(model))
        model.meta[FILES] = [path, *dict.fromkeys(locations)]
        ir.external_data.set_base_dir(model.graph, path.parent)
        _load_attributes(model)
        for value in _initializers(model):
            if not isinstance(value.const_value, ir.ExternalTensor) and value.const_value is not None:
                value.const_value.numpy()  # raises for data of another size
        check(model)
    except NormswapError:
        raise
    except Exception as error:
        raise NormswapError(f"{path}: the ONNX checker refuses the file ({one_line(error)})") from error
    return model


def check(model: ir.Model) -> None:
    """Raise the error of the ONNX checker; large weights are not copied for it, nor external ones looked for."""
    values = [value for value in model.graph.initializers.values() if isinstance(value.const_value, STREAMED)]
    tensors = [value.const_value for value in values]
    for value, tensor in zip(values, tensors, strict=True):
        if tensor is not None:
            value.shape, value.dtype = shape_of(tensor), tensor.dtype
        value.const_value = None
    try:
        with quiet():
            CheckerPass()(model)
    finally:
        for value, tensor in zip(values, tensors, strict=True):
            value.const_value = tensor


def check_external(model: ir.Model, path: Path) -> None:
    """Raise :class:`NormswapError` for external data that must not or cannot be read."""
    folder = path.parent
    for name, tensor in _external(model):
        location = str(tensor.location)
        outside = PurePosixPath(location).is_absolute() or PureWindowsPath(location).drive or not location
        if outside or not (folder / location).resolve().is_relative_to(folder):
            raise NormswapError(f"{path}: the data of {name!r} is at {location!r}, outside the folder of the model")
        file = folder / location
        if not file.is_file():
            raise NormswapError(f"{path}: the data of {name!r} is in {location!r}, which is missing")
        start = tensor.offset or 0
        length = tensor.nbytes if tensor.length is None else tensor.length
        if start < 0 or length != tensor.nbytes or start + length > file.stat().st_size:
            raise NormswapError(f"{path}: the data of {name!r} in {location!r} is truncated, or of another size")


def data_path(out: Path) -> Path:
    """Where the external data of the model at ``out`` is."""
    return out.with_name(out.name + ".data")


def streamed(model: ir.Model) -> list[ir.Value]:
    """The initializers whose tensors go to an external file."""
    return [value for value in _initializers(model) if isinstance(value.const_value, STREAMED)]


def check_destination(model: ir.Model, out: Path, *, force: bool) -> None:
    """Raise :class:`NormswapError` for an output that could not be written after long work."""
    if out.suffix != ".onnx":
        raise NormswapError(f"output {out}: a model read from an .onnx file is written to one; name it *.onnx")
    check_output(out, force=force, inputs=model.meta[FILES])
    if streamed(model):
        check_output(data_path(out.resolve()), force=force, inputs=model.meta[FILES])


def write(model: ir.Model, out: Path, *, force: bool = False) -> list[Path]:
    """Write a model that :func:`read` gave to ``out``, checked; the paths written.

    The data file appears first, the model last; after an error neither does. ``model`` stays as it is.
    Raises :class:`NormswapError` as :func:`check_destination` does, and when the ONNX checker refuses the model.
    """
    check_destination(model, out, force=force)
    out, inputs = out.resolve(), model.meta[FILES]
    try:
        check(model)
    except Exception as error:
        raise NormswapError(f"{out}: the ONNX checker refuses the result ({one_line(error)}); not written") from error
    values = streamed(model)
    tensors = [value.const_value for value in values]
    data = data_path(out)
    fresh = not data.exists()
    try:
        with whole_file(out, force=force, inputs=inputs) as file:
            if values:
                with whole_file(data, force=force, inputs=inputs) as temporary:
                    _move(values, temporary, data)
            file.write_bytes(ir.serde.serialize_model(model).SerializeToString())
    except BaseException as error:
        if fresh and values:
            data.unlink(missing_ok=True)
        if isinstance(error, ValueError) and not isinstance(error, NormswapError):
            raise NormswapError(f"{out}: it cannot be written ({one_line(error)})") from error
        raise
    finally:
        for value, tensor in zip(values, tensors, strict=True):
            value.const_value = tensor
    return [out, data] if values else [out]


def _move(values: list[ir.Value], temporary: Path, data: Path) -> None:
    """Write the tensors of some initializers to a file that will be called ``data``."""
    tensors: list[Any] = [value.const_value for value in values]
    for value, tensor in zip(
        values, convert_tensors_to_external(tensors, temporary.parent, temporary.name), strict=True
    ):
        value.const_value = ir.ExternalTensor(
            data.name,
            tensor.offset,
            tensor.length,
            tensor.dtype,
            shape=tensor.shape,
            name=tensor.name or value.name or "",
            base_dir=data.parent,
        )


def _load_attributes(model: ir.Model) -> None:
    """External data that stands elsewhere than in the main graph goes into memory, and later into the file itself."""
    for node in _nodes(model):
        for name, attribute in list(node.attributes.items()):
            if not attribute.is_ref() and isinstance(attribute.value, ir.ExternalTensor):
                node.attributes[name] = ir.AttrTensor(name, _loaded(attribute.value))
    for graph in model.graphs():
        for value in graph.initializers.values() if graph is not model.graph else ():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = _loaded(value.const_value)


def _loaded(tensor: ir.ExternalTensor) -> Tensor:
    return ir.Tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=tensor.name)


def _initializers(model: ir.Model) -> Iterator[ir.Value]:
    for graph in model.graphs():
        yield from graph.initializers.values()


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    for graph in model.graphs():
        yield from graph
    for function in model.functions.values():
        yield from function


def _external(model: ir.Model) -> Iterator[tuple[str, ir.ExternalTensor]]:
    for value in _initializers(model):
        if isinstance(value.const_value, ir.ExternalTensor):
            yield value.name or "", value.const_value
    for node in _nodes(model):
        for attribute in node.attributes.values():
            if not attribute.is_ref() and isinstance(attribute.value, ir.ExternalTensor):
                yield node.name or node.op_type, attribute.value


def _graphs(graph: Any) -> Iterator[Any]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _graphs(inner)
