"""Matrix products of few rows, in LLVM's vectors.

Decoding multiplies one to a few dozen rows of activations by small matrices. Numba keeps no block of sums in registers
across such a loop, and BLAS is slow for so few rows. The order of the additions is the same for any number of rows, so
an image's sums have the same bits in any batch.
"""

from __future__ import annotations

import llvmlite.binding as llvm
from llvmlite import ir
from numba import config, types
from numba.core import cgutils
from numba.extending import intrinsic

# What Numba compiles for: NUMBA_CPU_FEATURES if set, or else this machine.
_CHOSEN: str | None = config.CPU_FEATURES  # type: ignore[attr-defined]  # made at run time
_FEATURES = llvm.get_host_cpu_features().flatten() if _CHOSEN is None else _CHOSEN
_AVX512 = "+avx512f" in _FEATURES.split(",")
LANES = 16 if _AVX512 else 8  # float32 numbers per vector
VECTOR = 4 * LANES  # bytes
# Most rows in a block of sums that is 1, 2, .. vectors wide: sums, a row of weights and an input fill the registers.
ROWS = (14, 13, 8, 6) if _AVX512 else (12, 6, 4)
WIDEST = len(ROWS)  # vectors in a panel
AHEAD = 2048  # bytes: weights are prefetched this far before they are read

INT = ir.IntType(64)
INT32 = ir.IntType(32)
FLOAT = ir.FloatType()
FLOATS = ir.VectorType(FLOAT, LANES)


def _plus(builder: ir.IRBuilder, address: ir.Value, offset: ir.Value | int) -> ir.Value:
    return builder.add(address, ir.Constant(INT, offset) if isinstance(offset, int) else offset)


def _load(builder: ir.IRBuilder, address: ir.Value, kind: ir.Type) -> ir.Value:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=4)


def _broadcast(builder: ir.IRBuilder, number: ir.Value) -> ir.Value:
    undefined = ir.Constant(FLOATS, ir.Undefined)
    first = builder.insert_element(undefined, number, ir.Constant(INT32, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(INT32, LANES), [0] * LANES))


def _multiply_add(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """A b + c, fused where the machine can."""
    kind = ir.FunctionType(FLOATS, [FLOATS] * 3)
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fmuladd.v{LANES}f32")
    return builder.call(function, [a, b, c])


def _prefetch(builder: ir.IRBuilder, address: ir.Value) -> None:
    """Prefetch for reading into the first-level cache."""
    pointer = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer, INT32, INT32, INT32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    read, near, data = (ir.Constant(INT32, number) for number in (0, 3, 1))
    builder.call(function, [builder.inttoptr(address, pointer), read, near, data])


def _block_of_sums(
    builder: ir.IRBuilder, rows: int, vectors: int, start, start_step, x, x_step, matrix, out, out_step, depth
) -> None:
    """Append out[r] = start[r] + sum over k of x[r, k] matrix[k], with all sums in registers."""
    inputs, sums = [], []
    for r in range(rows):
        row = ir.Constant(INT, r)
        inputs.append(_plus(builder, x, builder.mul(x_step, row)))
        first = _plus(builder, start, builder.mul(start_step, row))
        sums.append([_load(builder, _plus(builder, first, v * VECTOR), FLOATS) for v in range(vectors)])
    before, loop, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
    builder.branch(loop)
    builder.position_at_end(loop)
    k = builder.phi(INT)
    k.add_incoming(ir.Constant(INT, 0), before)
    carried = [[builder.phi(FLOATS) for _ in row] for row in sums]
    weights = _plus(builder, matrix, builder.mul(k, ir.Constant(INT, vectors * VECTOR)))
    weight = [_load(builder, _plus(builder, weights, v * VECTOR), FLOATS) for v in range(vectors)]
    for v in range(vectors):
        _prefetch(builder, _plus(builder, weights, AHEAD + v * VECTOR))
    offset = builder.mul(k, ir.Constant(INT, 4))
    results = []
    for r in range(rows):
        value = _broadcast(builder, _load(builder, _plus(builder, inputs[r], offset), FLOAT))
        results.append([_multiply_add(builder, value, weight[v], carried[r][v]) for v in range(vectors)])
    following = _plus(builder, k, 1)
    k.add_incoming(following, loop)
    for r in range(rows):
        for v in range(vectors):
            carried[r][v].add_incoming(sums[r][v], before)
            carried[r][v].add_incoming(results[r][v], loop)
    builder.cbranch(builder.icmp_signed("<", following, depth), loop, after)
    builder.position_at_end(after)
    for r in range(rows):
        last = _plus(builder, out, builder.mul(out_step, ir.Constant(INT, r)))
        for v in range(vectors):
            address = builder.inttoptr(_plus(builder, last, v * VECTOR), FLOATS.as_pointer())
            builder.store(results[r][v], address, align=4)


@intrinsic
def block_of_sums(typingctx, rows, vectors, start, start_step, x, x_step, matrix, out, out_step, depth):
    """out = start + x @ matrix for at most ROWS[vectors - 1] rows, ``vectors`` * LANES columns and depth > 0."""

    def generate(context, builder, signature, arguments):
        rows, vectors, *rest = arguments
        unknown, end = builder.append_basic_block(), builder.append_basic_block()
        switch = builder.switch(builder.add(builder.mul(vectors, ir.Constant(INT, 32)), rows), unknown)
        for v, most in enumerate(ROWS, start=1):
            for r in range(1, most + 1):
                block = builder.append_basic_block()
                switch.add_case(ir.Constant(INT, 32 * v + r), block)
                builder.position_at_end(block)
                _block_of_sums(builder, r, v, *rest)
                builder.branch(end)
        builder.position_at_end(unknown)
        builder.unreachable()
        builder.position_at_end(end)

    return types.void(*[types.int64] * 10), generate


def panels(vectors: int) -> list[int]:
    """Widths, in vectors, of the panels that a matrix of this many vectors per row is stored in."""
    widths = []
    while vectors:
        widths.append(-(-vectors // -(-vectors // WIDEST)))
        vectors -= widths[-1]
    return widths
