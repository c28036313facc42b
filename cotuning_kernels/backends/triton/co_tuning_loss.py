"""The Co-Tuning loss in one launch: both heads, both gradients, the losses of all rows and the scalars.

``rows.py`` has the derivation and the traffic of a row.

Factors. A mean needs counts that are known only after every row. So a gradient is stored with a factor that is right
where every row takes part (``trade_off / B`` and ``1 / B``), and ``factors`` hold the rest for the backward pass. The
rest is then exactly 1, and with an upstream gradient of 1 that pass touches no gradient, which saves half the traffic
of a step. float16 gradients, divided by a large batch, would lose their digits: they are stored as large as
probabilities, and ``factors`` hold the whole factor. A row leaves 20 bytes of numbers, which the last programs add up;
a program leaves a count of 4 bytes.

Sums over rows. The rows form groups of 256, or of more where there would be more than 128 groups. Every program counts
itself in its rows' group. The last program of a group adds up the group's numbers and counts the group; the last of
these programs adds up the groups. So no program reads many numbers: of 32768 rows, 256 and then 128. Chance decides
which program is the last, but not the order of its sums: every run gives the same bits. Only the counts are atomic, and
they are integers.

Memory order. The last program sees what the others have stored: every thread of a program stores, all threads meet at
a barrier, and one of them adds to the counter with the order ``acq_rel``, for the whole device. Whatever comes before
the barrier in any thread happens before that addition, which releases all of it and not that thread's stores alone (a
release is cumulative). The addition of the last program reads what the others have written, and acquires; a barrier
hands that to its other threads, and only then they load. In PTX that is st, bar.sync, atom.acq_rel.gpu, bar.sync, ld.
On AMD the barrier is a fence of the workgroup, whose waves share a first-level cache. The wave that counts writes that
cache back (buffer_wbl2), waits, counts, waits and invalidates it (buffer_inv). That is LLVM's code for such a fence and
such an addition, and ``test_triton_static.py`` finds it in every compiled kernel.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cotuning_kernels.backends import dense_rows
from cotuning_kernels.backends.operations import split_loss_arguments, split_sparse_loss_arguments
from cotuning_kernels.backends.triton.checks import check_loss, check_writable, classes_of
from cotuning_kernels.backends.triton.counters import MOST, counters
from cotuning_kernels.backends.triton.labels import PAIR, PROBABILITIES, form_of, read_target
from cotuning_kernels.backends.triton.launch import (
    KEPT_THREADS,
    Head,
    Launch,
    RowPlan,
    blocks,
    compute_type,
    is_kept,
    is_ordinary,
    ordinary_threads,
    plan_kept_row,
    plan_ordinary_row,
    plan_rows,
    plan_sparse_row,
    threads_for,
    threads_for_sparse,
    vector,
)
from cotuning_kernels.backends.triton.rows import has_share, kept_row, long_row, ordinary_row, sparse_row, whole_rows
from cotuning_kernels.options import REDUCTIONS, OperationOptions
from cotuning_kernels.targets import OperandTarget, SparseOperandTarget

__all__ = ["co_tuning_loss", "co_tuning_loss_", "plan", "sparse_co_tuning_loss", "sparse_co_tuning_loss_"]

# Rows whose numbers one program adds up, a power of two; more of them where there would be more groups.
GROUP_ROWS = 256
MOST_GROUPS = MOST - 1  # one counter is that of the groups
_FINISH_BLOCK = 128

_NONE = tl.constexpr(REDUCTIONS["none"])
_MEAN = tl.constexpr(REDUCTIONS["mean"])

# The numbers of a row, and so the rows of ``by_row``. Without a reduction ``by_row`` is ``terms``: the first two.
_TARGET_LOSS = tl.constexpr(0)
_SOURCE_LOSS = tl.constexpr(1)
_WEIGHT = tl.constexpr(2)  # of its labels, in the target head
_SUPERVISED = tl.constexpr(3)  # the share of its target that has source supervision
_VALID = tl.constexpr(4)  # the share of its target that is not ignored
_NUMBERS = 5
_NUMBERS_POWER_OF_2 = tl.constexpr(8)

# ------------------------------------------------------------------------------------------------------------ kernels


@triton.jit
def _head(
    program, matrices, columns_count, table, labels, by_row, pitch, batch, stored, is_used, HEAD: tl.constexpr,
    COUNTS: tl.constexpr,
):  # fmt: skip
    """Some rows of one head: their gradients, and their losses and counts to ``by_row``. (Tuples: see ``rows.py``.)

    Where ``is_used`` is false, no row of the head takes part.
    """
    logits, logits_stride, grad, grad_stride = matrices
    q_table, q_stride, weight, _, _ = table
    _, _, _, _, mix, mix_stride, _, _ = labels
    rows = program
    if HEAD.access == 0:
        rows = rows * HEAD.rows + tl.arange(0, HEAD.rows)[:, None]
    in_batch = rows < batch
    rows = rows.to(tl.int64)
    stored = stored.to(HEAD.dtype)
    if HEAD.form == PROBABILITIES:
        label, share, label_b, share_b = rows, tl.where(in_batch, 1.0, 0.0), rows, 0.0
    else:
        label, share, label_b, share_b = read_target(labels, rows, in_batch, HEAD.form == PAIR, HEAD.dtype)
    valid = share
    if HEAD.form == PAIR:
        valid += share_b
    if HEAD.is_source:
        share = tl.where(is_used, share, 0.0)
        share_b = tl.where(is_used, share_b, 0.0)
    target = label, share, label_b, share_b
    supervised = share
    if HEAD.is_source and HEAD.form == PROBABILITIES:
        # The share of the row's classes that have source supervision, from the matrix product.
        supervised = tl.load(mix + rows * mix_stride, mask=in_batch & is_used, other=0.0).to(HEAD.dtype)
    if HEAD.access > 0 and HEAD.has_gradient:
        grad += rows * grad_stride
    if HEAD.sparse:
        loss, size = sparse_row(logits + rows * logits_stride, grad, columns_count, table, target, stored, HEAD)
        size_b = size
    elif HEAD.whole > 0 or HEAD.kept > 0:
        q_table += (rows if HEAD.form == PROBABILITIES else label) * q_stride
        logits += rows * logits_stride
        counts = has_share(target)
        if HEAD.whole > 0:
            loss, size = ordinary_row(logits, grad, q_table, columns_count, counts, stored, HEAD)
        else:
            loss, size = kept_row(logits, grad, q_table, columns_count, counts, supervised, stored, HEAD)
        size_b = size
    elif HEAD.access > 0:
        loss, size, size_b = long_row(
            logits + rows * logits_stride, grad, columns_count, table, target, rows, stored, HEAD
        )  # fmt: skip
    else:
        loss, size, size_b = whole_rows(matrices, columns_count, table, target, rows, in_batch, stored, HEAD)
    if HEAD.form != PROBABILITIES:
        # A label that names no class, where the device does not stop there (see labels.py): NaN, not a wrong number.
        loss = tl.where(valid != valid, float("nan"), loss)
    out = by_row + rows
    if HEAD.is_source:
        tl.store(out + _SOURCE_LOSS * pitch, loss, mask=in_batch)
        if COUNTS:
            if HEAD.form != PROBABILITIES:
                supervised = tl.where(size != 0, share, 0.0)
                if HEAD.form == PAIR:
                    supervised += tl.where(size_b != 0, share_b, 0.0)
                tl.store(out + _VALID * pitch, valid, mask=in_batch)
            tl.store(out + _SUPERVISED * pitch, supervised, mask=in_batch)
    else:
        tl.store(out + _TARGET_LOSS * pitch, loss, mask=in_batch)
        if COUNTS and HEAD.form != PROBABILITIES:
            if HEAD.has_weight:
                share *= tl.load(weight + label, mask=share != 0, other=0.0).to(HEAD.dtype)
                if HEAD.form == PAIR:
                    share_b *= tl.load(weight + label_b, mask=share_b != 0, other=0.0).to(HEAD.dtype)
            if HEAD.form == PAIR:
                share += share_b
            tl.store(out + _WEIGHT * pitch, share, mask=in_batch)


# From here to the kernel: what the last program does.


@triton.jit
def _is_last(counter, count):
    """Count this program in, once it has stored: is it the last of ``count``? The last one sets the counter back."""
    tl.debug_barrier()
    is_last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == count - 1
    if is_last:
        tl.store(counter, 0)
    return is_last


@triton.jit
def _totals(by_row, pitch, first, count, NUMBERS: tl.constexpr, BLOCK: tl.constexpr):
    """Sums over some rows of each number that has its bit in NUMBERS: by lane in the order of rows, then over lanes."""
    number = tl.arange(0, _NUMBERS_POWER_OF_2)[:, None]
    is_summed = ((NUMBERS >> number) & 1) != 0
    sums = tl.zeros([_NUMBERS_POWER_OF_2, BLOCK], by_row.dtype.element_ty)
    for start in range(0, count, BLOCK):
        row = start + tl.arange(0, BLOCK)[None, :]
        sums += tl.load(by_row + number * pitch + first + row, mask=is_summed & (row < count), other=0.0)
    return tl.sum(sums, 1)


@triton.jit
def _one_of(totals, NUMBER: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, _NUMBERS_POWER_OF_2) == NUMBER, totals, 0.0), 0)


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
    totals, trade_off, probabilities, probabilities_stride, outputs, batch, classes, SOURCE: tl.constexpr,
    TARGET: tl.constexpr, MEAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The loss, its two terms ``[target, source]`` and the factors of the gradients, from the sums over all rows."""
    BOTH_HEADS: tl.constexpr = TARGET is not None
    TARGET_IS_SCALED: tl.constexpr = TARGET.is_scaled if BOTH_HEADS else False
    loss, terms, factors = outputs
    dtype = totals.dtype
    target = _one_of(totals, _TARGET_LOSS)
    source = _one_of(totals, _SOURCE_LOSS)
    # What is left to multiply each gradient by, before it is divided by the means' counts.
    factor = tl.full([], 1.0, dtype)
    target_factor = tl.full([], 1.0, dtype)
    if SOURCE.is_scaled:
        factor = batch.to(dtype) if MEAN else factor
    elif BOTH_HEADS:
        factor = tl.load(trade_off).to(dtype)
    if TARGET_IS_SCALED and MEAN:
        target_factor = batch.to(dtype)
    if MEAN:
        count = _one_of(totals, _SUPERVISED)
        if SOURCE.form == PROBABILITIES:
            weight = batch.to(dtype)
            any_valid = tl.full([], 1, tl.int32)
            if count == 0:  # rare: only then does it matter whether any row is valid
                any_valid = _any_probability(probabilities, probabilities_stride, batch, classes, BLOCK)
        else:
            weight = _one_of(totals, _WEIGHT)
            any_valid = (_one_of(totals, _VALID) != 0).to(tl.int32)
        # A batch without supervised rows is ordinary, and its source term is 0. A batch without valid rows has no mean;
        # every gradient is 0 and must stay 0 when it is multiplied by the factor.
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
    row, by_row, pitch, counters, group_bits, trade_off, probabilities, probabilities_stride, outputs, batch, classes,
    SOURCE: tl.constexpr, TARGET: tl.constexpr, REDUCTION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The last program of a group of rows adds up their numbers, and the last of these programs those of the groups.

    The groups' numbers lie in ``by_row`` behind the rows'. Without a reduction only the terms of each row are added.
    """
    BOTH_HEADS: tl.constexpr = TARGET is not None
    MEAN: tl.constexpr = REDUCTION == _MEAN
    COUNTS_LABELS: tl.constexpr = MEAN and SOURCE.form != PROBABILITIES
    NUMBERS: tl.constexpr = (
        (1 << _SOURCE_LOSS.value)
        + BOTH_HEADS * ((1 << _TARGET_LOSS.value) + COUNTS_LABELS * (1 << _WEIGHT.value))
        + MEAN * (1 << _SUPERVISED.value)
        + COUNTS_LABELS * (1 << _VALID.value)
    )
    group = row >> group_bits
    first = group << group_bits
    count = tl.minimum(batch - first, 1 << group_bits)
    programs = tl.cdiv(tl.maximum(count, 1), SOURCE.rows)  # an empty batch has one, too
    if BOTH_HEADS:
        programs += tl.cdiv(tl.maximum(count, 1), TARGET.rows)
    done = _is_last(counters + 1 + group, programs)
    if REDUCTION == _NONE:
        if done:
            loss, terms, factors = outputs
            _write_rows(terms, trade_off, loss, batch, first, count, BOTH_HEADS, BLOCK * 8)
            if group == 0:
                one = tl.full([], 1.0, factors.dtype.element_ty)
                left = tl.load(trade_off).to(one.dtype) if BOTH_HEADS and not SOURCE.is_scaled else one
                tl.store(factors, left)
                tl.store(factors + 1, one)
    elif done:
        totals = _totals(by_row, pitch, first, count, NUMBERS, BLOCK)
        groups = ((batch - 1) >> group_bits) + 1
        if groups > 1:
            number = tl.arange(0, _NUMBERS_POWER_OF_2)
            tl.store(by_row + number * pitch + batch + group, totals, mask=((NUMBERS >> number) & 1) != 0)
            done = _is_last(counters, groups)
            if done:
                totals = _totals(by_row, pitch, batch, groups, NUMBERS, BLOCK)
        if done:
            _write_scalars(
                totals, trade_off, probabilities, probabilities_stride, outputs, batch, classes, SOURCE, TARGET, MEAN,
                BLOCK * 8,
            )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "source_stride", "source_grad_stride", "relationship_stride", "target_stride", "target_grad_stride",
        "probabilities_stride", "labels_stride", "labels_b_stride", "mix_stride", "batch", "classes", "source_width",
        "target_width", "source_programs", "ignore_index", "pitch", "group_bits",
    ],
    # Read one by one.
    do_not_specialize_on_alignment=["labels", "labels_b", "mix", "trade_off", "crow_indices", "col_indices"],
)  # fmt: skip
def co_tuning_loss_kernel(
    source_logits, source_stride: tl.int64, source_grad, source_grad_stride: tl.int64, relationship,
    relationship_stride: tl.int64, crow_indices, col_indices,
    target_logits, target_stride: tl.int64, target_grad, target_grad_stride: tl.int64,
    probabilities, probabilities_stride: tl.int64, weight, label_smoothing: tl.float64, labels, labels_stride: tl.int64,
    labels_b, labels_b_stride: tl.int64, mix, mix_stride: tl.int64, ignore_index: tl.int64, by_row, batch: tl.int32,
    classes: tl.int32, source_width: tl.int32, target_width: tl.int32, source_programs: tl.int32,
    pitch: tl.int64, counters, group_bits: tl.int32, trade_off, per_row: tl.float64, loss, terms, factors,
    SOURCE: tl.constexpr, TARGET: tl.constexpr, REDUCTION: tl.constexpr, FINISH_BLOCK: tl.constexpr,
):  # fmt: skip
    """The first ``source_programs`` programs take rows of the source head, the others rows of the target head.

    ``SOURCE`` and ``TARGET`` are the heads (``TARGET`` is None without target logits); their widths and the strides of
    their rows are multiples of ``vec``. ``by_row`` is ``(5, batch + groups)`` for a mean and ``(2, batch + groups)``
    for a sum; without a reduction it is ``terms``. ``relationship`` holds the values of a sparse R.
    """
    COUNTS: tl.constexpr = REDUCTION == _MEAN
    program = tl.program_id(0)
    row = program * SOURCE.rows
    targets = labels, labels_stride, labels_b, labels_b_stride, mix, mix_stride, classes, ignore_index
    if program < source_programs:
        stored = per_row if SOURCE.is_scaled else tl.full([], 1.0, tl.float64)
        is_used = True
        if TARGET is not None:
            factor = tl.load(trade_off)
            is_used = factor != 0
            if SOURCE.is_scaled:
                stored *= factor
        _head(
            program, (source_logits, source_stride * SOURCE.vec, source_grad, source_grad_stride * SOURCE.vec),
            source_width * SOURCE.vec,
            (relationship, crow_indices, col_indices, label_smoothing, classes) if SOURCE.sparse
            else (relationship, relationship_stride * SOURCE.vec, weight, label_smoothing, classes),
            targets, by_row, pitch, batch, stored, is_used, SOURCE, COUNTS,
        )  # fmt: skip
    elif TARGET is not None:
        row = (program - source_programs) * TARGET.rows
        stored = per_row if TARGET.is_scaled else tl.full([], 1.0, tl.float64)
        _head(
            program - source_programs,
            (target_logits, target_stride * TARGET.vec, target_grad, target_grad_stride * TARGET.vec),
            target_width * TARGET.vec,
            (probabilities, probabilities_stride * TARGET.vec, weight, label_smoothing, classes),
            targets, by_row, pitch, batch, stored, True, TARGET, COUNTS,
        )  # fmt: skip
    probabilities_stride *= 1 if TARGET is None else TARGET.vec
    outputs = loss, terms, factors
    _finish(
        row, by_row, pitch, counters, group_bits, trade_off, probabilities, probabilities_stride, outputs, batch,
        classes, SOURCE, TARGET, REDUCTION, FINISH_BLOCK,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------- implementations


def co_tuning_loss(
    source_logits: Tensor, target_logits: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``cotuning_kernels::co_tuning_loss``; see :mod:`cotuning_kernels.backends.operations`."""
    *shared, source_gradient, target_gradient = arguments
    return _in_new_memory(
        source_logits, target_logits, *split_loss_arguments(shared), source_gradient, target_gradient
    )  # fmt: skip


def co_tuning_loss_(
    source_logits: Tensor, target_logits: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """``cotuning_kernels::co_tuning_loss_``, which writes the gradients over the logits."""
    return _in_place(source_logits, target_logits, *split_loss_arguments(arguments))


def sparse_co_tuning_loss(source_logits: Tensor, target_logits: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    """``cotuning_kernels::sparse_co_tuning_loss``. The rows of a pair, whose entries may coincide, become dense."""
    *shared, source_gradient, target_gradient = arguments
    operand, options = split_sparse_loss_arguments(shared)
    if operand.target_b is not None:
        return dense_rows.sparse_co_tuning_loss("triton", source_logits, target_logits, *arguments)
    return _in_new_memory(source_logits, target_logits, operand, options, source_gradient, target_gradient)


def sparse_co_tuning_loss_(source_logits: Tensor, target_logits: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    """``cotuning_kernels::sparse_co_tuning_loss_``, which writes the gradients over the logits."""
    operand, options = split_sparse_loss_arguments(arguments)
    if operand.target_b is not None:
        return dense_rows.sparse_co_tuning_loss_("triton", source_logits, target_logits, *arguments)
    return _in_place(source_logits, target_logits, operand, options)


def _in_new_memory(
    source_logits: Tensor, target_logits: Tensor | None, operand: OperandTarget | SparseOperandTarget,
    options: OperationOptions, source_gradient: bool, target_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    check_loss(source_logits, target_logits, operand, options)
    source_grad = _new_gradient(source_logits, source_gradient)
    target_grad = _new_gradient(target_logits, target_gradient)
    reduced = _solve(source_logits, target_logits, source_grad, target_grad, operand, options)
    empty = source_logits.new_empty((0, 0), dtype=torch.float32)
    return (*reduced, empty if source_grad is None else source_grad, empty if target_grad is None else target_grad)


def _in_place(
    source_logits: Tensor, target_logits: Tensor | None, operand: OperandTarget | SparseOperandTarget,
    options: OperationOptions,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    check_loss(source_logits, target_logits, operand, options)
    check_writable("source_logits", source_logits)
    if target_logits is not None:
        check_writable("target_logits", target_logits)
    return _solve(source_logits, target_logits, source_logits, target_logits, operand, options)


def _new_gradient(logits: Tensor | None, wanted: bool) -> Tensor | None:
    if logits is None or not wanted:
        return None
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _solve(
    source_logits: Tensor, target_logits: Tensor | None, source_grad: Tensor | None, target_grad: Tensor | None,
    operand: OperandTarget | SparseOperandTarget, options: OperationOptions,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``(loss, terms, factors)``."""
    with torch.cuda.device_of(source_logits):
        launch, reduced = plan(source_logits, target_logits, source_grad, target_grad, operand, options)
        launch.run()
    return reduced


def plan(
    source_logits: Tensor, target_logits: Tensor | None, source_grad: Tensor | None, target_grad: Tensor | None,
    operand: OperandTarget | SparseOperandTarget, options: OperationOptions,
) -> tuple[Launch, tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    """Return the launch of one call, and the ``(loss, terms, factors)`` that it writes."""
    target, target_b, mix, *_ = operand
    sparse = operand if isinstance(operand, SparseOperandTarget) else None
    relationship = None if isinstance(operand, SparseOperandTarget) else operand.relationship
    reduction, batch = options.reduction, source_logits.shape[0]
    loss, terms, factors = outputs = _new_outputs(source_logits, target_logits, reduction)
    form = form_of(target, target_b)
    labels, probabilities = (None, target) if target.is_floating_point() else (target, None)
    source, target_head, threads = _plan_heads(
        source_logits, target_logits, source_grad, target_grad, relationship, probabilities, form, options
    )
    source_vec, target_vec = source.vec, 1 if target_head is None else target_head.vec
    source_programs = blocks(max(1, batch), source.rows)
    target_programs = 0 if target_head is None else blocks(max(1, batch), target_head.rows)
    rows_of_group = _rows_of_group(batch, source, target_head)
    by_row = terms
    if reduction != REDUCTIONS["none"]:
        numbers = _NUMBERS if reduction == REDUCTIONS["mean"] else 2
        by_row = terms.new_empty((numbers, batch + blocks(batch, rows_of_group)))
    launch = Launch(
        co_tuning_loss_kernel,
        (source_programs + target_programs,),
        {
            "source_logits": source_logits,
            "source_stride": _stride(source_logits, source_vec),
            "source_grad": source_grad,
            "source_grad_stride": _stride(source_grad, source_vec),
            "relationship": sparse.values if sparse else relationship,
            "relationship_stride": _stride(relationship, source_vec),
            "crow_indices": sparse.crow_indices if sparse else None,
            "col_indices": sparse.col_indices if sparse else None,
            "target_logits": target_logits,
            "target_stride": _stride(target_logits, target_vec),
            "target_grad": target_grad,
            "target_grad_stride": _stride(target_grad, target_vec),
            "probabilities": probabilities,
            "probabilities_stride": _stride(probabilities, target_vec),
            "weight": None if options.weight is None else options.weight.contiguous(),
            "label_smoothing": options.label_smoothing,
            "labels": labels,
            "labels_stride": _stride(labels),
            "labels_b": target_b,
            "labels_b_stride": _stride(target_b),
            "mix": mix,
            "mix_stride": _stride(mix),
            "ignore_index": options.ignore_index,
            "by_row": by_row,
            "batch": batch,
            "classes": classes_of(operand),
            # The one program of an empty batch has no column to write.
            "source_width": source_logits.shape[1] // source_vec if batch else 0,
            "target_width": target_logits.shape[1] // target_vec if batch and target_logits is not None else 0,
            "source_programs": source_programs,
            "pitch": by_row.stride(0),
            "counters": counters(source_logits.device),
            "group_bits": rows_of_group.bit_length() - 1,
            "trade_off": options.trade_off,
            "per_row": 1.0 / batch if reduction == REDUCTIONS["mean"] and batch else 1.0,
            "loss": loss,
            "terms": terms,
            "factors": factors,
            "SOURCE": source,
            "TARGET": target_head,
            "REDUCTION": reduction,
            "FINISH_BLOCK": _FINISH_BLOCK,
        },
        threads,
    )
    return launch, outputs


def _new_outputs(source_logits: Tensor, target_logits: Tensor | None, reduction: int) -> tuple[Tensor, Tensor, Tensor]:
    """``(loss, terms, factors)``."""
    is_double = torch.float64 in (source_logits.dtype, None if target_logits is None else target_logits.dtype)
    options: Any = {"dtype": torch.float64 if is_double else torch.float32, "device": source_logits.device}
    rows = source_logits.shape[:1] if reduction == REDUCTIONS["none"] else ()
    return torch.empty(rows, **options), torch.empty((2, *rows), **options), torch.empty((2,), **options)


def _plan_heads(
    source_logits: Tensor, target_logits: Tensor | None, source_grad: Tensor | None, target_grad: Tensor | None,
    relationship: Tensor | None, probabilities: Tensor | None, form: int, options: OperationOptions,
) -> tuple[Head, Head | None, int]:  # fmt: skip
    """``(source head, target head, threads of a program)``. The programs of both heads have as many threads.

    Without ``relationship`` it is sparse.
    """
    width, dtype = source_logits.shape[1], source_logits.dtype
    # A pair has two rows of R in registers, and KL its logarithms: such rows have no ordinary way.
    is_wide = form == PAIR.value or options.kl_divergence
    ordinary = relationship is not None and not is_wide and dtype != torch.float64
    vec = vector(source_logits, source_grad, relationship)
    threads = threads_for(width, dtype, wide=is_wide, ordinary=ordinary)
    if relationship is None:
        threads = threads_for_sparse(width)
    target_head = None
    target_threads, loops = 0, False
    if target_logits is not None:
        target_width, target_dtype = target_logits.shape[1], target_logits.dtype
        target_threads = threads_for(target_width, target_dtype, ordinary=ordinary)
        loops = plan_rows(target_width, target_dtype, target_threads).loops
    # A loop would waste most of a kept row's threads, and wide rows want more.
    keeps = ordinary and is_kept(width, dtype, vec) and not loops and target_threads <= KEPT_THREADS
    if keeps:
        threads = KEPT_THREADS
    elif ordinary and is_ordinary(width, dtype):
        threads = ordinary_threads(width)
    threads = max(threads, target_threads)
    if target_logits is not None:
        rows = plan_rows(target_width, target_dtype, threads)
        target_vec = vector(target_logits, target_grad, probabilities)
        target_head = Head(
            is_source=False, form=form, has_weight=options.weight is not None, smooths=options.label_smoothing > 0,
            kl=False,
            **_of_head(target_logits, target_grad, rows, target_vec),
        )  # fmt: skip
    rows = plan_kept_row(width, dtype, vec) if keeps else plan_rows(width, dtype, threads, wide=is_wide)
    if relationship is None:
        rows = plan_sparse_row(width)
    elif not keeps and ordinary and is_ordinary(width, dtype) and rows.rows == 1:
        rows = plan_ordinary_row(width, dtype, threads, vec)
    source = Head(
        is_source=True, form=form, has_weight=False, smooths=False, kl=options.kl_divergence,
        sparse=relationship is None,
        **_of_head(source_logits, source_grad, rows, vec),
    )  # fmt: skip
    return source, target_head, threads


def _of_head(logits: Tensor, grad: Tensor | None, rows: RowPlan, vec: int) -> dict[str, Any]:
    """The attributes of a :class:`Head` that either head has."""
    return {
        "has_gradient": grad is not None,
        "is_scaled": logits.dtype != torch.float16,
        "vec": vec,
        "rows": rows.rows,
        "block": rows.block,
        "kept": rows.kept,
        "whole": rows.whole,
        "access": rows.access(vec, logits.dtype),
        "dtype": compute_type(logits.dtype),
    }


def _rows_of_group(batch: int, source: Head, target: Head | None) -> int:
    """Rows whose numbers one program adds up: a power of two, as are the rows of a program."""
    rows = max(GROUP_ROWS, source.rows, 1 if target is None else target.rows)
    return rows * int(triton.next_power_of_2(blocks(max(1, batch), rows * MOST_GROUPS)))


def _stride(x: Tensor | None, unit: int = 1) -> int:
    """From one row to the next, in multiples of ``unit``; 0 where there is but one row."""
    return 0 if x is None or x.dim() == 0 or x.shape[0] == 1 else x.stride(0) // unit
