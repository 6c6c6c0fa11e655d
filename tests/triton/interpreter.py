# SPDX-License-Identifier: Apache-2.0
"""What Triton's interpreter needs before its results may be believed: right bfloat16, and a memory checker.

bfloat16: the interpreter keeps it in numpy arrays of uint16 and computes on these bit patterns; from float32 it
truncates. Here values are widened to float32 before each operation and rounded to nearest even after it, which is
what a GPU does.

Memory: every active lane of a load, store or atomic must lie inside the very tensor that its pointer was made
from, which compute-sanitizer cannot tell. To that end each tensor argument gets a number, carried in the upper 16
bits of its address: pointer arithmetic leaves them alone, and no address in user space has them.

Also, a launch takes less time, and says nothing of overflow, as a GPU does not.

Made for triton 3.6 to 3.9. ``test_interpreter.py`` fails where it no longer holds.
"""

import itertools

import numpy as np
import triton.language as tl
from triton.language.core import is_builtin
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

# Of floats; which of these there are depends on the version.
_NAMES = (
    "fadd fsub fmul fdiv precise_divf approx_divf frem fneg fma clampf dot minimumf maximumf minnumf maxnumf"
)
FLOAT_ARITHMETIC = {f"create_{name}" for name in _NAMES.split()} & set(dir(InterpreterBuilder))
COMPARISONS = [name for name in dir(InterpreterBuilder) if name.startswith(("create_fcmp", "create_icmp"))]
ADDRESS_BITS = 48

_tensors = {}  # number of a tensor argument -> its first byte, the byte after its last, what to call it
_numbers = itertools.count()


def apply() -> None:
    """Repair the interpreter of this process; a second call changes nothing."""
    if hasattr(InterpreterBuilder, "repaired"):
        return
    InterpreterBuilder.repaired = True
    for name, function in (("create_minnumf", np.fmin), ("create_maxnumf", np.fmax)):
        setattr(InterpreterBuilder, name, _by(function))
    for name in FLOAT_ARITHMETIC:
        _wrap(InterpreterBuilder, name, _in_float32)
    for name in COMPARISONS:
        _wrap(InterpreterBuilder, name, _compare)
    _wrap(InterpreterBuilder, "cast_impl", _cast)
    _wrap(interpreter, "_implicit_cvt", _numbered)
    _wrap(InterpreterBuilder, "create_masked_load", _inside_tensor("load", pointer=0, mask=1))
    _wrap(InterpreterBuilder, "create_masked_store", _inside_tensor("store", pointer=0, mask=2))
    _wrap(InterpreterBuilder, "create_atomic_rmw", _inside_tensor("atomic", pointer=1, mask=3))
    _wrap(InterpreterBuilder, "create_atomic_cas", _inside_tensor("atomic", pointer=0, mask=None))
    _wrap(GridExecutor, "__call__", _quietly)
    _wrap(interpreter, "_patch_lang", _patch_once)
    _wrap(interpreter, "_patch_lang_tensor", _patch_index)


def _wrap(owner, name, wrapper):
    """Have ``owner.name(...)`` call ``wrapper(what it was, ...)``."""
    original = getattr(owner, name)
    setattr(owner, name, lambda *args, **kwargs: wrapper(original, *args, **kwargs))


def _by(function):
    """Of numbers and NaN the number, unless NaN is asked for, as on a GPU; the interpreter always has NaN."""
    return lambda builder, a, b: builder.binary_op(a, b, function)


def _quietly(original, *args, **kwargs):
    with np.errstate(all="ignore"):
        return original(*args, **kwargs)


def _patch_once(original, function):
    """A launch has patched triton.language: doing so again at every call inside takes longer than the call."""
    patched = not any(is_builtin(module.load) for module in (tl, tl.core))
    return interpreter._LangPatchScope() if patched else original(function)


def _patch_index(original, tensor, scope):
    """In triton 3.6 a loop up to a kernel argument is an error with numpy 2.4, a warning before."""
    original(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


def _in_float32(original, builder, *operands, **kwargs):
    result = original(builder, *map(_widened, operands), **kwargs)
    handles = [operand for operand in operands if isinstance(operand, TensorHandle)]
    return _rounded(result) if all(map(_is_bfloat16, handles)) else result  # tl.dot accumulates in float32


def _compare(original, builder, a, b):
    """The interpreter's result claims its operands' type, so that broadcasting makes integers of a mask."""
    return TensorHandle(original(builder, _widened(a), _widened(b)).data, tl.int1)


def _cast(original, builder, source, dtype):
    source = _widened(source)
    if dtype.scalar == tl.bfloat16:
        return _rounded(original(builder, source, tl.float32))
    return original(builder, source, dtype)


def _is_bfloat16(handle):
    return handle.dtype.scalar == tl.bfloat16


def _widened(operand):
    if not isinstance(operand, TensorHandle) or not _is_bfloat16(operand):
        return operand
    return TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _rounded(handle):
    """float32 to bfloat16, to nearest even; every NaN becomes 0x7FC0, as in torch."""
    bits = np.ascontiguousarray(handle.data).view(np.uint32)
    nearest = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return TensorHandle(np.where(np.isnan(handle.data), 0x7FC0, nearest).astype(np.uint16), tl.bfloat16)


def _numbered(original, argument):
    converted = original(argument)
    if hasattr(argument, "data_ptr"):
        number = 1 + next(_numbers) % (2**15 - 1)
        tensor = interpreter._unwrap_tensor(argument)
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        extent = (last + 1) * tensor.element_size() if tensor.numel() else 0
        begin = tensor.data_ptr()
        _tensors[number] = begin, begin + extent, f"{tensor.dtype} {list(tensor.shape)}"
        converted.handle.data += np.uint64(number << ADDRESS_BITS)
    return converted


def _inside_tensor(access, pointer, mask):
    """Check and strip the pointers of an access; ``pointer`` and ``mask`` are positions in its arguments."""

    def checked(original, builder, *args, **kwargs):
        args = list(args)
        pointers = args[pointer]
        width = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
        numbers = pointers.data >> np.uint64(ADDRESS_BITS)
        addresses = pointers.data & np.uint64(2**ADDRESS_BITS - 1)
        active = True if mask is None else np.asarray(args[mask].data, dtype=bool)
        active = np.broadcast_to(active, addresses.shape)
        for number in np.unique(numbers[active]):
            begin, end, name = _tensors.get(int(number), (0, 0, "no tensor"))
            lanes = addresses[active & (numbers == number)].astype(np.int64)
            stray = lanes[(lanes < begin) | (lanes + width > end)]
            if stray.size:
                before, after = begin - stray[0], stray[0] - end
                where = f"{before} bytes before" if before > 0 else f"{after} bytes after"
                count = f"{stray.size} of {lanes.size} lanes"
                raise IndexError(f"{access} out of bounds: {count}, the first {where} {name}")
        args[pointer] = TensorHandle(addresses, pointers.dtype)
        return original(builder, *args, **kwargs)

    return checked
