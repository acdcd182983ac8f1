"""Reading a ``.pt2`` archive of ``torch.export`` without running code that the file brings.

``torch.export.load`` trusts what it is given: it unpickles weights, constants and sample inputs, loads compiled
libraries, and evaluates text of the archive as Python (sizes by sympy, guards and names by compiling a ``forward``).
What ``torch.export.save`` writes for a model of plain tensors needs none of this. So an archive is looked through
first, with torch's own zip reader and through one handle, and refused where it holds anything else:

- records other than a program in JSON, tensors as bytes, sample inputs and extra text;
- sample inputs that ``weights_only=True`` does not read;
- sizes and guards that are more than arithmetic, compared, on numbers, symbols and the sizes of inputs;
- targets of calls that are neither operators nor arithmetic on sizes, and names that are more than words, dots, dashes.

Running a program is another matter: it calls the operators it names, those of other libraries in this process too.
"""

from __future__ import annotations

import ast
import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch.export import ExportedProgram

from normswap.errors import NormswapError
from normswap.onnx.export import one_line, quiet
from normswap.provenance import WEIGHTS, read_metadata, state_digest

PROGRAM = "models/model.json"
INPUTS = "data/sample_inputs/model.pt"
CONFIGS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
RECORDS = re.compile(
    r"(data/weights/weight_\d+|data/constants/tensor_\d+|extra/[^/]+|archive_format|archive_version|byteorder"
    r"|\.data/(version|serialization_id|alignment)|\.format_version|\.storage_alignment)"
)
"""Records beside those above: tensors as bytes, extra files, and what the zip writer puts in."""

NAME = re.compile(r"[\w.+\-/:@ ]*")
TARGET = re.compile(
    r"_operator\.(add|and_|eq|floordiv|ge|getitem|gt|le|lshift|lt|mod|mul|ne|neg|or_|pos|pow|rshift|sub|truediv)"
    r"|math\.(trunc|floor|ceil)|torch\.sym_\w+|torch\.ops\.(?P<operator>\w+\.\w+(\.\w+)?)",
    re.ASCII,
)
"""What a node of a program may call: arithmetic on sizes, and operators."""
TEXT = re.compile("as_string|as_strings|custom|from_node|nn_module_stack|source_fn_stack|stack_trace|torch_fn")
"""Fields that torch keeps as text: arguments of operators, and notes on the origin of a node."""
SPECS = re.compile("in_spec|out_spec")
IMPORTED = frozenset({"__enum__", "default_factory_module"})
"""Keys in a structure that have torch import what their value names."""
EXPRESSIONS = re.compile("expr_str|guards_code")

FUNCTIONS = re.compile(
    "Abs|Add|And|Application|BooleanFalse|BooleanTrue|CeilDiv|CeilToInt|CleanDiv|Eq|Equality|Float|FloatPow"
    "|FloatTrueDiv|FloorDiv|FloorToInt|GreaterThan|Identity|IntTrueDiv|Integer|IsNonOverlappingAndDenseIndicator"
    "|LShift|LessThan|Max|Min|Mod|ModularIndexing|Mul|Ne|Not|Or|Piecewise|Pow|PowByNatural|PythonMod|RShift|Rational"
    "|RoundDecimal|RoundToInt|StrictGreaterThan|StrictLessThan|Symbol|ToFloat|TruncToFloat|TruncToInt|Unequality"
    "|Where|cast_symbool_to_symint_guardless|ceiling|floor|max|min|sqrt"
)
"""What sizes and guards may call, of sympy, of torch's own functions for it and of Python."""
METHODS = re.compile("size|stride|storage_offset")
NODES = (
    ast.Expression, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.Constant, ast.Load, ast.keyword, ast.Call,
    ast.Name, ast.Attribute, ast.Subscript, ast.Tuple, ast.operator, ast.unaryop, ast.boolop, ast.cmpop,
)  # fmt: skip


def load_exported(path: str | os.PathLike[str], *, trusted: bool = False) -> ExportedProgram:
    """The program in the archive at ``path``, as ``torch.export.load`` gives it. ``.module()`` of it can be called.

    With ``trusted``, the archive is not looked through first: what it holds runs with your rights.

    Weights that changed since :func:`normswap.export` wrote them are detected, by their digest in the file.

    Raises :class:`NormswapError` for a file that is not there, is damaged, is something else or of another version of
    the format, and, unless ``trusted``, for one that could run code of its own while it is read.
    """
    path = Path(path)
    if not path.is_file():
        raise NormswapError(f"{path} does not exist or is not a file")
    try:
        with path.open("rb") as file:
            _check_kind(path, file)
            if not trusted:
                _check_content(path, file)
            program = _load(file)
    except NormswapError:
        raise
    except OSError as error:
        raise NormswapError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:
        raise NormswapError(
            f"{path} cannot be read; it is damaged, of another version of torch, or needs a library that is not "
            f"imported: {one_line(error)}"
        ) from error
    digest = read_metadata(path).get(WEIGHTS)
    if digest is not None and digest != state_digest(program.state_dict):
        raise NormswapError(f"{path} is damaged: its weights are not those that were exported")
    return program


def _load(file: IO[bytes]) -> ExportedProgram:
    """Not by ``torch.export.load``: what that fails to read it takes for the older format, and unpickles."""
    from torch.export.pt2_archive._package import load_pt2

    file.seek(0)
    with quiet():
        return load_pt2(file).exported_programs["model"]


def _check_kind(path: Path, file: IO[bytes]) -> None:
    start = file.read(4)
    file.seek(0)
    if start != b"PK\x03\x04":
        raise NormswapError(f"{path} is no .pt2 archive (it is not a zip file)")
    try:
        reader = _reader(file)
        names = set(reader.get_file_names())
    except NormswapError:
        raise
    except Exception as error:
        raise NormswapError(f"{path} is damaged or no .pt2 archive: {one_line(error)}") from error
    if PROGRAM not in names:
        raise NormswapError(f"{path} is a .pt2 archive without an exported program")


def _reader(file: IO[bytes]) -> Any:
    try:
        from torch.export.pt2_archive import PT2ArchiveReader
    except ImportError as error:
        raise NormswapError(f"reading .pt2 archives needs torch 2.8 or newer ({error})") from error
    file.seek(0)
    return PT2ArchiveReader(file)


def _check_content(path: Path, file: IO[bytes]) -> None:
    for problem in _problems(_reader(file)):
        raise NormswapError(
            f"{path} is refused: {problem}, which torch may run as code while it reads it. "
            "If you trust where it comes from, pass trusted=True"
        )


def _problems(reader: Any) -> Iterator[str]:
    names = reader.get_file_names()
    for name in names:
        if name not in (PROGRAM, INPUTS, *CONFIGS) and not RECORDS.fullmatch(name):
            yield f"it holds {name[:100]!r}"
    for name in CONFIGS:
        for entry in json.loads(reader.read_bytes(name))["config"].values():
            if entry["use_pickle"] or not re.fullmatch(r"(weight|tensor)_\d+", entry["path_name"]):
                yield f"a tensor in it is pickled ({str(entry['path_name'])[:100]})"
    try:
        with quiet():
            torch.load(io.BytesIO(reader.read_bytes(INPUTS)), weights_only=True)
    except Exception:
        yield "its sample inputs are more than tensors and plain values"
    yield from _in_fields(json.loads(reader.read_bytes(PROGRAM)), "")


def _in_fields(value: Any, field: str) -> Iterator[str]:
    """Every text in the program by the field it is in; keys of mappings count as names."""
    if isinstance(value, dict):
        for key, entry in value.items():
            if not NAME.fullmatch(key):
                yield f"it names something {key[:100]!r}"
            if key == "constant_input":  # Goes into the text of a guard, between quotes.
                yield from _in_fields(list(entry["value"].values()), "name")
            yield from _in_fields(entry, key)
    elif isinstance(value, list):
        for entry in value:
            yield from _in_fields(entry, field)
    elif isinstance(value, str) and not TEXT.fullmatch(field):
        if EXPRESSIONS.fullmatch(field):
            if not _is_arithmetic(value):
                yield f"a size or guard in it is {value[:100]!r}"
        elif SPECS.fullmatch(field):
            yield from _in_structure(value)
        elif field in ("target", "as_operator"):
            if not _is_operator(value):
                yield f"it calls {value[:100]!r}"
        elif not NAME.fullmatch(value):
            yield f"it names something {value[:100]!r}"


def _in_structure(value: Any) -> Iterator[str]:
    """The nesting of inputs or outputs: JSON, with JSON for some of its texts; what is no name there is such a text."""
    if isinstance(value, dict):
        if IMPORTED & value.keys():
            yield "a structure in it names a class to import"
        yield from _in_structure([*value, *value.values()])
    elif isinstance(value, list):
        for entry in value:
            yield from _in_structure(entry)
    elif isinstance(value, str) and not NAME.fullmatch(value):
        try:
            inside = json.loads(value)
        except ValueError:
            inside = value
        if isinstance(inside, str):
            yield f"it names something {inside[:100]!r}"
        else:
            yield from _in_structure(inside)


def _is_operator(target: str) -> bool:
    found = TARGET.fullmatch(target)
    if found is None or found["operator"] is None:
        return found is not None
    operator: Any = torch.ops
    for name in found["operator"].split("."):
        operator = getattr(operator, name, None)
    return operator is None or isinstance(operator, torch._ops.OperatorBase)


def _is_arithmetic(text: str) -> bool:
    if re.search(r"[#\\\n\r]", text):
        return False
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return all(_is_plain(node) for node in ast.walk(tree))


def _is_plain(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):  # Torch puts the text of guards between quotes.
        return not isinstance(node.value, str) or NAME.fullmatch(node.value) is not None
    if isinstance(node, ast.Call):
        function = node.func
        return isinstance(function, ast.Attribute) or (
            isinstance(function, ast.Name) and FUNCTIONS.fullmatch(function.id) is not None
        )
    if isinstance(node, ast.Attribute):
        return METHODS.fullmatch(node.attr) is not None or (
            isinstance(node.value, ast.Name) and node.value.id == "math"
        )
    return isinstance(node, NODES)
