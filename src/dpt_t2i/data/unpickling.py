"""A pickle of plain containers, numbers and strings, read without the power to run anything.

A pickle is a program. This machine knows only the instructions that build None, booleans, numbers, strings, lists,
tuples and dicts: those that name a function or a class, or call one, do not exist in it. The pure-Python machine is
used because its memo is a dict: in the C one a hostile index makes it reserve tens of gigabytes.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from pathlib import Path
from typing import Any

from dpt_t2i.errors import InputError

PLAIN = frozenset(
    "PROTO FRAME STOP MARK POP POP_MARK DUP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 FLOAT BINFLOAT "
    "STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE LIST EMPTY_LIST APPEND APPENDS TUPLE "
    "EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 DICT EMPTY_DICT SETITEM SETITEMS PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET "
    "LONG_BINGET".split()
)
CODES = {opcode.code.encode("latin-1")[0]: opcode.name for opcode in pickletools.opcodes}


class _PlainUnpickler(pickle._Unpickler):
    dispatch = {code: load for code, load in pickle._Unpickler.dispatch.items() if CODES[code] in PLAIN}


def read_plain_pickle(path: Path) -> Any:
    """What a pickle of plain values holds; Python 2's strings are read as UTF-8.

    Raises:
        InputError: the file is missing or broken, or asks for anything else: it may be an attack, nothing of it is run.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    try:
        return _PlainUnpickler(io.BytesIO(data), encoding="utf-8", errors="replace").load()
    except KeyError as error:
        name = CODES.get(error.args[0]) if error.args else None
        reason = f"it holds {name}, which plain values do not need" if name else "it is no pickle"
        raise InputError(
            f"{path} is refused: {reason}; RefCOCO's refs hold lists, dicts, numbers and texts only"
        ) from error
    except Exception as error:  # whatever the bytes of a broken program may bring about
        raise InputError(f"{path} is no whole pickle: {type(error).__name__}; fetch it anew") from error
