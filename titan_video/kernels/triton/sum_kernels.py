"""The second stage of sums over tokens: the programs' sums are added, in a fixed order, in one launch."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["end0", "end1", "end2"])
def add_partial_sums(
    sums_ptr,
    wide_ptr,
    narrow_ptr,
    end0,
    end1,
    end2,
    COLS: tl.constexpr,
    WIDE: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (p, g) adds columns [p BLOCK, (p + 1) BLOCK) over the programs of group g.

    sums: float32, [programs, COLS]. EVEN: each group is end0 programs; otherwise the groups, three at most, end at
    program end0, end1 and end2. The first WIDE columns go to wide [groups, WIDE], the others to narrow [groups, COLS -
    WIDE], rounded to its type.
    """
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    group = tl.program_id(1)
    if EVEN:
        first, end = group * end0, group * end0 + end0
    else:
        first = tl.where(group == 0, 0, tl.where(group == 1, end0, end1))
        end = tl.where(group == 0, end0, tl.where(group == 1, end1, end2))
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in tl.range(first, end, ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = (rows < end)[:, None] & (cols < COLS)[None, :]
        total += tl.load(sums_ptr + rows.to(tl.int64)[:, None] * COLS + cols[None, :], mask=inside, other=0.0)
    total = tl.sum(total, 0)
    tl.store(wide_ptr + group * WIDE + cols, total, mask=cols < WIDE)
    narrow = narrow_ptr + group * (COLS - WIDE) + cols - WIDE
    tl.store(narrow, total.to(narrow_ptr.dtype.element_ty), mask=(cols >= WIDE) & (cols < COLS))
