"""Threads that walk over one image together: how they share out columns and wait for each other.

They meet tens of times a row, so they wait awake, and give the core away only when that takes long.
"""

from __future__ import annotations

import ctypes
import os
import platform
from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from art_pixeldefend.models.pixelcnnpp.decoders.compiled.vectors import INT, call

LINE = 128  # bytes between numbers that different threads write: neighbouring cache lines are fetched in pairs
PATIENCE = 200  # looks, a few microseconds, before the core is given away: the other may be waiting for this very core
CREW = 2  # members: one leads over the pixels, the other follows and gets the next row ready

_X86 = platform.machine() in ("x86_64", "AMD64")

compiled = njit(error_model="numpy", nogil=True, no_cpython_wrapper=True)


def _give_way() -> int:
    """Address of the system's function that lets other threads run."""
    library = ctypes.WinDLL("kernel32").SwitchToThread if os.name == "nt" else ctypes.CDLL(None).sched_yield
    return ctypes.cast(library, ctypes.c_void_p).value or 0


GIVE_WAY = _give_way()


class Crew(NamedTuple):
    """A member's view: its number, how many they are, where each counts its steps, how to give the core away."""

    number: int
    count: int
    board: int
    give_way: int


ALONE = Crew(0, 1, 0, 0)


def make_board(count: int) -> np.ndarray:
    """Counters, a line for each: every member's meetings, every member's :func:`progress`, :func:`prepared`."""
    return np.zeros((2 * count + 1) * LINE // 8, dtype=np.int64)


def _pointer(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    return builder.inttoptr(address, INT.as_pointer())


@intrinsic
def _look(typingctx, address):
    """The number at an address; everything its writer wrote before it is then visible."""

    def generate(context, builder, signature, values):
        return builder.load_atomic(_pointer(builder, values[0]), "acquire", 8)

    return types.int64(types.int64), generate


@intrinsic
def _show(typingctx, address, number):
    """Write a number for others to see, after everything written before it."""

    def generate(context, builder, signature, values):
        builder.store_atomic(values[1], _pointer(builder, values[0]), "release", 8)

    return types.void(types.int64, types.int64), generate


@intrinsic
def _pause(typingctx):
    """Tell the processor that this is a loop that waits, where it is known how."""

    def generate(context, builder, signature, values):
        if _X86:
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])

    return types.void(), generate


@compiled
def _wait(crew, address, number):
    looks = 0
    while _look(address) < number:
        looks += 1
        if looks < PATIENCE:
            _pause()
        else:
            call(crew.give_way, ())
    return _look(address)


@compiled
def meet(crew):
    """Wait until every member is here."""
    if crew.count == 1:
        return
    mine = crew.board + crew.number * LINE
    times = _look(mine) + 1
    _show(mine, times)
    for other in range(crew.count):
        _wait(crew, crew.board + other * LINE, times)


@compiled
def announce(crew, progress):
    """So far this member has come."""
    if crew.count > 1:
        _show(crew.board + (crew.count + crew.number) * LINE, progress)


@compiled
def progress(crew, member):
    """How far a member has come."""
    return _look(crew.board + (crew.count + member) * LINE)


@compiled
def wait_for(crew, member, number):
    """Until a member has come so far; how far it has."""
    return _wait(crew, crew.board + (crew.count + member) * LINE, number)


@compiled
def report_prepared(crew, pieces):
    """So many pieces of the next row are ready."""
    _show(crew.board + 2 * crew.count * LINE, pieces)


@compiled
def prepared(crew):
    """How many pieces of the next row are ready."""
    return _look(crew.board + 2 * crew.count * LINE)


@compiled
def share(crew, columns):
    """This member's part of the columns of a row: first and end."""
    return columns * crew.number // crew.count, columns * (crew.number + 1) // crew.count
