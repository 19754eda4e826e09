"""Inner loops, written in LLVM's vectors.

Numba compiles loops well, but keeps no block of sums in registers across one, and vectorises no exponential without
Intel's libraries. These few loops are what decoding consists of, so they are spelled out, as Numba intrinsics. They
take addresses and distances between rows in bytes, as 64-bit integers. Every sum has one order, whatever the number of
rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import llvmlite.binding as llvm
from llvmlite import ir
from numba import config, types
from numba.core import cgutils
from numba.extending import intrinsic

from art_pixeldefend.models.pixelcnnpp.mixture import HALF, MAX_LOG_SCALE, MEAN_LIMIT, MIN_LOG_SCALE

# What Numba compiles for: NUMBA_CPU_FEATURES, or else the machine.
_FEATURES = config.CPU_FEATURES if config.CPU_FEATURES is not None else llvm.get_host_cpu_features().flatten()
_WIDE = "+avx512f" in _FEATURES.split(",")
LANES = 16 if _WIDE else 8  # floats to a vector of a matrix product
# Rows of a block of sums that is 1, 2, .. vectors wide: sums, one row of weights and one input fill the registers.
ROWS = (14, 13, 8, 6) if _WIDE else (12, 6, 4)
BLOCK = 8  # numbers to a vector of the functions; feature maps come in multiples of that
AHEAD = 2048  # bytes of weights to ask for before they are read: they come from far when a row begins
# Columns of the table of a mixture's components: mean and 1 / scale in levels, weight, 2 weight sinh(h), 2 cosh(h)
# with h = 1 / (2 scale).
MEAN, INVERSE_SCALE, WEIGHT, FACTOR, SPREAD = range(5)
COLUMNS = 5

INT = ir.IntType(64)
INT32 = ir.IntType(32)
FLOAT = ir.FloatType()
DOUBLE = ir.DoubleType()


class Vector:
    """An LLVM vector of floats or doubles with Python's operators; numbers become constants of its type."""

    def __init__(self, builder: ir.IRBuilder, value: ir.Value) -> None:
        self.builder, self.value, self.type = builder, value, value.type

    @classmethod
    def load(cls, builder: ir.IRBuilder, address: ir.Value, lanes: int, number: ir.Type = FLOAT) -> Vector:
        """So many floats, or doubles, from an address."""
        pointer = builder.inttoptr(address, ir.VectorType(number, lanes).as_pointer())
        return cls(builder, builder.load(pointer, align=4))

    def store(self, address: ir.Value) -> None:
        """Write to an address."""
        self.builder.store(self.value, self.builder.inttoptr(address, self.type.as_pointer()), align=4)

    def _constant(self, number: float) -> ir.Constant:
        return ir.Constant(self.type, [number] * self.type.count)

    def _of(self, other: Vector | float) -> ir.Value:
        return other.value if isinstance(other, Vector) else self._constant(other)

    def _new(self, value: ir.Value) -> Vector:
        return Vector(self.builder, value)

    def __add__(self, other: Vector | float) -> Vector:
        return self._new(self.builder.fadd(self.value, self._of(other)))

    def __sub__(self, other: Vector | float) -> Vector:
        return self._new(self.builder.fsub(self.value, self._of(other)))

    def __mul__(self, other: Vector | float) -> Vector:
        return self._new(self.builder.fmul(self.value, self._of(other)))

    def __neg__(self) -> Vector:
        return self._new(self.builder.fneg(self.value))

    def __truediv__(self, other: Vector | float) -> Vector:
        return self._new(self.builder.fdiv(self.value, self._of(other)))

    def times_plus(self, factor: Vector | float, addend: Vector | float) -> Vector:
        """self * factor + addend, fused where the machine can."""
        bits = 32 if self.type.element == FLOAT else 64
        name = f"llvm.fmuladd.v{self.type.count}f{bits}"
        function = cgutils.get_or_insert_function(
            self.builder.module, ir.FunctionType(self.type, [self.type] * 3), name
        )
        return self._new(self.builder.call(function, [self.value, self._of(factor), self._of(addend)]))

    def where_positive(self, yes: Vector | float, no: Vector | float) -> Vector:
        """yes where self > 0, else no."""
        positive = self.builder.fcmp_ordered(">", self.value, self._constant(0.0))
        return self._new(self.builder.select(positive, self._of(yes), self._of(no)))

    def constant(self, number: float) -> Vector:
        """The number in every lane."""
        return self._new(self._constant(number))

    def widened(self) -> Vector:
        """Floats as doubles."""
        return self._new(self.builder.fpext(self.value, ir.VectorType(DOUBLE, self.type.count)))

    def tanh(self) -> Vector:
        """To rounding of 1: (1 - e) / (1 + e) with e = exp(-2 |self|), and the sign."""
        small = (self * 2.0).exp_of_minus_magnitude()
        size = (self.constant(1.0) - small) / (small + 1.0)
        return self.where_positive(size, -size)

    def at_most(self, most: float) -> Vector:
        """The smaller of self and a number."""
        return -(-self).at_least(-most)

    def at_least(self, least: float) -> Vector:
        """The larger of self and a number."""
        above = self.builder.fcmp_ordered(">", self.value, self._constant(least))
        return self._new(self.builder.select(above, self.value, self._constant(least)))

    def exp(self) -> Vector:
        """e to the power of self, for self <= 80, to rounding; smallest normal numbers instead of smaller ones."""
        single = self.type.element == FLOAT
        mantissa, bias, lowest, terms = (23, 127, -87.0, 8) if single else (52, 1023, -708.0, 13)
        integers = ir.VectorType(INT32 if single else INT, self.type.count)
        x = self.at_least(lowest)
        # Adding 1.5 * 2^mantissa rounds to an integer and leaves that integer in the lowest bits.
        shifter = 1.5 * 2.0**mantissa
        shifted = x.times_plus(math.log2(math.e), shifter)
        n = shifted - shifter
        high = 0.693359375
        rest = n.times_plus(-(math.log(2) - high), n.times_plus(-high, x)) if single else _reduced(n, x)
        series = rest._new(rest._constant(1 / math.factorial(terms - 1)))
        for order in range(terms - 2, -1, -1):
            series = series.times_plus(rest, 1 / math.factorial(order))
        power = self.builder.add(
            self.builder.bitcast(shifted.value, integers), ir.Constant(integers, [bias] * self.type.count)
        )
        power = self.builder.shl(power, ir.Constant(integers, [mantissa] * self.type.count))
        return series * self._new(self.builder.bitcast(power, self.type))

    def exp_of_minus_magnitude(self) -> Vector:
        """exp(-|self|), of which elu, sigmoid and their like are made without overflow."""
        return self.where_positive(-self, self).exp()


def _reduced(n: Vector, x: Vector) -> Vector:
    """x - n log 2 in double precision: log 2 in two parts, the first with room for n times it."""
    high = 6.93147180369123816490e-01
    return n.times_plus(-1.90821492927058770002e-10, n.times_plus(-high, x))


def _spread(builder: ir.IRBuilder, scalar: ir.Value, vector: ir.VectorType) -> Vector:
    undefined = ir.Constant(vector, ir.Undefined)
    single = builder.insert_element(undefined, scalar, ir.Constant(INT32, 0))
    zeros = ir.Constant(ir.VectorType(INT32, vector.count), [0] * vector.count)
    return Vector(builder, builder.shuffle_vector(single, undefined, zeros))


def _plus(builder: ir.IRBuilder, address: ir.Value, distance: ir.Value | int) -> ir.Value:
    return builder.add(address, ir.Constant(INT, distance) if isinstance(distance, int) else distance)


def _prefetch(builder: ir.IRBuilder, address: ir.Value, write: bool = False) -> None:
    """Ask for data that is soon to be read, or changed, into the first-level cache."""
    pointer = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer, INT32, INT32, INT32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    change, near, data = (ir.Constant(INT32, number) for number in (int(write), 3, 1))
    builder.call(function, [builder.inttoptr(address, pointer), change, near, data])


def _kernel(body: Callable[..., None], *arguments: types.Type) -> tuple:
    """What an intrinsic returns: its types, and a generator of ``body``'s code."""

    def generate(context, builder, signature, values):
        body(builder, *values)

    return types.void(*arguments), generate


def _block_of_sums(
    builder: ir.IRBuilder, rows: int, vectors: int, start, start_step, x, x_step, matrix, out, out_step, depth
) -> None:
    """out[r] = start[r] + sum over k of x[r, k] matrix[k], with all sums in registers."""
    size = 4 * LANES
    inputs, sums = [], []
    for r in range(rows):
        times = ir.Constant(INT, r)
        inputs.append(_plus(builder, x, builder.mul(x_step, times)))
        first = _plus(builder, start, builder.mul(start_step, times))
        sums.append([Vector.load(builder, _plus(builder, first, v * size), LANES) for v in range(vectors)])
    before, loop, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
    builder.branch(loop)
    builder.position_at_end(loop)
    k = builder.phi(INT)
    k.add_incoming(ir.Constant(INT, 0), before)
    carried = [[builder.phi(s.type) for s in row] for row in sums]
    weights = _plus(builder, matrix, builder.mul(k, ir.Constant(INT, vectors * size)))
    weight = [Vector.load(builder, _plus(builder, weights, v * size), LANES) for v in range(vectors)]
    for v in range(vectors):
        _prefetch(builder, _plus(builder, weights, AHEAD + v * size))
    offset = builder.mul(k, ir.Constant(INT, 4))
    results = []
    for r in range(rows):
        number = builder.load(builder.inttoptr(_plus(builder, inputs[r], offset), FLOAT.as_pointer()), align=4)
        value = _spread(builder, number, ir.VectorType(FLOAT, LANES))
        results.append([value.times_plus(weight[v], Vector(builder, carried[r][v])) for v in range(vectors)])
    following = _plus(builder, k, 1)
    k.add_incoming(following, loop)
    for r in range(rows):
        for v in range(vectors):
            carried[r][v].add_incoming(sums[r][v].value, before)
            carried[r][v].add_incoming(results[r][v].value, loop)
    builder.cbranch(builder.icmp_signed("<", following, depth), loop, after)
    builder.position_at_end(after)
    for r in range(rows):
        last = _plus(builder, out, builder.mul(out_step, ir.Constant(INT, r)))
        for v in range(vectors):
            results[r][v].store(_plus(builder, last, v * size))


def _all_blocks_of_sums(builder: ir.IRBuilder, rows: ir.Value, vectors: ir.Value, *rest: ir.Value) -> None:
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


@intrinsic
def block_of_sums(typingctx, rows, vectors, start, start_step, x, x_step, matrix, out, out_step, depth):
    """out = start + x @ matrix for ``rows`` of at most ROWS[vectors - 1] and ``vectors`` * LANES columns, depth > 0."""
    return _kernel(_all_blocks_of_sums, *[types.int64] * 10)


def _each(
    builder: ir.IRBuilder, count: ir.Value, filters: ir.Value
) -> Iterator[Callable[[ir.Value, ir.Value], ir.Value]]:
    """Inside loops over rows and blocks of feature maps: a function from a base and a step to the block's address."""
    blocks = builder.sdiv(filters, ir.Constant(INT, BLOCK))
    with cgutils.for_range(builder, count) as row, cgutils.for_range(builder, blocks) as block:
        offset = builder.mul(block.index, ir.Constant(INT, 4 * BLOCK))
        yield lambda base, step: _plus(builder, _plus(builder, base, builder.mul(row.index, step)), offset)


def _store_activated(x: Vector, address: ir.Value, filters: ir.Value) -> None:
    """elu(x) and elu(-x), ``filters`` floats apart."""
    small = x.exp_of_minus_magnitude() - 1.0
    x.where_positive(x, small).store(address)
    other = _plus(x.builder, address, x.builder.mul(filters, ir.Constant(INT, 4)))
    x.where_positive(small, -x).store(other)


def _activate(builder, x, x_step, out, out_step, count, filters) -> None:
    for at in _each(builder, count, filters):
        _store_activated(Vector.load(builder, at(x, x_step), BLOCK), at(out, out_step), filters)


@intrinsic
def activate(typingctx, x, x_step, out, out_step, count, filters):
    """out[r] = concat_elu(x[r]) for ``count`` rows of ``filters`` floats."""
    return _kernel(_activate, *[types.int64] * 6)


def _place(builder, x, x_step, plain, plain_step, out, out_step, count, filters) -> None:
    for at in _each(builder, count, filters):
        value = Vector.load(builder, at(x, x_step), BLOCK)
        value.store(at(plain, plain_step))
        _store_activated(value, at(out, out_step), filters)


@intrinsic
def place(typingctx, x, x_step, plain, plain_step, out, out_step, count, filters):
    """plain[r] = x[r] and out[r] = concat_elu(x[r]) for ``count`` rows of ``filters`` floats."""
    return _kernel(_place, *[types.int64] * 8)


def _gate(builder, ab, ab_step, x, x_step, plain, plain_step, out, out_step, count, filters) -> None:
    for at in _each(builder, count, filters):
        first = at(ab, ab_step)
        a = Vector.load(builder, first, BLOCK)
        b = Vector.load(builder, _plus(builder, first, builder.mul(filters, ir.Constant(INT, 4))), BLOCK)
        small = b.exp_of_minus_magnitude()
        sigmoid = b.where_positive(1.0, small) / (small + 1.0)
        value = a.times_plus(sigmoid, Vector.load(builder, at(x, x_step), BLOCK))
        value.store(at(plain, plain_step))
        _store_activated(value, at(out, out_step), filters)


@intrinsic
def gate(typingctx, ab, ab_step, x, x_step, plain, plain_step, out, out_step, count, filters):
    """plain[r] = x[r] + a[r] sigmoid(b[r]) and out[r] = concat_elu(plain[r]), with (a, b) = ab."""
    return _kernel(_gate, *[types.int64] * 10)


def _mixture(builder, table, params, stride, mixtures, channels, channel, pixel) -> None:
    """See :func:`mixture`; columns of the table are ``stride`` bytes apart."""
    vector = ir.VectorType(DOUBLE, BLOCK)
    lanes = Vector(builder, ir.Constant(vector, [float(lane) for lane in range(BLOCK)]))
    number = _spread(builder, builder.sitofp(mixtures, DOUBLE), vector)
    blocks = builder.sdiv(_plus(builder, mixtures, BLOCK - 1), ir.Constant(INT, BLOCK))
    one, zero = ir.Constant(INT, 1), ir.Constant(INT, 0)
    first = builder.add(builder.mul(channels, ir.Constant(INT, 2)), one)
    before = builder.sdiv(builder.mul(channel, builder.sub(channel, one)), ir.Constant(INT, 2))

    def parameters(stretch: ir.Value, block: ir.Value) -> Vector:
        index = builder.add(builder.mul(stretch, mixtures), builder.mul(block, ir.Constant(INT, BLOCK)))
        return Vector.load(builder, _plus(builder, params, builder.mul(index, ir.Constant(INT, 4))), BLOCK).widened()

    def column(which: int, block: ir.Value) -> ir.Value:
        place = builder.add(table, builder.mul(stride, ir.Constant(INT, which)))
        return _plus(builder, place, builder.mul(block, ir.Constant(INT, 8 * BLOCK)))

    highest = cgutils.alloca_once_value(builder, ir.Constant(FLOAT, -math.inf))
    with cgutils.for_range(builder, mixtures) as k:
        address = _plus(builder, params, builder.mul(k.index, ir.Constant(INT, 4)))
        weight = builder.load(builder.inttoptr(address, FLOAT.as_pointer()), align=4)
        more = builder.fcmp_ordered(">", weight, builder.load(highest))
        builder.store(builder.select(more, weight, builder.load(highest)), highest)
    most = _spread(builder, builder.fpext(builder.load(highest), DOUBLE), vector)
    mean = cgutils.alloca_once(builder, vector)
    with cgutils.for_range(builder, blocks) as block:
        at = block.index
        there = number - (
            lanes + _spread(builder, builder.sitofp(builder.mul(at, ir.Constant(INT, BLOCK)), DOUBLE), vector)
        )
        there.where_positive((parameters(zero, at) - most).exp(), 0.0).store(column(WEIGHT, at))
        own = parameters(builder.add(channel, one), at)
        builder.store(own.times_plus(HALF, HALF).value, mean)
        with cgutils.for_range(builder, channel) as earlier:
            coefficient = parameters(builder.add(builder.add(first, before), earlier.index), at).tanh()
            address = _plus(builder, pixel, builder.mul(earlier.index, ir.Constant(INT, 8)))
            value = _spread(builder, builder.load(builder.inttoptr(address, DOUBLE.as_pointer())), vector) - HALF
            builder.store(coefficient.times_plus(value, Vector(builder, builder.load(mean))).value, mean)
        Vector(builder, builder.load(mean)).at_least(-MEAN_LIMIT).at_most(MEAN_LIMIT).store(column(MEAN, at))
        log_scale = parameters(builder.add(builder.add(one, channels), channel), at)
        inverse_scale = (-log_scale.at_least(MIN_LOG_SCALE).at_most(MAX_LOG_SCALE)).exp() * (1 / HALF)
        inverse_scale.store(column(INVERSE_SCALE, at))
        half = inverse_scale * 0.5
        less = (-half).exp()
        more = less.constant(1.0) / less
        (more + less).store(column(SPREAD, at))
        # 2 sinh(h): the difference of two exponentials loses digits where h is small; a series does not.
        square, series = half * half, half.constant(1.0)
        for order in range(12, 0, -2):
            series = (square * (1 / (order * (order + 1)))).times_plus(series, 1.0)
        (half - 0.5).where_positive(more - less, half * 2.0 * series).store(column(FACTOR, at))
    _normalise(builder, column, mixtures, blocks)


def _normalise(builder, column, mixtures, blocks) -> None:
    """Divide the weights by their sum, and let the factors have them."""
    zero, total = ir.Constant(INT, 0), cgutils.alloca_once_value(builder, ir.Constant(DOUBLE, 0.0))
    with cgutils.for_range(builder, mixtures) as k:
        address = _plus(builder, column(WEIGHT, zero), builder.mul(k.index, ir.Constant(INT, 8)))
        weight = builder.load(builder.inttoptr(address, DOUBLE.as_pointer()))
        builder.store(builder.fadd(builder.load(total), weight), total)
    whole = _spread(builder, builder.load(total), ir.VectorType(DOUBLE, BLOCK))
    with cgutils.for_range(builder, blocks) as block:
        weight = Vector.load(builder, column(WEIGHT, block.index), BLOCK, DOUBLE) / whole
        weight.store(column(WEIGHT, block.index))
        factor = Vector.load(builder, column(FACTOR, block.index), BLOCK, DOUBLE)
        (factor * weight).store(column(FACTOR, block.index))


@intrinsic
def mixture(typingctx, table, params, stride, mixtures, channels, channel, pixel):
    """Columns MEAN, INVERSE_SCALE, WEIGHT, FACTOR and SPREAD of a channel's components: ``head.components``."""
    return _kernel(_mixture, *[types.int64] * 7)


def _masses(builder, mass, table, stride, components, low, count) -> None:
    vector = ir.VectorType(DOUBLE, BLOCK)
    lanes = Vector(builder, ir.Constant(vector, [float(lane) for lane in range(BLOCK)]))
    blocks = builder.sdiv(_plus(builder, count, BLOCK - 1), ir.Constant(INT, BLOCK))
    total = cgutils.alloca_once(builder, vector)
    with cgutils.for_range(builder, blocks) as block:
        index = builder.mul(block.index, ir.Constant(INT, BLOCK))
        z = _spread(builder, builder.sitofp(builder.add(low, index), DOUBLE), vector) + lanes
        builder.store(ir.Constant(vector, [0.0] * BLOCK), total)
        with cgutils.for_range(builder, components) as k:
            row = _plus(builder, table, builder.mul(k.index, ir.Constant(INT, 8)))
            mean, inverse_scale, factor, spread = (
                _spread(builder, builder.load(builder.inttoptr(address, DOUBLE.as_pointer())), vector)
                for address in (
                    _plus(builder, row, builder.mul(stride, ir.Constant(INT, which)))
                    for which in (MEAN, INVERSE_SCALE, FACTOR, SPREAD)
                )
            )
            small = ((z - mean) * inverse_scale).exp_of_minus_magnitude()
            part = factor * small / small.times_plus(small + spread, 1.0)
            builder.store((Vector(builder, builder.load(total)) + part).value, total)
        result = Vector(builder, builder.load(total))
        result.store(_plus(builder, mass, builder.mul(index, ir.Constant(INT, 8))))


@intrinsic
def masses(typingctx, mass, table, stride, components, low, count):
    """mass[i] = sum over components of factor / (spread + 2 cosh((low + i - mean) inverse_scale)), doubles.

    The ``table`` has columns MEAN, INVERSE_SCALE, .., ``stride`` bytes apart. At least ``count`` masses are computed:
    whole vectors of :data:`BLOCK`.
    """
    return _kernel(_masses, *[types.int64] * 6)


def _ask_for(builder, address, vectors) -> None:
    with cgutils.for_range(builder, vectors) as vector:
        _prefetch(builder, _plus(builder, address, builder.mul(vector.index, ir.Constant(INT, 4 * LANES))), write=True)


@intrinsic
def ask_for(typingctx, address, vectors):
    """Have so many vectors fetched that are soon to be changed: another core may have written them."""
    return _kernel(_ask_for, types.int64, types.int64)


@intrinsic
def floats_at(typingctx, address):
    """A pointer to floats, for ``numba.carray``."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.float32)(types.int64), generate


@intrinsic
def call(typingctx, address, arguments):
    """Call the function at an address with the numbers of a tuple."""

    def generate(context, builder, signature, values):
        address, arguments = values
        numbers = [builder.extract_value(arguments, i) for i in range(len(signature.args[1]))]
        kind = ir.FunctionType(ir.VoidType(), [number.type for number in numbers])
        builder.call(builder.inttoptr(address, kind.as_pointer()), numbers)

    return types.void(types.int64, arguments), generate
