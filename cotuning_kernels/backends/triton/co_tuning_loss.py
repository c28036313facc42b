"""The Co-Tuning loss in one launch: both heads, both gradients, all rows' losses and the scalars.

Of a row, ``rows.py`` has the derivation and the traffic.

The means need counts that are known only when every row has been looked at. So gradients are stored with a factor that
is right where every row takes part (``trade_off / B`` and ``1 / B``), and ``factors`` hold what is left for the
backward pass: then exactly 1, so that with an upstream gradient of 1 that pass touches no gradient, which is half the
traffic of a step. In float16 they would lose their digits, divided by a large batch: it keeps them as large as
probabilities, and ``factors`` hold it all. A row leaves 20 bytes of numbers, which the programs that
are done last add up, and every program a count of 4.

Sums over rows. Every program counts itself in where its rows' numbers are added up: a group of 256 rows, or of more
where there would be more than 128 groups. The last one of a group adds it up and counts the group, and the last one of
these adds up the groups. So nobody reads many numbers alone: of 32768 rows 256, and then 128. Which program is the last
is chance, but not the order of its sums: the same bits in every run. Only the counts are atomic, and they are integers.

That the last program sees what the others have stored: every thread of a program stores, all meet at the barrier, and
one of them then adds to the counter with the order ``acq_rel``, for the whole device. What comes before the barrier in
any thread happens before that addition, which releases all of it and not that thread's stores alone (a release is
cumulative). The addition of the last program reads what the others' have written and acquires; a barrier hands that to
its other threads, and only then they load. In PTX that is st, bar.sync, atom.acq_rel.gpu, bar.sync, ld. On AMD the
barrier is a fence of the workgroup, whose waves share a first-level cache and its way to the second one; the wave that
counts writes that one back (buffer_wbl2), waits, counts, waits and drops what the first one holds (buffer_inv): what
LLVM makes of such a fence and such an addition, and what ``test_triton_static.py`` finds in every compiled kernel.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cotuning_kernels.backends.operations import REDUCTIONS
from cotuning_kernels.backends.triton.checks import check_loss, check_writable
from cotuning_kernels.backends.triton.counters import MOST, counters
from cotuning_kernels.backends.triton.labels import read_target
from cotuning_kernels.backends.triton.launch import (
    KEPT_THREADS,
    Launch,
    RowPlan,
    blocks,
    compute_type,
    is_kept,
    plan_kept_row,
    plan_rows,
    threads_for,
    vector,
)
from cotuning_kernels.backends.triton.rows import has_share, kept_row, long_row, packed_row, whole_rows

__all__ = ["co_tuning_loss", "co_tuning_loss_", "plan"]

# Forms of a target.
_LABELS, _PAIR, _PROBABILITIES = 0, 1, 2
# Rows whose numbers one program adds up, a power of two; more of them where there would be more groups.
GROUP_ROWS = 256
MOST_GROUPS = MOST - 1  # one counter is that of the groups
_FINISH_BLOCK = 128

# ------------------------------------------------------------------------------------------------------------ kernels


@triton.jit
def _head(
    program, logits, logits_stride, grad, grad_stride, table, table_stride, weight, smoothing, columns_count,
    labels, labels_stride, labels_b, labels_b_stride, mix, mix_stride, classes, ignore_index, by_row, pitch,
    batch, stored, SOURCE: tl.constexpr, FORM: tl.constexpr, HAS_WEIGHT: tl.constexpr, SMOOTHS: tl.constexpr,
    KL: tl.constexpr, GRADIENT: tl.constexpr, COUNTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    KEPT: tl.constexpr, ACCESS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Some rows of one head: their gradients, and their losses and counts to ``by_row``."""
    rows = program.to(tl.int64)
    if ACCESS == 0:
        rows = rows * ROWS + tl.arange(0, ROWS)[:, None]
    in_batch = rows < batch
    stored = stored.to(DTYPE)
    label, share, label_b, share_b = rows, 0.0, rows, 0.0
    if FORM != 2:
        label, share, label_b, share_b = read_target(
            labels, labels_stride, labels_b, labels_b_stride, mix, mix_stride, rows, in_batch, classes, ignore_index,
            FORM == 1, DTYPE,
        )  # fmt: skip
    supervised = share
    if SOURCE and FORM == 2:  # the share of the row's classes that have source supervision, from the matrix product
        supervised = tl.load(mix + rows * mix_stride, mask=in_batch, other=0.0).to(DTYPE)
    if ACCESS > 0 and GRADIENT:
        grad += rows * grad_stride
    if KEPT > 0:
        table += (rows if FORM == 2 else label) * table_stride
        logits += rows * logits_stride
        counts = has_share(share, share_b, FORM)
        POLICY: tl.constexpr = "" if FORM == 2 else "evict_last"
        if logits.dtype.element_ty.primitive_bitwidth + table.dtype.element_ty.primitive_bitwidth == 32:
            loss, size = packed_row(
                logits, grad, table, columns_count, counts, stored, GRADIENT, BLOCK, KEPT, ACCESS, POLICY, DTYPE
            )  # fmt: skip
        else:
            loss, size = kept_row(
                logits, grad, table, columns_count, counts, supervised, stored, GRADIENT, BLOCK, KEPT, ACCESS, POLICY,
                DTYPE,
            )  # fmt: skip
        size_b = size
    elif ACCESS > 0:
        loss, size, size_b = long_row(
            logits + rows * logits_stride, grad, table, table_stride, weight, smoothing, classes, columns_count, label,
            share, label_b, share_b, rows, stored, SOURCE, FORM, HAS_WEIGHT, SMOOTHS, KL, GRADIENT, BLOCK, ACCESS,
            DTYPE,
        )  # fmt: skip
    else:
        loss, size, size_b = whole_rows(
            logits, logits_stride, grad, grad_stride, table, table_stride, weight, smoothing, classes, columns_count,
            label, share, label_b, share_b, rows, in_batch, stored, SOURCE, FORM, HAS_WEIGHT, SMOOTHS, KL, GRADIENT,
            BLOCK, DTYPE,
        )  # fmt: skip
    if FORM != 2:
        # A label that names no class, where the device does not stop there (see labels.py): NaN, not a wrong number.
        loss = tl.where(share + share_b != share + share_b, float("nan"), loss)
    out = by_row + rows
    if SOURCE:
        tl.store(out + pitch, loss, mask=in_batch)
        if COUNTS:
            if FORM != 2:
                supervised = tl.where(size != 0, share, 0.0)
                valid = share
                if FORM == 1:
                    supervised += tl.where(size_b != 0, share_b, 0.0)
                    valid += share_b
                tl.store(out + 4 * pitch, valid, mask=in_batch)
            tl.store(out + 3 * pitch, supervised, mask=in_batch)
    else:
        tl.store(out, loss, mask=in_batch)
        if COUNTS and FORM != 2:
            if HAS_WEIGHT:
                share *= tl.load(weight + label, mask=share != 0, other=0.0).to(DTYPE)
                if FORM == 1:
                    share_b *= tl.load(weight + label_b, mask=share_b != 0, other=0.0).to(DTYPE)
            if FORM == 1:
                share += share_b
            tl.store(out + 2 * pitch, share, mask=in_batch)


# From here to the kernel: what the program does that is done last.


@triton.jit
def _is_last(counter, count):
    """Counts this program in, once it has stored: is it the last of ``count``? That one sets the counter back."""
    tl.debug_barrier()
    is_last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == count - 1
    if is_last:
        tl.store(counter, 0)
    return is_last


@triton.jit
def _totals(numbers, pitch, first, count, KINDS: tl.constexpr, BLOCK: tl.constexpr):
    """Sums of some columns, one a row that KINDS has the bit of: by lane in the order of columns, then over lanes."""
    kind = tl.arange(0, 8)[:, None]
    there = ((KINDS >> kind) & 1) != 0
    sums = tl.zeros([8, BLOCK], numbers.dtype.element_ty)
    for start in range(0, count, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        sums += tl.load(numbers + kind * pitch + first + column, mask=there & (column < count), other=0.0)
    return tl.sum(sums, 1)


@triton.jit
def _of_kind(totals, KIND: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, 8) == KIND, totals, 0.0), 0)


@triton.jit
def _any_probability(probabilities, stride, batch, classes, BLOCK: tl.constexpr):
    """Whether any class of any row has a share, as 1 or 0."""
    seen = tl.zeros([BLOCK], tl.int32)
    for row in range(batch):
        for start in range(0, classes, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            p = tl.load(probabilities + row * stride + columns, mask=columns < classes, other=0.0)
            seen = tl.where(p.to(tl.float64) != 0, 1, seen)
    return tl.max(seen, 0)


@triton.jit
def _write_rows(terms, trade_off, loss, batch, first, count, BOTH_HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """The losses of some rows, from their terms."""
    dtype = terms.dtype.element_ty
    for start in range(0, count, BLOCK):
        lane = start + tl.arange(0, BLOCK)
        rows, mask = first + lane, lane < count
        row_loss = tl.load(terms + batch + rows, mask=mask, other=0.0)
        if BOTH_HEADS:
            row_loss = tl.load(terms + rows, mask=mask, other=0.0) + tl.load(trade_off).to(dtype) * row_loss
        else:
            tl.store(terms + rows, tl.zeros([BLOCK], dtype), mask=mask)
        tl.store(loss + rows, row_loss, mask=mask)


@triton.jit
def _write_scalars(
    totals, trade_off, probabilities, probabilities_stride, loss, terms, factors, batch, classes,
    MEAN: tl.constexpr, PROBABILITIES: tl.constexpr, BOTH_HEADS: tl.constexpr, SOURCE_STORED: tl.constexpr,
    TARGET_STORED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The loss, its two terms ``[target, source]`` and the factors of the gradients, from the sums over all rows."""
    dtype = totals.dtype
    target = _of_kind(totals, 0)
    source = _of_kind(totals, 1)
    # Of the factors, what is left to multiply by, without the means' divisors.
    factor = tl.full([], 1.0, dtype)
    target_factor = tl.full([], 1.0, dtype)
    if SOURCE_STORED:
        factor = batch.to(dtype) if MEAN else factor
    elif BOTH_HEADS:
        factor = tl.load(trade_off).to(dtype)
    if TARGET_STORED and MEAN:
        target_factor = batch.to(dtype)
    if MEAN:
        count = _of_kind(totals, 3)
        if PROBABILITIES:
            weight = batch.to(dtype)
            any_valid = tl.full([], 1, tl.int32)
            if count == 0:  # rare, and then the only question left
                any_valid = _any_probability(probabilities, probabilities_stride, batch, classes, BLOCK)
        else:
            weight = _of_kind(totals, 2)
            any_valid = (_of_kind(totals, 4) != 0).to(tl.int32)
        # No supervised row is an ordinary batch, and its source term 0; no valid row at all has no mean. Without a
        # valid row every gradient is 0 and must stay 0 when it is multiplied by the factor.
        count = tl.where((count == 0) & (any_valid != 0), 1.0, count)
        source = source / count
        factor = tl.where(any_valid != 0, factor / count, 0.0)
        target = target / weight
        target_factor = tl.where((weight == 0) & (any_valid == 0), 0.0, target_factor / weight)
    if BOTH_HEADS:
        tl.store(loss, target + tl.load(trade_off).to(dtype) * source)
    else:
        target = tl.full([], 0.0, dtype)
        tl.store(loss, source)
    tl.store(terms, target)
    tl.store(terms + 1, source)
    tl.store(factors, factor)
    tl.store(factors + 1, target_factor)


@triton.jit
def _finish(
    row, by_row, pitch, counters, group_bits, trade_off, probabilities, probabilities_stride, loss, terms, factors,
    batch, classes, FORM: tl.constexpr, REDUCTION: tl.constexpr, BOTH_HEADS: tl.constexpr, SOURCE_ROWS: tl.constexpr,
    TARGET_ROWS: tl.constexpr, SOURCE_STORED: tl.constexpr, TARGET_STORED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The last program of a group of rows adds up their numbers, and the last of these programs those of the groups.

    The groups' lie in ``by_row`` behind the rows. Without a reduction only the terms of each row are added.
    """
    MEAN: tl.constexpr = REDUCTION == 1
    LABELS: tl.constexpr = MEAN and FORM != 2
    KINDS: tl.constexpr = 2 + BOTH_HEADS * (1 + LABELS * 4) + MEAN * 8 + LABELS * 16  # see the kernel, of by_row
    group = row >> group_bits
    first = group << group_bits
    count = tl.minimum(batch, (group + 1) << group_bits) - first
    programs = tl.cdiv(tl.maximum(count, 1), SOURCE_ROWS)  # an empty batch has one, too
    if BOTH_HEADS:
        programs += tl.cdiv(tl.maximum(count, 1), TARGET_ROWS)
    done = _is_last(counters + 1 + group, programs)
    if REDUCTION == 0:
        if done:
            _write_rows(terms, trade_off, loss, batch, first, count, BOTH_HEADS, BLOCK * 8)
            if group == 0:
                one = tl.full([], 1.0, factors.dtype.element_ty)
                left = tl.load(trade_off).to(one.dtype) if BOTH_HEADS and not SOURCE_STORED else one
                tl.store(factors, left)
                tl.store(factors + 1, one)
    elif done:
        totals = _totals(by_row, pitch, first, count, KINDS, BLOCK)
        groups = ((batch - 1) >> group_bits) + 1
        if groups > 1:
            kind = tl.arange(0, 8)
            tl.store(by_row + kind * pitch + batch + group, totals, mask=((KINDS >> kind) & 1) != 0)
            done = _is_last(counters, groups)
            if done:
                totals = _totals(by_row, pitch, batch, groups, KINDS, BLOCK)
        if done:
            _write_scalars(
                totals, trade_off, probabilities, probabilities_stride, loss, terms, factors, batch, classes,
                MEAN, FORM == 2, BOTH_HEADS, SOURCE_STORED, TARGET_STORED, BLOCK * 8,
            )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "source_stride", "source_grad_stride", "relationship_stride", "target_stride", "target_grad_stride",
        "probabilities_stride", "labels_stride", "labels_b_stride", "mix_stride", "batch", "classes", "source_width",
        "target_width", "source_programs", "ignore_index", "pitch", "group_bits",
    ],
)  # fmt: skip
def co_tuning_loss_kernel(
    source_logits, source_stride: tl.int64, source_grad, source_grad_stride: tl.int64, relationship,
    relationship_stride: tl.int64, target_logits, target_stride: tl.int64, target_grad, target_grad_stride: tl.int64,
    probabilities, probabilities_stride: tl.int64, weight, label_smoothing: tl.float64, labels, labels_stride: tl.int64,
    labels_b, labels_b_stride: tl.int64, mix, mix_stride: tl.int64, ignore_index: tl.int64, by_row, batch: tl.int64,
    classes: tl.int32, source_width: tl.int32, target_width: tl.int32, source_programs: tl.int32,
    pitch: tl.int64, counters, group_bits: tl.int32, trade_off, per_row: tl.float64, loss, terms, factors,
    FORM: tl.constexpr, HAS_WEIGHT: tl.constexpr, SMOOTHS: tl.constexpr, KL: tl.constexpr, REDUCTION: tl.constexpr,
    BOTH_HEADS: tl.constexpr, SOURCE_GRADIENT: tl.constexpr, TARGET_GRADIENT: tl.constexpr,
    SOURCE_VEC: tl.constexpr, TARGET_VEC: tl.constexpr, SOURCE_STORED: tl.constexpr, TARGET_STORED: tl.constexpr,
    SOURCE_ROWS: tl.constexpr, SOURCE_BLOCK: tl.constexpr, SOURCE_KEPT: tl.constexpr, SOURCE_ACCESS: tl.constexpr,
    SOURCE_DTYPE: tl.constexpr,
    TARGET_ROWS: tl.constexpr, TARGET_BLOCK: tl.constexpr, TARGET_ACCESS: tl.constexpr, TARGET_DTYPE: tl.constexpr,
    FINISH_BLOCK: tl.constexpr,
):  # fmt: skip
    """The first ``source_programs`` programs take rows of the source head, the others rows of the target head.

    Widths and strides of rows are multiples of ``SOURCE_VEC`` and ``TARGET_VEC``. ``by_row`` is ``(5, batch + groups)``
    for a mean: the target head's loss, the source head's, the weight of the labels, the share of the target that has
    source supervision, the share that is not ignored. Else, the first two; without a reduction it is ``terms``.
    """
    COUNTS: tl.constexpr = REDUCTION == 1
    program = tl.program_id(0)
    row = program.to(tl.int64) * SOURCE_ROWS
    if program < source_programs:
        stored = tl.full([], 1.0, tl.float64)
        if SOURCE_STORED and SOURCE_GRADIENT:
            stored = tl.load(trade_off) * per_row if BOTH_HEADS else per_row
        _head(
            program, source_logits, source_stride * SOURCE_VEC, source_grad, source_grad_stride * SOURCE_VEC,
            relationship, relationship_stride * SOURCE_VEC, weight, label_smoothing, source_width * SOURCE_VEC,
            labels, labels_stride, labels_b, labels_b_stride, mix, mix_stride, classes, ignore_index, by_row, pitch,
            batch, stored, True, FORM, False, False, KL, SOURCE_GRADIENT, COUNTS, SOURCE_ROWS, SOURCE_BLOCK,
            SOURCE_KEPT, SOURCE_ACCESS, SOURCE_DTYPE,
        )  # fmt: skip
    elif BOTH_HEADS:
        row = (program - source_programs).to(tl.int64) * TARGET_ROWS
        stored = per_row if TARGET_STORED else tl.full([], 1.0, tl.float64)
        _head(
            program - source_programs, target_logits, target_stride * TARGET_VEC, target_grad,
            target_grad_stride * TARGET_VEC, probabilities, probabilities_stride * TARGET_VEC, weight, label_smoothing,
            target_width * TARGET_VEC, labels, labels_stride, labels_b, labels_b_stride, mix, mix_stride, classes,
            ignore_index, by_row, pitch, batch, stored, False, FORM, HAS_WEIGHT, SMOOTHS, False, TARGET_GRADIENT,
            COUNTS, TARGET_ROWS, TARGET_BLOCK, 0, TARGET_ACCESS, TARGET_DTYPE,
        )  # fmt: skip
    _finish(
        row, by_row, pitch, counters, group_bits, trade_off, probabilities, probabilities_stride * TARGET_VEC, loss,
        terms, factors, batch, classes, FORM, REDUCTION, BOTH_HEADS, SOURCE_ROWS, TARGET_ROWS, SOURCE_STORED,
        TARGET_STORED, FINISH_BLOCK,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------- implementations


def co_tuning_loss(
    source_logits: Tensor,
    target_logits: Tensor | None,
    target: Tensor,
    target_b: Tensor | None,
    mix: Tensor | None,
    relationship: Tensor,
    weight: Tensor | None,
    trade_off: Tensor,
    label_smoothing: float,
    ignore_index: int,
    reduction: int,
    kl_divergence: bool,
    source_gradient: bool,
    target_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``cotuning_kernels::co_tuning_loss``; see :mod:`cotuning_kernels.backends.operations`."""
    arguments = (target, target_b, mix, relationship, weight, trade_off, label_smoothing, ignore_index, reduction,
                 kl_divergence)  # fmt: skip
    check_loss(source_logits, target_logits, *arguments)
    source_grad = _new_gradient(source_logits, source_gradient)
    target_grad = _new_gradient(target_logits, target_gradient)
    reduced = _solve(source_logits, target_logits, source_grad, target_grad, *arguments)
    empty = source_logits.new_empty((0, 0), dtype=torch.float32)
    return (*reduced, empty if source_grad is None else source_grad, empty if target_grad is None else target_grad)


def co_tuning_loss_(
    source_logits: Tensor, target_logits: Tensor | None, *arguments: Any, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """``cotuning_kernels::co_tuning_loss_``: the gradients are written over the logits."""
    check_loss(source_logits, target_logits, *arguments, **options)
    check_writable("source_logits", source_logits)
    if target_logits is not None:
        check_writable("target_logits", target_logits)
    return _solve(source_logits, target_logits, source_logits, target_logits, *arguments, **options)


def _new_gradient(logits: Tensor | None, wanted: bool) -> Tensor | None:
    if logits is None or not wanted:
        return None
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _solve(
    source_logits: Tensor, target_logits: Tensor | None, source_grad: Tensor | None, target_grad: Tensor | None,
    *arguments: Any, **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``(loss, terms, factors)``."""
    with torch.cuda.device_of(source_logits):
        launch, reduced = plan(source_logits, target_logits, source_grad, target_grad, *arguments, **options)
        launch.run()
    return reduced


def plan(
    source_logits: Tensor,
    target_logits: Tensor | None,
    source_grad: Tensor | None,
    target_grad: Tensor | None,
    target: Tensor,
    target_b: Tensor | None,
    mix: Tensor | None,
    relationship: Tensor,
    weight: Tensor | None,
    trade_off: Tensor,
    label_smoothing: float,
    ignore_index: int,
    reduction: int,
    kl_divergence: bool,
) -> tuple[Launch, tuple[Tensor, Tensor, Tensor]]:
    """The launch of one call, and the ``(loss, terms, factors)`` that it writes. Only shapes decide on it."""
    both = target_logits is not None
    double = torch.float64 in (source_logits.dtype, None if target_logits is None else target_logits.dtype)
    batch = source_logits.shape[0]

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float64 if double else torch.float32, device=source_logits.device)

    rows = (batch,) if reduction == REDUCTIONS["none"] else ()
    loss, terms, factors = new(*rows), new(2, *rows), new(2)
    form = _PROBABILITIES if target.is_floating_point() else _LABELS if target_b is None else _PAIR
    probabilities = target if form == _PROBABILITIES else None

    pair = form == _PAIR
    threads = threads_for(source_logits.shape[1], source_logits.dtype, pair=pair)
    source_vec = vector(source_logits, source_grad, relationship)
    # A pair has two rows of R in registers, and KL its logarithms: kept rows would spill.
    keeps = not pair and not kl_divergence and is_kept(source_logits.shape[1], source_logits.dtype)
    target_plan, target_vec, target_programs, target_threads = RowPlan(1, 1, False), 1, 0, 0
    if target_logits is not None:
        target_threads = threads_for(target_logits.shape[1], target_logits.dtype)
        # Both heads have as many threads. A loop would waste most of so many, and wide rows want more.
        loops = plan_rows(target_logits.shape[1], target_logits.dtype, target_threads).loops
        keeps = keeps and not loops and target_threads <= KEPT_THREADS
    if keeps:
        threads = KEPT_THREADS
        source = plan_kept_row(source_logits.shape[1], source_logits.dtype, source_vec)
    else:
        threads = max(threads, target_threads)
        source = plan_rows(source_logits.shape[1], source_logits.dtype, threads, pair=pair)
    source_programs = source.programs(max(1, batch))
    if target_logits is not None:
        target_vec = vector(target_logits, target_grad, probabilities)
        target_plan = plan_rows(target_logits.shape[1], target_logits.dtype, threads)
        target_programs = target_plan.programs(max(1, batch))

    rows_of_group = max(GROUP_ROWS, source.rows, target_plan.rows)  # powers of two
    rows_of_group *= int(triton.next_power_of_2(blocks(max(1, batch), rows_of_group * MOST_GROUPS)))
    if reduction == REDUCTIONS["none"]:
        by_row = terms
    else:
        by_row = new(5 if reduction == REDUCTIONS["mean"] else 2, batch + blocks(batch, rows_of_group))

    def stride(x: Tensor | None, unit: int = 1) -> int:
        return 0 if x is None or x.dim() == 0 or x.shape[0] == 1 else x.stride(0) // unit

    launch = Launch(
        co_tuning_loss_kernel,
        (source_programs + target_programs,),
        {
            "source_logits": source_logits,
            "source_stride": stride(source_logits, source_vec),
            "source_grad": source_grad,
            "source_grad_stride": stride(source_grad, source_vec),
            "relationship": relationship,
            "relationship_stride": stride(relationship, source_vec),
            "target_logits": target_logits,
            "target_stride": stride(target_logits, target_vec),
            "target_grad": target_grad,
            "target_grad_stride": stride(target_grad, target_vec),
            "probabilities": probabilities,
            "probabilities_stride": stride(probabilities, target_vec),
            "weight": None if weight is None else weight.contiguous(),
            "label_smoothing": label_smoothing,
            "labels": None if form == _PROBABILITIES else target,
            "labels_stride": stride(target),
            "labels_b": target_b,
            "labels_b_stride": stride(target_b),
            "mix": mix,
            "mix_stride": stride(mix),
            "ignore_index": ignore_index,
            "by_row": by_row,
            "batch": batch,
            "classes": relationship.shape[0] if probabilities is None else probabilities.shape[1],
            # The one program of an empty batch has no column to write.
            "source_width": source_logits.shape[1] // source_vec if batch else 0,
            "target_width": target_logits.shape[1] // target_vec if batch and target_logits is not None else 0,
            "source_programs": source_programs,
            "pitch": by_row.stride(0),
            "counters": counters(source_logits.device),
            "group_bits": rows_of_group.bit_length() - 1,
            "trade_off": trade_off,
            "per_row": 1.0 / batch if reduction == REDUCTIONS["mean"] and batch else 1.0,
            "loss": loss,
            "terms": terms,
            "factors": factors,
            "FORM": form,
            "HAS_WEIGHT": weight is not None,
            "SMOOTHS": label_smoothing > 0,
            "KL": kl_divergence,
            "REDUCTION": reduction,
            "BOTH_HEADS": both,
            "SOURCE_GRADIENT": source_grad is not None,
            "TARGET_GRADIENT": target_grad is not None,
            "SOURCE_VEC": source_vec,
            "TARGET_VEC": target_vec,
            "SOURCE_STORED": source_logits.dtype != torch.float16,
            "TARGET_STORED": target_logits is not None and target_logits.dtype != torch.float16,
            "SOURCE_ROWS": source.rows,
            "SOURCE_BLOCK": source.block,
            "SOURCE_KEPT": source.kept,
            "SOURCE_ACCESS": source.access(source_vec, source_logits.dtype),
            "SOURCE_DTYPE": compute_type(source_logits.dtype),
            "TARGET_ROWS": target_plan.rows,
            "TARGET_BLOCK": target_plan.block,
            "TARGET_ACCESS": 0 if target_logits is None else target_plan.access(target_vec, target_logits.dtype),
            "TARGET_DTYPE": tl.float32 if target_logits is None else compute_type(target_logits.dtype),
            "FINISH_BLOCK": _FINISH_BLOCK,
        },
        threads,
    )
    return launch, (loss, terms, factors)
