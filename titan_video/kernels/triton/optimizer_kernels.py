"""Triton kernels of optim/mixed.py: one launch updates all tensors of one local shape (optimizer.py launches them).

A tensor of R rows and C columns is cut into blocks of 64 elements of a row, those of 8-bit state. A program updates
TILE blocks of one tensor. The tensors are listed in a table of int64, one row each: addresses, and the bits of numbers.

Bytes of an element of a float32 weight with a float32 gradient: weight 8, gradient 4, codes 4, scales 0.25.
"""

import triton
import triton.language as tl

BLOCK = tl.constexpr(64)
COLUMNS = tl.constexpr(12)  # of the table; see optimizer.TABLE
TINY = tl.constexpr(1.1754943508222875e-38)  # the smallest normal float32


@triton.constexpr_function
def intervals(decade, signed):
    """Codebook values of a decade."""
    return float(2 ** (decade + (0 if signed else 1)))


@triton.constexpr_function
def first_above(decade, signed):
    """The middle between a decade's first value and the value below: the last of the decade before, or 0."""
    first = (0.1 + 0.45 / intervals(decade, signed)) * 10.0 ** (decade - 6)
    below = (1 - 0.45 / intervals(decade - 1, signed)) * 10.0 ** (decade - 7) if decade else 0.0
    return (first + below) / 2


@triton.constexpr_function
def last_below_one(signed):
    return (2 - 0.45 / intervals(6, signed)) / 2


@triton.constexpr_function
def per_interval(decade, signed):
    """Intervals of a decade in 1.0."""
    return intervals(decade, signed) / 0.9 * 10.0 ** (6 - decade)


@triton.jit
def _code(x, SIGNED: tl.constexpr):
    """Index of the codebook value nearest to x in [-1, 1] (low_bit.codebook), by arithmetic: a search would read the
    codebook eight times, and be bound by that. x within a rounding error of the middle between two gets either.
    """
    size = tl.abs(x)
    num = tl.full(x.shape, intervals(0, SIGNED), tl.float32)
    factor = tl.full(x.shape, per_interval(0, SIGNED), tl.float32)
    for decade in tl.static_range(1, 7):
        is_above = size > first_above(decade, SIGNED)
        num = tl.where(is_above, intervals(decade, SIGNED), num)
        factor = tl.where(is_above, per_interval(decade, SIGNED), factor)
    within = tl.floor(size * factor - num * (1.0 / 9.0))
    rank = (num + tl.minimum(tl.maximum(within, 0.0), num - 1)).to(tl.int32)  # among the positive values, see below
    if SIGNED:
        rank = tl.where(size > last_below_one(SIGNED), 127, rank - 1)
        rank = tl.where(size > first_above(0, SIGNED), rank, -1)
        return tl.where(x < 0, 126 - tl.minimum(rank, 126), 128 + rank)
    rank = tl.where(size > last_below_one(SIGNED), 254, rank - 2)
    return tl.where(size > first_above(0, SIGNED), rank + 1, 0)


@triton.jit
def _pointer(table_ptr, column: tl.constexpr, element_type: tl.constexpr, ALIGNED: tl.constexpr):
    address = tl.load(table_ptr + tl.program_id(1) * COLUMNS + column)
    pointer = address.to(tl.pointer_type(element_type))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def _integer(table_ptr, column: tl.constexpr):
    return tl.load(table_ptr + tl.program_id(1) * COLUMNS + column).to(tl.int32)


@triton.jit
def _float(table_ptr, column: tl.constexpr):
    return _integer(table_ptr, column).to(tl.float32, bitcast=True)


@triton.jit
def _blocks(R, C, TILE: tl.constexpr):
    """(row, column, offset, inside) of the program's elements [TILE, 64], and (block, whether it exists) [TILE]."""
    per_row = (C + BLOCK - 1) // BLOCK
    block = tl.program_id(0) * TILE + tl.arange(0, TILE)
    exists = block < R * per_row
    row = (block // per_row)[:, None]
    col = (block % per_row)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    return row, col, row * C + col, exists[:, None] & (col < C), block, exists


@triton.jit
def _round(x, table_ptr, row, col):
    """low_bit.stochastic_round: the random bits depend on the key and the element's place in the full tensor."""
    key, first_row = _integer(table_ptr, 8), _integer(table_ptr, 9)
    first_col, row_length = _integer(table_ptr, 10), _integer(table_ptr, 11)
    bits = ((row + first_row) * row_length + col + first_col) ^ key
    bits = (bits ^ (bits >> 16 & 0xFFFF)) * (0x85EBCA6B - 0x100000000)
    bits = (bits ^ (bits >> 13 & 0x7FFFF)) * (0xC2B2AE35 - 0x100000000)
    bits = bits ^ (bits >> 16 & 0xFFFF)
    rounded = (x.to(tl.int32, bitcast=True) + (bits & 0xFFFF)) & -0x10000
    return rounded.to(tl.float32, bitcast=True).to(tl.bfloat16)


@triton.jit
def _store_weight(weight_ptrs, weight, inside, table_ptr, row, col, WEIGHT: tl.constexpr):
    if WEIGHT == tl.bfloat16:
        weight = _round(weight, table_ptr, row, col)
    tl.store(weight_ptrs, weight, mask=inside)


@triton.jit
def adamw(
    table_ptr,
    codebooks_ptr,
    R,
    C,
    keep,
    new1,
    beta2,
    new2,
    eps,
    WEIGHT: tl.constexpr,
    GRAD: tl.constexpr,
    IS_8BIT: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
):
    """keep: 1 - lr weight_decay. new1, new2: 1 - beta1, 1 - beta2.

    codebooks: signed and unsigned, float32 [2, 256].

    The state is exp_avg, exp_avg_sq in float32, or IS_8BIT: codes and scales of exp_avg and of the root of exp_avg_sq.
    """
    row, col, offset, inside, block, exists = _blocks(R, C, TILE)
    weight_ptrs = _pointer(table_ptr, 0, WEIGHT, ALIGNED) + offset
    weight = tl.load(weight_ptrs, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(_pointer(table_ptr, 1, GRAD, ALIGNED) + offset, mask=inside, other=0.0).to(tl.float32)
    if IS_8BIT:
        first_ptrs = _pointer(table_ptr, 2, tl.uint8, ALIGNED) + offset
        first_scale_ptrs = _pointer(table_ptr, 3, tl.float32, False) + block
        second_ptrs = _pointer(table_ptr, 4, tl.uint8, ALIGNED) + offset
        second_scale_ptrs = _pointer(table_ptr, 5, tl.float32, False) + block
        first = tl.load(codebooks_ptr + tl.load(first_ptrs, mask=inside, other=0).to(tl.int32))
        first = first * tl.load(first_scale_ptrs, mask=exists, other=0.0)[:, None]
        root = tl.load(codebooks_ptr + 256 + tl.load(second_ptrs, mask=inside, other=0).to(tl.int32))
        root = root * tl.load(second_scale_ptrs, mask=exists, other=0.0)[:, None]
        second = root * root
    else:
        first_ptrs = _pointer(table_ptr, 2, tl.float32, ALIGNED) + offset
        second_ptrs = _pointer(table_ptr, 4, tl.float32, ALIGNED) + offset
        first = tl.load(first_ptrs, mask=inside, other=0.0)
        second = tl.load(second_ptrs, mask=inside, other=0.0)
    first = first + new1 * (grad - first)
    second = second * beta2 + new2 * (grad * grad)
    root = tl.sqrt(second)
    step_size, root_factor = _float(table_ptr, 6), _float(table_ptr, 7)
    weight = weight * keep + step_size * (first / (root * root_factor + eps))
    _store_weight(weight_ptrs, weight, inside, table_ptr, row, col, WEIGHT)
    if IS_8BIT:
        first, root = tl.where(inside, first, 0.0), tl.where(inside, root, 0.0)
        scale = tl.max(tl.abs(first), 1)
        tl.store(first_scale_ptrs, scale, mask=exists)
        code = _code(first * (1.0 / tl.maximum(scale, TINY))[:, None], True)
        tl.store(first_ptrs, code.to(tl.uint8), mask=inside)
        scale = tl.max(root, 1)
        tl.store(second_scale_ptrs, scale, mask=exists)
        code = _code(root * (1.0 / tl.maximum(scale, TINY))[:, None], False)
        tl.store(second_ptrs, code.to(tl.uint8), mask=inside)
    else:
        tl.store(first_ptrs, first, mask=inside)
        tl.store(second_ptrs, second, mask=inside)


@triton.jit
def muon_momentum(
    table_ptr,
    R,
    C,
    new,
    momentum,
    GRAD: tl.constexpr,
    UPDATE: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
):
    """Momentum, column 2, goes to the gradient by new = 1 - momentum; Nesterov's update is written to column 3."""
    _, _, offset, inside, _, _ = _blocks(R, C, TILE)
    grad = tl.load(_pointer(table_ptr, 1, GRAD, ALIGNED) + offset, mask=inside, other=0.0).to(tl.float32)
    state_ptrs = _pointer(table_ptr, 2, tl.float32, ALIGNED) + offset
    state = tl.load(state_ptrs, mask=inside, other=0.0)
    state = state + new * (grad - state)
    tl.store(state_ptrs, state, mask=inside)
    update = grad + momentum * (state - grad)
    tl.store(_pointer(table_ptr, 3, UPDATE, ALIGNED) + offset, update.to(UPDATE), mask=inside)


@triton.jit
def muon_apply(
    table_ptr,
    R,
    C,
    keep,
    WEIGHT: tl.constexpr,
    UPDATE: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
):
    """The weight, times keep = 1 - lr weight_decay, plus step_size times the update of column 3."""
    row, col, offset, inside, _, _ = _blocks(R, C, TILE)
    weight_ptrs = _pointer(table_ptr, 0, WEIGHT, ALIGNED) + offset
    weight = tl.load(weight_ptrs, mask=inside, other=0.0).to(tl.float32)
    update = tl.load(_pointer(table_ptr, 3, UPDATE, ALIGNED) + offset, mask=inside, other=0.0).to(tl.float32)
    weight = weight * keep + _float(table_ptr, 6) * update
    _store_weight(weight_ptrs, weight, inside, table_ptr, row, col, WEIGHT)
