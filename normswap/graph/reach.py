"""What the code of a module's ``forward`` can reach, read from its bytecode without running it.

Two questions are answered, per class and once: may this ``forward`` call a norm *function* (then it is worth tracing),
and which attributes of its children does it read (``self.norm1.weight``: then the child is more than a callable, and a
replacement must have that attribute too). Calls are followed through methods, helper functions, closures and containers
of functions. The answer errs on the side of yes."""

from __future__ import annotations

import builtins
import dis
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import fx, nn

from normswap.graph.functional import NAMES, is_norm_function

_LOOKS_AT = frozenset({"hasattr", "getattr", "type", "__class__", "__name__"})
_BY_NAME = frozenset({"vars", "attrgetter", "eval", "exec"})
_ALL_MODULES = frozenset(
    {
        "children",
        "modules",
        "named_children",
        "named_modules",
        "get_submodule",
        "_modules",
        "__dict__",
        "__getattr__",
        "get_parameter",
        "apply",
    }
)
_ALL_TENSORS = frozenset({"parameters", "named_parameters", "state_dict"})
_CALL_ONLY = frozenset({"forward", "__call__", "training", "train", "eval", "to", "parameters", "named_parameters"})


@dataclass
class Reach:
    """The norm functions that code may call, and the ``(child, attribute)`` pairs it reads from ``self``."""

    functions: set[str] = field(default_factory=set)
    child_reads: set[tuple[str, str]] = field(default_factory=set)
    handled: set[str] = field(default_factory=set)
    """Children that are used as values, not only called: iterated, indexed, passed on."""
    described: set[tuple[str, str]] = field(default_factory=set)
    """As ``child_reads``, of which only the type, the place or the shape is asked: ``self.norm.weight.dtype``."""
    foreign: set[str] = field(default_factory=set)
    """Attributes read from other objects than ``self``: a loop variable, an argument, a child's child."""
    loaded: set[str] = field(default_factory=set)
    """Attributes of ``self`` that are read or called."""
    classes: set[type] = field(default_factory=set)
    """Module classes that are named, as in ``isinstance(layer, nn.BatchNorm2d)``."""
    asked: set[str] = field(default_factory=set)
    """Texts in code that looks at attributes or class names: ``hasattr(layer, "running_mean")``."""
    tricks: set[str] = field(default_factory=set)
    """Means to reach any module or tensor by which no name is seen: ``getattr``, ``self.modules()``."""

    def update(self, other: Reach) -> None:
        self.functions |= other.functions
        self.child_reads |= other.child_reads
        self.handled |= other.handled
        self.described |= other.described
        self.foreign |= other.foreign
        self.loaded |= other.loaded
        self.classes |= other.classes
        self.asked |= other.asked
        self.tricks |= other.tricks


def reach(module: nn.Module) -> Reach:
    """What the ``forward`` of this module can reach, children's own ``forward`` not included."""
    if isinstance(module, fx.GraphModule):
        return Reach({"graph"} if any(is_norm_function(node.target) for node in module.graph.nodes) else set())
    found = Reach()
    if is_compiled_wrapper(module):
        return found
    cls: Any = type(module)
    values = [value for value in vars(module).values() if isinstance(value, _CODE)]
    if not values:
        return _of_class(cls)
    found.update(_of_class(cls))
    for value in values:
        if isinstance(value, types.MethodType) and value.__self__ is not module:
            continue  # the code of another object
        found.update(_of_value(value, cls, set(), 4))
    return found


_CODE = (types.FunctionType, types.MethodType, types.BuiltinFunctionType, partial)


def is_compiled_wrapper(module: nn.Module) -> bool:
    """Whether a module is what ``torch.compile`` returns, which keeps the ``__call__`` of its ``_orig_mod``."""
    return type(module).__name__ == "OptimizedModule" and "_orig_mod" in module._modules


@cache
def of_method(cls: type, method: str) -> Reach:
    """What one method of a class can reach."""
    seen: set[Any] = set()
    found = Reach()
    for function in _methods(cls, method):
        found.update(_of_value(function, cls, seen, 12))
    return found


@cache
def _of_class(cls: type) -> Reach:
    seen: set[Any] = set()
    found = Reach()
    for function in _methods(cls, "forward"):
        found.update(_of_value(function, cls, seen, 12))
    return found


def _methods(cls: type, name: str) -> Iterator[Any]:
    """The definitions of a method along the MRO, so that ``super()`` is covered; not ``nn.Module``'s own."""
    for base in cls.__mro__:
        if base not in (nn.Module, object) and name in vars(base):
            value = vars(base)[name]
            yield value.__func__ if isinstance(value, (staticmethod, classmethod)) else value


def _all_methods(cls: type, prefix: str = "") -> Iterator[Any]:
    for base in cls.__mro__:
        if not base.__module__.startswith("torch.") and base is not object:
            named = ((name, value) for name, value in vars(base).items() if name.startswith(prefix))
            yield from (value for name, value in named if name != "__init__" and callable(value))


def _prefix(behind: list[dis.Instruction], this: str) -> str | None:
    """How the name in ``getattr(self, name)`` begins, where it is written out: ``"norm"`` in ``f"norm{index}"``;
    ``None`` in ``getattr(self.child, name)``, which gives no method of ``self``."""
    if len(behind) < 3:
        return ""
    if behind[0].argval == "getattr":  # of what another one gives
        behind = behind[1:]
    if not behind[0].opname.startswith("LOAD_FAST") or behind[0].argval != this:
        return ""
    if (behind[1].opname == "LOAD_ATTR" and behind[1].argval != "__class__") or len(behind) < 3:
        return None
    if behind[1].opname == "LOAD_ATTR":
        return ""
    text, then = behind[1], behind[2]
    if text.opname != "LOAD_CONST" or not isinstance(text.argval, str):
        return ""
    if then.opname in ("LOAD_ATTR", "LOAD_METHOD") and then.argval != "format":
        return ""
    return text.argval.partition("{")[0].partition("%")[0]


def _of_value(value: Any, cls: type, seen: set[Any], depth: int) -> Reach:
    found = Reach()
    if is_norm_function(value):
        found.functions.add(getattr(value, "__name__", str(value)))
        return found
    if isinstance(value, partial):
        return _of_value(value.func, cls, seen, depth)
    if isinstance(value, property):
        return _of_value(value.fget, cls, seen, depth)
    if isinstance(value, types.MethodType):
        return _of_value(value.__func__, cls, seen, depth)
    if isinstance(value, torch.jit.ScriptFunction):
        found.functions |= {name for name in NAMES if f"aten::{name}(" in str(value.graph)}
        return found
    if isinstance(value, (list, tuple, dict)) and depth > 0 and len(value) < 64:
        for item in value.values() if isinstance(value, dict) else value:
            if callable(item) and not isinstance(item, type):
                found.update(_of_value(item, cls, seen, 1))
        return found
    if not isinstance(value, types.FunctionType) or depth <= 0 or value.__code__ in seen:
        return found
    if (value.__module__ or "").partition(".")[0] == "torch" and not _is_forward(value):
        return found
    seen.add(value.__code__)
    cells = {}
    for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
        try:
            cells[name] = cell.cell_contents
        except ValueError:  # not filled yet
            continue
    for item in (*cells.values(), getattr(value, "__wrapped__", None)):
        if item is not None and not isinstance(item, type):
            found.update(_of_value(item, cls, seen, depth - 1))
    found.update(_of_code(value.__code__, value.__globals__, cells, cls, seen, depth))
    return found


def _is_forward(function: types.FunctionType) -> bool:
    return "Module" not in function.__qualname__ and "." in function.__qualname__


def _of_code(
    code: types.CodeType, names: dict[str, Any], cells: dict[str, Any], cls: type, seen: set[Any], depth: int
) -> Reach:
    found = Reach()
    this = code.co_varnames[0] if code.co_argcount else None
    if this in code.co_cellvars:  # a comprehension or an inner function uses self
        cells = {**cells, this: _SELF}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found.update(_of_code(constant, names, cells, cls, seen, depth))
    used = set(code.co_names)
    generated = code.co_filename.startswith("<eval_with_key>")  # by FX, in which getattr only names a child
    if used & _LOOKS_AT and not generated:
        texts = {text for constant in code.co_consts for text in _texts(constant)}
        found.asked |= {text for text in texts if not text.isdigit()}  # getattr(self.blocks, "1")
    found.tricks |= used & (_BY_NAME | _ALL_MODULES)
    if used & _ALL_TENSORS and "next" not in used:  # next(self.parameters()).device is common and harmless
        found.tricks |= used & _ALL_TENSORS
    imports = any(instruction.opname == "IMPORT_NAME" for instruction in dis.get_instructions(code))
    current: Any = None  # the object on top of the stack, as far as it is known
    child: str | None = None  # the attribute of self that is on top of the stack
    super_pending = False
    read: tuple[str, str] | None = None  # the child's attribute that was just read
    instructions = list(dis.get_instructions(code))
    for index, instruction in enumerate(instructions):
        name = instruction.opname
        value = instruction.argval
        if name in ("LOAD_GLOBAL", "LOAD_NAME"):
            current, child = names.get(value, getattr(builtins, value, None)), None
            super_pending = super_pending or current is super
            if current is getattr and this is not None and not generated:  # a method may be chosen by name
                prefix = _prefix(instructions[index + 1 : index + 4], this)
                for method in () if prefix is None else _all_methods(cls, prefix):
                    found.update(_of_value(method, cls, seen, depth - 1))
                _note_getattr(found, instructions[index + 1 : index + 4], this)
            found.update(_of_value(current, cls, seen, depth - 1))
            found.classes.update(_module_classes(current))
        elif name in ("LOAD_DEREF", "LOAD_CLASSDEREF"):
            current, child = cells.get(value), None
            found.classes.update(_module_classes(current))
        elif name.startswith("LOAD_FAST"):
            last = value[-1] if isinstance(value, tuple) else value
            current, child = (_SELF if last == this else None), None
        elif name in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"):
            if name == "LOAD_SUPER_ATTR" or current is _SUPER or current is _SELF:
                for method in _methods(cls, value):
                    found.update(_of_value(method, cls, seen, depth - 1))
                if current is _SELF:
                    found.loaded.add(value)
                    if _handles(instructions, index):
                        found.handled.add(value)
                child, current = (value if current is _SELF else None), None
            elif child is not None:
                if value not in _CALL_ONLY:
                    found.child_reads.add((child, value))
                read = (child, value)
                child, current = None, None
                continue
            elif read is not None and value in ("dtype", "device", "shape"):
                found.child_reads.discard(read)
                found.described.add(read)
            else:
                known = isinstance(current, (types.ModuleType, torch._ops._OpNamespace, torch._ops._Ops))
                if not known:
                    found.foreign.add(value)
                if value in NAMES and (known or imports):
                    found.functions.add(value)
                current = getattr(current, value, None) if known else None
                found.update(_of_value(current, cls, seen, depth - 1))
                found.classes.update(_module_classes(current))
        elif name == "IMPORT_FROM" and value in NAMES:
            found.functions.add(value)
        elif name in ("CALL", "CALL_FUNCTION"):
            current, child = (_SUPER if super_pending else None), None
            super_pending = False
        elif name not in ("PUSH_NULL", "PRECALL", "CACHE", "RESUME", "EXTENDED_ARG"):
            current, child = None, None
        read = None
    return found


def _note_getattr(found: Reach, behind: list[dis.Instruction], this: str | None) -> None:
    """``getattr(self, ...)`` and ``getattr(self.child, ...)``: as the attribute, where its name is written out."""
    if not behind or not behind[0].opname.startswith("LOAD_FAST") or behind[0].argval != this:
        return
    child = behind[1].argval if behind[1].opname == "LOAD_ATTR" else None
    name = behind[1] if child is None else behind[2]
    if name.opname != "LOAD_CONST" or not isinstance(name.argval, str):
        found.tricks.add("getattr")
    elif child is None:
        found.loaded.add(name.argval)
        found.handled.add(name.argval)
    else:
        found.child_reads.add((child, name.argval))


def _texts(constant: Any) -> Iterator[str]:
    if isinstance(constant, str):
        yield constant
    elif isinstance(constant, (tuple, frozenset)):
        for item in constant:
            yield from _texts(item)


def _module_classes(value: Any) -> Iterator[type]:
    for item in value if isinstance(value, (tuple, list)) else (value,):
        if isinstance(item, type) and issubclass(item, nn.Module) and item is not nn.Module:
            yield item


def _handles(instructions: list[dis.Instruction], index: int) -> bool:
    """Whether the attribute of ``self`` loaded here is used as a value: not called, not compared with None, not read
    from."""
    here, behind = instructions[index], [i.opname for i in instructions[index + 1 : index + 4]]
    if here.opname == "LOAD_METHOD" or (
        here.opname == "LOAD_ATTR" and sys.version_info >= (3, 12) and here.arg and here.arg & 1
    ):
        return False
    following = behind[0] if behind else ""
    compared = following == "LOAD_CONST" and len(behind) > 1 and behind[1] == "IS_OP"
    return not (following.startswith(("POP_JUMP", "LOAD_ATTR", "LOAD_METHOD", "TO_BOOL", "COPY")) or compared)


_SELF = object()
_SUPER = object()
