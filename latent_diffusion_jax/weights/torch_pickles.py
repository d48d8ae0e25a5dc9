"""What the pickles in Torch's files describe, read without executing them.

A pickle is a program, which may call anything that it names; here its names resolve to the few
things that tensors need, and everything else to objects that take every call and do nothing:
published files have a trainer's objects beside their tensors. What names programs to run is
refused, and what would take far more memory or time than its length, before it does.
"""

import collections
import dataclasses
import pickle
import pickletools
from collections.abc import Callable
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

MAX_PICKLE = 64 << 20  # bytes; that of Stable Diffusion with its optimizer has less than one MiB
MAX_OPERATIONS = 1_000_000  # of a pickle, each of which may make an object; that one has 100,000
MAX_NAMES = 10_000  # of things that are not tensors, each of which takes 2 KiB
MAX_KEYS = 10_000  # that are tuples or sets, which may be made to have one hash and take for ever
MAX_LONG = 1_000  # numbers of over 64 bits, for the same reason; a trainer's generators have some
MAX_BITS = 4_096  # that those have
MAX_DIMS = 64  # NumPy's

DTYPES = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": jnp.bfloat16,
    "float8_e4m3fn": jnp.float8_e4m3fn,
    "float8_e5m2": jnp.float8_e5m2,
    "int64": np.int64,
    "int32": np.int32,
    "int16": np.int16,
    "int8": np.int8,
    "uint64": np.uint64,
    "uint32": np.uint32,
    "uint16": np.uint16,
    "uint8": np.uint8,
    "bool": np.bool_,
    "complex64": np.complex64,
    "complex128": np.complex128,
}
STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "UntypedStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}
# What no weights need, and harmful files call. Nothing would be executed without this list either:
# it is there so that whoever loads such a file hears of it. Names are Python 2's where Torch saves.
HARMFUL_MODULES = frozenset({
    "_pickle", "bdb", "cPickle", "cProfile", "code", "codeop", "commands", "ctypes", "ftplib",
    "http", "httplib", "imp", "importlib", "marshal", "nt", "os", "pdb", "pickle", "pip", "posix",
    "profile", "pty", "runpy", "shutil", "smtplib", "socket", "subprocess", "sys", "timeit",
    "urllib", "urllib2", "webbrowser",
})  # fmt: skip
HARMFUL_FUNCTIONS = frozenset({
    "__import__", "breakpoint", "compile", "delattr", "eval", "exec", "execfile", "globals", "open",
    "setattr", "CodeType", "FunctionType",
})  # fmt: skip


class FormatError(ValueError):
    """Says what is wrong with a file, as the end of a sentence about it."""


def _refuse_state(self: Any, state: Any) -> None:
    """`__setstate__` of what a pickle may hold and not change, as no file of Torch does."""
    raise FormatError(f"it is damaged: its pickle changes a {type(self).__name__.strip('_')}")


@dataclasses.dataclass(frozen=True, slots=True)
class _DType:
    """A dtype by its name in Torch: NumPy's own are shared objects, which a pickle could change."""

    name: str

    __setstate__ = _refuse_state

    def numpy(self) -> np.dtype:
        return np.dtype(DTYPES[self.name])


@dataclasses.dataclass(frozen=True, slots=True)
class Storage:
    """A run of numbers in the file."""

    key: str
    dtype: np.dtype
    size: int  # numbers
    first: int = 0  # number that a view begins at

    __setstate__ = _refuse_state


@dataclasses.dataclass(frozen=True, slots=True)
class Tensor:
    """Where a tensor lies in its storage; offset and strides count numbers."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    __setstate__ = _refuse_state


@dataclasses.dataclass(frozen=True, slots=True)
class _Function:
    """What a pickle may call. A `functools.partial` it could make call itself, without end."""

    call: Callable[..., Any]

    def __call__(self, *arguments: Any) -> Any:
        return self.call(*arguments)

    __setstate__ = _refuse_state


class _Inert:
    """Stands for an object that is not needed. Takes what pickles do to objects and does nothing.

    `find_class` makes new subclasses for each read: what a pickle sets on one, no other read sees.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Inert":
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _ignore(self, *args: Any, **kwargs: Any) -> None:
        pass

    __call__ = __setstate__ = __setitem__ = append = extend = add = _ignore


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Any:
    """What `torch._utils._rebuild_tensor_v2` is called with, kept for later."""
    if not isinstance(storage, Storage) or type(offset) is not int:
        return _Inert()
    return Tensor(storage, offset, _dims(shape), _dims(strides))


def _rebuild_typed_tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, *_: Any
) -> Any:
    """As above for dtypes that have no storage class: the storage is of bytes."""
    if not isinstance(storage, Storage) or type(offset) is not int:
        return _Inert()
    size = storage.size // dtype.numpy().itemsize
    storage = dataclasses.replace(storage, dtype=dtype.numpy(), size=size)
    return Tensor(storage, offset, _dims(shape), _dims(strides))


def _dims(values: Any) -> tuple[Any, ...]:
    """A shape or strides; of others `_view` says whose they are."""
    valid = isinstance(values, tuple | list) and len(values) <= MAX_DIMS
    return tuple(values) if valid and all(isinstance(n, int) for n in values) else (-1,)


def _rebuild_parameter(tensor: Any, *_: Any) -> Any:
    return tensor


REBUILD: dict[str, Callable[..., Any]] = {
    "_rebuild_tensor": _rebuild_tensor,
    "_rebuild_tensor_v2": _rebuild_tensor,
    "_rebuild_tensor_v3": _rebuild_typed_tensor,
    "_rebuild_parameter": _rebuild_parameter,
    "_rebuild_parameter_with_state": _rebuild_parameter,
}


class _Unpickler(pickle.Unpickler):
    """Resolves what tensors need; whatever else a pickle names is inert."""

    def __init__(self, file: BinaryIO):
        # Files of Python 2 hold byte strings; Latin-1 has a character for each byte.
        super().__init__(file, encoding="latin1")  # type: ignore[arg-type]
        self.dtypes: dict[str, np.dtype] = {}  # of the storages, by key
        self._inert: dict[tuple[str, str], type] = {}
        self._copied = 0  # items that ordered dicts were made of

    def find_class(self, module: str, name: str) -> Any:
        builtin = module in ("builtins", "__builtin__", "types")
        if module.partition(".")[0] in HARMFUL_MODULES or (builtin and name in HARMFUL_FUNCTIONS):
            raise FormatError(
                f"its pickle calls {f'{module}.{name}'!r}, which no weights need: it is made to do "
                "harm; it was not executed, and nothing of it is used"
            )
        if (module, name) == ("collections", "OrderedDict"):
            return _Function(self._ordered)
        if module == "torch._utils" and name in REBUILD:
            return _Function(REBUILD[name])
        if module in ("torch", "torch.storage") and name in STORAGES:
            return _DType(STORAGES[name])
        if module == "torch" and name in DTYPES:
            return _DType(name)
        if (module, name) not in self._inert:
            if len(self._inert) >= MAX_NAMES:
                raise FormatError(f"its pickle names more than {MAX_NAMES} things beside tensors")
            self._inert[module, name] = type("Inert", (_Inert,), {})
        return self._inert[module, name]

    def _ordered(self, items: Any = ()) -> Any:
        """An ordered dict; Python 2 gives its items along, others set them later."""
        if not all(isinstance(key, str) for key, _ in items):
            return _Inert()  # hooks of a module, say: tensors have names
        self._copied += len(items)
        if self._copied > MAX_OPERATIONS:
            raise FormatError(f"its pickle makes dicts of more than {MAX_OPERATIONS} items")
        return collections.OrderedDict(items)

    def persistent_load(self, pid: Any) -> Any:
        if not (isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage"):
            return _Inert()
        if not isinstance(pid[1], _DType):
            return _Inert()
        if type(pid[2]) not in (str, int):
            raise FormatError("it is damaged: a storage has no valid name")
        dtype, key, size = pid[1].numpy(), str(pid[2]), int(pid[4])
        self.dtypes[key] = dtype
        if len(pid) > 5 and pid[5] is not None:  # a part of another storage, in old files
            first, size = int(pid[5][1]), int(pid[5][2])
            return Storage(key, dtype, size, first)
        return Storage(key, dtype, size)


def load(file: BinaryIO) -> tuple[Any, dict[str, np.dtype]]:
    """What the next pickle of a file holds, and the dtypes of its storages.

    Raises:
      FormatError: it would take far more memory or time than its length.
    """
    start = file.tell()
    tuples, long = _Tuples(), 0
    for count, (code, argument, place) in enumerate(pickletools.genops(file)):
        # Objects are numbered as they come; the unpickler makes room for all numbers up to one.
        numbers = code.name in ("PUT", "BINPUT", "LONG_BINPUT")
        if numbers and not (isinstance(argument, int) and 0 <= argument <= count):
            raise FormatError("it is damaged: its pickle numbers objects that are not there")
        if place is not None and place - start > MAX_PICKLE:
            raise FormatError(f"its pickle has more than {MAX_PICKLE >> 20} MiB")
        if count > MAX_OPERATIONS:
            raise FormatError(f"its pickle has more than {MAX_OPERATIONS} operations")
        bits = argument.bit_length() if isinstance(argument, int) else 0
        long += bits > 64
        if long > MAX_LONG or bits > MAX_BITS:
            raise FormatError("its pickle has numbers without end, or too many that are very large")
        tuples.follow(code, argument)
    file.seek(start)
    unpickler = _Unpickler(file)
    return unpickler.load(), unpickler.dtypes


# Operations that put keys into dicts and sets: where those begin in what they take from the stack.
_KEYED = {"SETITEM": 1, "SETITEMS": 1, "DICT": 0, "ADDITEMS": 1, "FROZENSET": 0}
_KEEPING = (  # whose results hold what they take
    *("REDUCE", "OBJ", "INST", "NEWOBJ", "NEWOBJ_EX", "BUILD"),
    *("BINPERSID", "DUP", "FROZENSET"),
)


class _Tuples:
    """Follows a pickle's stack for how large tuples are with all that is in them.

    A tuple that holds another one twice, and so on, is small and takes for ever as a dict's key; so
    do many that have the same hash. Sets that cannot change are like them.
    """

    def __init__(self) -> None:
        self._stack: list[int] = []  # sizes of tuples, and of what is made of them; else 1
        self._marks: list[int] = []
        self._numbered: dict[int, int] = {}
        self._total = 0
        self._keys = 0  # of dicts and sets, that are tuples or sets themselves

    def follow(self, code: pickletools.OpcodeInfo, argument: Any) -> None:
        """Takes one operation; raises FormatError where tuples become too large."""
        if code.name == "MARK":
            self._marks.append(len(self._stack))
            return
        if code.name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            number = len(self._numbered) if code.name == "MEMOIZE" else argument
            self._numbered[number] = self._stack[-1] if self._stack else 1
            return
        if code.name in ("GET", "BINGET", "LONG_BINGET"):
            self._stack.append(self._numbered.get(argument, 1))
            return
        taken = len(code.stack_before)
        if pickletools.markobject in code.stack_before and self._marks:
            below = code.stack_before.index(pickletools.markobject)
            taken = len(self._stack) - self._marks.pop() + below
        taken = min(taken, len(self._stack))
        parts = self._stack[len(self._stack) - taken :]
        del self._stack[len(self._stack) - taken :]
        self._total += sum(parts)
        if self._total > 20 * MAX_OPERATIONS:
            raise FormatError("it is damaged: its pickle has tuples without end in each other")
        if code.name in _KEYED:
            keys = parts[-2:-1] if code.name == "SETITEM" else parts[_KEYED[code.name] :]
            step = 2 if code.name in ("SETITEMS", "DICT") else 1
            self._keys += sum(size > 1 for size in keys[::step])
            if self._keys > MAX_KEYS:
                raise FormatError(f"it is damaged: its pickle has over {MAX_KEYS} keys of tuples")
        keeps = code.name.startswith("TUPLE") or code.name in _KEEPING
        self._stack += [1 + sum(parts) if keeps else 1] * len(code.stack_after)
