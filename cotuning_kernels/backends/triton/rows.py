"""The rows of one head: their losses and gradients, and whether there is a target at all.

A row has logits ``z`` and a target distribution ``q`` (a row of R for the source head, a label for the target head),
``Q = sum(q)``. With ``x = z - max(z)``, ``e = exp(x)`` and ``S = sum(e)``

    loss     = Q log S - sum_{q != 0} q x               gradient = Q / S * e - q
    KL       = sum_{q != 0} q (log(q S) - x)            (the same gradient)

Near the minimum of KL, ``q S`` is nearly ``e``, so each term of its sum is nearly 0. ``Q log S - sum q x`` and
``sum q log q`` would cancel. In a long row, the first sweep gives ``S``, and the second one the terms of KL. Both sums
are those of many blocks, which are added in float64.

A row without any ``q != 0`` takes no part: its loss and gradient are 0, whatever its logits are. The gradient is
multiplied by ``stored`` as it is written (see ``co_tuning_loss.py``).

Traffic. Each logit is read once, each entry of its row of R once (mostly from L2, where R stays) and each gradient is
written once: ``2 * itemsize`` bytes a logit, and R. The length of the row decides between four ways:

* ``whole_rows``: the registers of a program hold logits and R, of one row or several.
* ``ordinary_row``: the same for one row of the source head with one row of R, without KL: most rows of most users.
* ``kept_row``: the registers hold the logits alone. R is read as the gradient is written, which needs ``Q`` before
  ``q`` has been seen. Rows of R are distributions, so ``Q`` is taken to be 1, or, with probabilities, the share of
  their classes that have supervision. Where the entries sum to something else, the gradient is written a second time.
  Sums of rows in 16 bits mostly differ from 1 by more than rounding, so such a row of R is summed first, and read
  twice.
* ``long_row``: the registers hold neither. Both are read twice, the second time from L2 if they are still there.

With a sparse R no row of R is read: ``sparse_row`` sweeps over the logits alone, and then corrects the gradient at the
few entries.

A row without a label is not read at all. A kept row without supervision reads no logit, another one nothing twice but
its row of R.

The ordinary way. ``ordinary_row`` and ``kept_row`` compute with powers of two: ``x = (z - max(z)) log2(e)``.
``ordinary_row`` subtracts first. ``kept_row`` has no register left for the difference: ``z log2(e) - max(z) log2(e)``
is one instruction, which GPUs fuse; unfused, it would lose digits of logits far from 0. The rounding of ``max(z)
log2(e)`` does not count, since both terms of the loss and both parts of ``e / S`` contain the same number. These
functions do not look at single elements: where ``q = 0`` meets a logit of -inf, ``q x`` is NaN, and so is its sum. If
the sum is not finite, or ``Q`` is 0, the sum is taken once more with care; the gradient needs no care. Only the last
block has a mask.

Shapes. ``rows``, labels and shares are (ROWS, 1), or scalars where a program takes one long row. ``columns`` is
(1, BLOCK) and ``mask`` (ROWS, BLOCK), or both have the shape of a long row's block. The blocks of an ordinary or kept
row have one axis, and its sums are those of the columns at the same place in every block, until the threads meet.

Tuples that the functions share:

* ``matrices``: ``(logits, stride, gradient, stride)``
* ``table``: where ``q`` comes from, ``(R or probabilities, stride, class weights, label smoothing, classes)``
  (of a sparse R: ``(values, offsets of the rows, columns, label smoothing, classes)``)
* ``target``: ``(label, its share, second label, its share)``, from ``read_target``

``HEAD`` is a :class:`~cotuning_kernels.backends.triton.launch.Head`: all that is known when a kernel is compiled.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from cotuning_kernels.backends.triton.exponential import exp
from cotuning_kernels.backends.triton.labels import LABELS, PAIR, PROBABILITIES
from cotuning_kernels.backends.triton.launch import COLUMNS_A_LANE

__all__ = ["has_share", "kept_row", "long_row", "ordinary_row", "sparse_row", "whole_rows"]

_COLUMNS_A_LANE = tl.constexpr(COLUMNS_A_LANE)
_GLANCE = tl.constexpr(128)
_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
_LEAST_FLOAT32 = tl.constexpr(torch.finfo(torch.float32).min)
_LEAST_FLOAT64 = tl.constexpr(torch.finfo(torch.float64).min)


@triton.jit
def has_share(target):
    """Whether any label of a row counts: a row whose labels are all ignored is not read."""
    _, share, _, share_b = target
    return (share != 0) | (share_b != 0)


@triton.jit
def _source_distribution(table, target, rows, columns, mask, HEAD: tl.constexpr):
    """``q`` of some columns as two parts whose sum it is: each side of a pair has, or has no, source supervision."""
    relationship, stride, _, _, _ = table
    label, share, label_b, share_b = target
    if HEAD.form == PROBABILITIES:  # one row of P R a row of the batch
        q = tl.load(relationship + rows * stride + columns, mask=mask, other=0.0).to(HEAD.dtype)
        return q, q
    if HEAD.form == LABELS:
        q = tl.load(relationship + label * stride + columns, mask=mask, other=0.0, eviction_policy="evict_last")
        return q.to(HEAD.dtype), q.to(HEAD.dtype)
    q = tl.load(
        relationship + label * stride + columns, mask=mask & (share != 0), other=0.0, eviction_policy="evict_last"
    ).to(HEAD.dtype)
    q_b = tl.load(
        relationship + label_b * stride + columns, mask=mask & (share_b != 0), other=0.0, eviction_policy="evict_last"
    ).to(HEAD.dtype)
    return q * share, q_b * share_b


@triton.jit
def _target_distribution(table, target, rows, columns, mask, HEAD: tl.constexpr):
    """``q = weight * ((1 - smoothing) * target + smoothing / N_t)`` of some columns."""
    probabilities, stride, weight, smoothing, classes = table
    label, share, label_b, share_b = target
    if HEAD.form == PROBABILITIES:
        q = tl.load(probabilities + rows * stride + columns, mask=mask, other=0.0).to(HEAD.dtype)
        whole = tl.where(mask, 1.0, 0.0).to(HEAD.dtype)
    else:
        q = tl.where(columns == label, share, 0.0)
        whole = share
        if HEAD.form == PAIR:
            q += tl.where(columns == label_b, share_b, 0.0)
            whole += share_b
    if HEAD.smooths:
        smoothing = smoothing.to(HEAD.dtype)
        q = (1 - smoothing) * q + smoothing / classes * whole
        q = tl.where(mask, q, 0.0)
    if HEAD.has_weight:
        q *= tl.load(weight + columns, mask=columns < classes, other=0.0).to(HEAD.dtype)
    return q


@triton.jit
def _distribution(table, target, rows, columns, mask, HEAD: tl.constexpr):
    """``q`` of either head: two parts for a pair in the source head, elsewhere the same one twice."""
    if HEAD.is_source:
        return _source_distribution(table, target, rows, columns, mask, HEAD)
    q = _target_distribution(table, target, rows, columns, mask, HEAD)
    return q, q


@triton.jit
def whole_rows(matrices, columns_count, table, target, rows, in_batch, stored, HEAD: tl.constexpr):
    """Rows in registers. Returns the loss and the sizes of both parts of ``q``: 0 where every entry is 0."""
    PARTS: tl.constexpr = HEAD.is_source and HEAD.form == PAIR
    logits, logits_stride, grad, grad_stride = matrices
    columns = tl.arange(0, HEAD.block)[None, :]
    mask = in_batch & (columns < columns_count)
    read = mask & has_share(target)
    z = tl.load(
        logits + rows * logits_stride + columns, mask=read, other=-float("inf"), eviction_policy="evict_first"
    ).to(HEAD.dtype)  # fmt: skip
    q, q_b = _distribution(table, target, rows, columns, read, HEAD)
    # Entries may cancel: only the sum of their absolute values says whether there are any.
    size = tl.sum(tl.abs(q), 1, keep_dims=True)
    size_b = size
    whole_size = size
    if PARTS:
        size_b = tl.sum(tl.abs(q_b), 1, keep_dims=True)
        q += q_b
        whole_size = tl.sum(tl.abs(q), 1, keep_dims=True)
    takes_part = whole_size != 0
    mass = tl.sum(q, 1, keep_dims=True)
    x = z - tl.max(z, 1, keep_dims=True)
    e = exp(x)
    total = tl.sum(e, 1, keep_dims=True)
    if HEAD.kl:
        loss = tl.sum(_divergence(q, x, total), 1, keep_dims=True)
    else:
        loss = mass * tl.log(total) - tl.sum(_product(q, x), 1, keep_dims=True)
    if HEAD.has_gradient:
        g = tl.where(takes_part, stored * (e * (mass / total) - q), 0.0)
        tl.store(
            grad + rows * grad_stride + columns, g.to(grad.dtype.element_ty), mask=mask, eviction_policy="evict_first"
        )  # fmt: skip
    return tl.where(takes_part, loss, 0.0), size, size_b


@triton.jit
def _load(row, start, columns_count, other: tl.constexpr, POLICY: tl.constexpr, FULL: tl.constexpr, HEAD: tl.constexpr):
    """A block of columns of a row. The mask of a FULL block costs nothing.

    bfloat16 is read in pairs where it lies in pairs. A number is the upper half of a float32, which takes one
    instruction to make; from a single one, the compiler makes it in two.
    """
    dtype: tl.constexpr = row.dtype.element_ty
    if dtype == tl.bfloat16 and HEAD.vec > 1:
        columns = tl.arange(0, HEAD.block // 2)
        mask = (start // 2 + columns < columns_count // HEAD.vec * (HEAD.vec // 2)) | FULL
        PAIR_OF_OTHERS: tl.constexpr = -0x7F0080 if other < 0 else 0  # two of -inf
        pairs = tl.load(
            (row + start).to(tl.pointer_type(tl.int32)) + columns, mask=mask, other=PAIR_OF_OTHERS,
            eviction_policy=POLICY,
        )  # fmt: skip
        return tl.join(pairs << 16, pairs & -65536).reshape([HEAD.block]).to(tl.float32, bitcast=True)
    columns = start + tl.arange(0, HEAD.block)
    mask = (columns < columns_count) | FULL
    return tl.load(row + columns, mask=mask, other=other, eviction_policy=POLICY).to(HEAD.dtype)


@triton.jit
def ordinary_row(logits, grad, q_row, columns_count, has_label, stored, HEAD: tl.constexpr):
    """A source head's row whose logits and ``q`` lie in registers, HEAD.chunks blocks, all full but the last."""
    BLOCK: tl.constexpr = HEAD.block
    BLOCKS: tl.constexpr = HEAD.whole
    POLICY: tl.constexpr = "" if HEAD.form == PROBABILITIES else "evict_last"  # R stays in L2, P R is read once
    DTYPE: tl.constexpr = HEAD.dtype
    first = tl.arange(0, BLOCK)
    zero = tl.zeros([BLOCK], DTYPE)
    loss = tl.full([], 0.0, DTYPE)
    row_size = loss
    if has_label:
        z, q, e = (), (), ()
        top = zero
        for k in tl.static_range(BLOCKS):
            columns = k * BLOCK + first
            mask = (columns < columns_count) | (k + 1 < BLOCKS)
            z_k = _load(logits, k * BLOCK, columns_count, -float("inf"), "", k + 1 < BLOCKS, HEAD)
            q_k = _load(q_row, k * BLOCK, columns_count, 0.0, POLICY, k + 1 < BLOCKS, HEAD)
            top = tl.maximum(top, z_k) if k > 0 else z_k
            z = z + (z_k,)  # type: ignore[assignment]  # noqa: RUF005  (Triton knows no star)
            q = q + (q_k,)  # type: ignore[assignment]  # noqa: RUF005
        highest = tl.max(top, 0)
        total, dot, mass = zero, zero, zero
        for k in tl.static_range(BLOCKS):
            x = (z[k] - highest) * _LOG2_E
            e_k = tl.exp2(x)
            e = e + (e_k,)  # type: ignore[assignment]  # noqa: RUF005
            if k + 1 == BLOCKS:
                x = tl.where(k * BLOCK + first < columns_count, x, 0.0)
            if k == 0:
                total, dot, mass = e_k, q[k] * x, q[k]
            else:
                total += e_k
                dot += q[k] * x
                mass += q[k]
        row_total = tl.sum(total, 0)
        row_dot = tl.sum(dot, 0)
        row_mass = tl.sum(mass, 0)
        row_size = row_mass
        if ((tl.abs(row_dot) < float("inf")) & (row_mass != 0)) == 0:
            size = zero
            for start in range(0, columns_count, BLOCK):
                size += tl.abs(_load(q_row, start, columns_count, 0.0, POLICY, False, HEAD))
            row_size = tl.sum(size, 0)
            if row_size != 0:
                dot = zero
                for start in range(0, columns_count, BLOCK):
                    z_k = _load(logits, start, columns_count, 0.0, "", False, HEAD)
                    q_k = _load(q_row, start, columns_count, 0.0, POLICY, False, HEAD)
                    dot += _product(q_k, (z_k - highest) * _LOG2_E)
                row_dot = tl.sum(dot, 0)
        loss = (row_mass * tl.log2(row_total) - row_dot) * _LN_2
        if row_size != 0:
            if HEAD.has_gradient:
                scale = stored * row_mass / row_total
                for k in tl.static_range(BLOCKS):
                    columns = k * BLOCK + first
                    mask = (columns < columns_count) | (k + 1 < BLOCKS)
                    g = e[k] * scale - stored * q[k]
                    tl.store(grad + columns, g.to(grad.dtype.element_ty), mask=mask)
        else:
            loss = tl.full([], 0.0, DTYPE)
            if HEAD.has_gradient:
                _write_zeros(grad, columns_count, first, BLOCK)
    elif HEAD.has_gradient:
        _write_zeros(grad, columns_count, first, BLOCK)
    return loss, row_size


@triton.jit
def _lanes(x, function: tl.constexpr):
    """Sums or maxima by lane of a long row's block; a thread has both other axes in its registers."""
    if function == "max":
        return tl.max(tl.max(x, 2), 0)
    return tl.sum(tl.sum(x, 2), 0)


@triton.jit
def _columns_of_block(BLOCK: tl.constexpr, A_LANE: tl.constexpr, ACCESS: tl.constexpr):
    """``(steps, lanes, ACCESS)``: a lane (a thread) has A_LANE columns of a block, ACCESS neighbours at a time."""
    STEPS: tl.constexpr = A_LANE // ACCESS
    LANES: tl.constexpr = BLOCK // A_LANE
    return (
        tl.arange(0, STEPS)[:, None, None] * (LANES * ACCESS) + tl.arange(0, LANES)[None, :, None] * ACCESS
        + tl.arange(0, ACCESS)[None, None, :]
    )  # fmt: skip


@triton.jit
def _product(q, x):
    """``q x``; a logit of -inf where ``q = 0`` contributes nothing, where the product alone would be NaN."""
    return q * tl.where(q != 0, x, 0.0)


@triton.jit
def _divergence(q, x, total):
    """The terms of KL: ``q log(q / softmax)``, or 0 where ``q = 0``."""
    return tl.where(q != 0, q * (tl.log(q * total) - x), 0.0)


@triton.jit
def kept_row(logits, grad, q_row, columns_count, has_label, supervised, stored, HEAD: tl.constexpr):
    """A source head's row of HEAD.kept blocks, all full but the last. Its logits stay in registers, ``q`` passes by.

    ``supervised`` is ``Q``, the share of the row's classes with source supervision, if the row has any. A glance at the
    first columns mostly answers that; else all columns do.
    """
    BLOCK: tl.constexpr = HEAD.block
    BLOCKS: tl.constexpr = HEAD.kept
    ACCESS: tl.constexpr = HEAD.access
    POLICY: tl.constexpr = "" if HEAD.form == PROBABILITIES else "evict_last"  # R stays in L2, P R is read once
    DTYPE: tl.constexpr = HEAD.dtype
    GRADIENT: tl.constexpr = HEAD.has_gradient
    IS_ROUNDED: tl.constexpr = q_row.dtype.element_ty.primitive_bitwidth == 16
    first = tl.arange(0, BLOCK)
    zero = tl.zeros([BLOCK], DTYPE)
    count = tl.where(has_label, columns_count, 0)
    row_mass = supervised
    row_size = tl.full([], 0.0, DTYPE)
    if IS_ROUNDED == 0:
        few = tl.arange(0, _GLANCE)
        glance = tl.load(q_row + few, mask=few < count, other=0.0, eviction_policy=POLICY).to(DTYPE)
        row_size = tl.sum(tl.abs(glance), 0)
    if row_size == 0:
        size, mass = zero, zero
        for start in range(0, count, BLOCK):
            q = _load(q_row, start, count, 0.0, POLICY, False, HEAD)
            size += tl.abs(q)
            mass += q
        row_size = tl.sum(size, 0)
        row_mass = tl.sum(mass, 0)
    loss = tl.full([], 0.0, DTYPE)
    if row_size != 0:
        z = ()
        top = zero
        for k in tl.static_range(BLOCKS):
            z_k = _load(logits, k * BLOCK, columns_count, -float("inf"), "evict_first", k + 1 < BLOCKS, HEAD)
            top = tl.maximum(top, z_k) if k > 0 else z_k
            z = z + (z_k,)  # type: ignore[assignment]  # noqa: RUF005
        shift = tl.max(top, 0) * _LOG2_E
        total = zero
        for k in tl.static_range(BLOCKS):
            e = tl.exp2(z[k] * _LOG2_E - shift)
            total = total + e if k > 0 else e
        row_total = tl.sum(total, 0)
        row_dot = row_total
        times, writes = 0, True
        while writes:
            scale = stored * row_mass / row_total
            mass, dot = zero, zero
            for k in tl.static_range(BLOCKS):
                columns = k * BLOCK + first
                mask = (columns < columns_count) | (k + 1 < BLOCKS)
                q = _load(q_row, k * BLOCK, columns_count, 0.0, POLICY, k + 1 < BLOCKS, HEAD)
                x = z[k] * _LOG2_E - shift
                e = tl.exp2(x)
                if k + 1 == BLOCKS:
                    x = tl.where(mask, x, 0.0)
                mass = mass + q if k > 0 else q
                dot = dot + q * x if k > 0 else q * x
                if GRADIENT:
                    g = e * scale - stored * q
                    tl.store(grad + columns, g.to(grad.dtype.element_ty), mask=mask, eviction_policy="evict_first")
            found = tl.sum(mass, 0)
            row_dot = tl.sum(dot, 0)
            writes = GRADIENT and _is_other(found, row_mass)
            row_mass = found
            # The loop runs at most twice, but the compiler does not know that. It would compute before the loop, and
            # keep in registers, all exponentials, and all addresses where every element has its own.
            times += 1
            nothing = times // 256
            shift += nothing
            if ACCESS == 1:
                q_row += nothing
                grad += nothing
        if (tl.abs(row_dot) < float("inf")) == 0:
            dot = zero
            for k in tl.static_range(BLOCKS):
                q = _load(q_row, k * BLOCK, columns_count, 0.0, POLICY, k + 1 < BLOCKS, HEAD)
                dot += _product(q, z[k] * _LOG2_E - shift)
            row_dot = tl.sum(dot, 0)
        loss = (row_mass * tl.log2(row_total) - row_dot) * _LN_2
    elif GRADIENT:
        _write_zeros(grad, columns_count, first, BLOCK)
    return loss, row_size


@triton.jit
def _is_other(found, expected):
    """Whether two sums differ by more than rounding; never where both are the same number, or NaN."""
    error = tl.abs(found - expected)
    is_near = (found == expected) | (error <= 2.0**-22 * tl.minimum(tl.abs(found), tl.abs(expected)))
    return (is_near == 0) & ((found == found) | (expected == expected))


@triton.jit
def _write_zeros(grad, columns_count, first, BLOCK: tl.constexpr):
    zeros = tl.zeros(first.shape, grad.dtype.element_ty)
    for start in range(0, columns_count, BLOCK):
        tl.store(grad + (start + first), zeros, mask=start + first < columns_count)


@triton.jit
def _block(logits, columns_count, table, target, row, columns, HEAD: tl.constexpr, FULL: tl.constexpr):
    """``(mask, z, both parts of q)`` of some columns of a long row. The mask of a FULL block costs nothing."""
    mask = (columns < columns_count) | FULL
    z = tl.load(logits + columns, mask=mask, other=-float("inf"), eviction_policy="evict_first").to(HEAD.dtype)
    q, q_b = _distribution(table, target, row, columns, mask, HEAD)
    return mask, z, q, q_b


@triton.jit
def _add_block(sums, logits, columns_count, table, target, row, columns, HEAD: tl.constexpr, FULL: tl.constexpr):
    """The sums of a long row with those of some more columns."""
    top, total, dot, mass, size, size_b, whole_size = sums
    _, z, q, q_b = _block(logits, columns_count, table, target, row, columns, HEAD, FULL)
    new_top = tl.maximum(top, _lanes(z, "max"))
    fall = top - new_top
    x = z - new_top[None, :, None]
    total = total * exp(fall) + _lanes(exp(x), "sum")
    size += _lanes(tl.abs(q), "sum")
    if HEAD.is_source and HEAD.form == PAIR:
        size_b += _lanes(tl.abs(q_b), "sum")
        q += q_b
        whole_size += _lanes(tl.abs(q), "sum")
    if not HEAD.kl:
        # The fall from the least number may be infinite, like a logit of -inf where q = 0: neither contributes.
        dot += tl.where(mass != 0, mass * fall, 0.0) + _lanes(_product(q, x), "sum")
    mass += _lanes(q, "sum")
    return new_top, total, dot, mass, size, size_b, whole_size


@triton.jit
def _write_block(
    divergence, grad, top, total, scale, stored, logits, columns_count, table, target, row, columns, HEAD: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    """Write the gradient of some columns of a long row, and return KL by lane with that of these columns."""
    mask, z, q, q_b = _block(logits, columns_count, table, target, row, columns, HEAD, FULL)
    if HEAD.is_source and HEAD.form == PAIR:
        q += q_b
    x = z - top
    if HEAD.kl:
        divergence += _lanes(_divergence(q, x, total), "sum")
    if HEAD.has_gradient:
        g = stored * (exp(x) * scale - q)
        tl.store(grad + columns, g.to(grad.dtype.element_ty), mask=mask, eviction_policy="evict_first")
    return divergence


@triton.jit
def long_row(logits, grad, columns_count, table, target, row, stored, HEAD: tl.constexpr):
    """A row longer than the registers, a block of columns at a time: a sweep for the sums, one for the gradient and KL.

    Each lane has its own maximum, ``top``, and sums relative to it, so that threads meet once, at the end. Where
    ``top`` rises by ``d``, the sum of exponentials shrinks by ``exp(-d)`` and ``sum q x`` by ``d sum q``: earlier
    columns really lie that much deeper, so nothing cancels.
    """
    BLOCK: tl.constexpr = HEAD.block
    DTYPE: tl.constexpr = HEAD.dtype
    PARTS: tl.constexpr = HEAD.is_source and HEAD.form == PAIR
    LANES: tl.constexpr = BLOCK // _COLUMNS_A_LANE
    first = _columns_of_block(BLOCK, _COLUMNS_A_LANE, HEAD.access)
    # The least number instead of -inf: differences to it are numbers.
    top = tl.full([LANES], _LEAST_FLOAT64 if tl.float64 == DTYPE else _LEAST_FLOAT32, DTYPE)
    zero = tl.zeros([LANES], DTYPE)
    SUM_DTYPE: tl.constexpr = tl.float64 if HEAD.kl else DTYPE
    sums = top, tl.zeros([LANES], SUM_DTYPE), zero, zero, zero, zero, zero
    count = tl.where(has_share(target), columns_count, 0)
    full = count // BLOCK * BLOCK
    for start in range(0, full, BLOCK):
        sums = _add_block(sums, logits, count, table, target, row, start + first, HEAD, True)
    if full < count:
        sums = _add_block(sums, logits, count, table, target, row, full + first, HEAD, False)
    top, total, dot, mass, size, size_b, whole_size = sums
    row_top = tl.max(top, 0)
    fall = top - row_top
    row_total = tl.sum(total * exp(fall), 0).to(DTYPE)
    row_dot = tl.sum(dot + tl.where(mass != 0, mass * fall, 0.0), 0)
    row_mass = tl.sum(mass, 0)
    row_size = tl.sum(size, 0)
    row_size_b = row_size
    takes_part = row_size != 0
    if PARTS:
        row_size_b = tl.sum(size_b, 0)
        takes_part = tl.sum(whole_size, 0) != 0
    divergence = tl.zeros([LANES], SUM_DTYPE)
    if HEAD.has_gradient or HEAD.kl:
        full = columns_count // BLOCK * BLOCK
        if takes_part:
            scale = row_mass / row_total
            for start in range(0, full, BLOCK):
                divergence = _write_block(
                    divergence, grad, row_top, row_total, scale, stored, logits, columns_count, table, target, row,
                    start + first, HEAD, True,
                )  # fmt: skip
            if full < columns_count:
                divergence = _write_block(
                    divergence, grad, row_top, row_total, scale, stored, logits, columns_count, table, target, row,
                    full + first, HEAD, False,
                )  # fmt: skip
        elif HEAD.has_gradient:
            _write_zeros(grad, columns_count, first, BLOCK)
    loss = tl.sum(divergence, 0).to(DTYPE) if HEAD.kl else row_mass * tl.log(row_total) - row_dot
    return tl.where(takes_part, loss, 0.0), row_size, row_size_b


@triton.jit
def _add_logits(top, total, logits, columns, columns_count, HEAD: tl.constexpr, FULL: tl.constexpr):
    """The maximum and the sum of exponentials of each lane with those of some more columns."""
    mask = (columns < columns_count) | FULL
    z = tl.load(logits + columns, mask=mask, other=-float("inf")).to(HEAD.dtype)
    new_top = tl.maximum(top, _lanes(z, "max"))
    return new_top, total * exp(top - new_top) + _lanes(exp(z - new_top[None, :, None]), "sum")


@triton.jit
def _entries(table, start, end, columns_count, ENTRIES: tl.constexpr, DTYPE: tl.constexpr):
    """``(mask, column, q)`` of some entries of a row of a sparse R. A missing entry lies behind the last column."""
    values, _, columns_of_entries, _, _ = table
    entry = start + tl.arange(0, ENTRIES)
    mask = entry < end
    column = tl.load(columns_of_entries + entry, mask=mask, other=columns_count).to(tl.int32)
    return mask, column, tl.load(values + entry, mask=mask, other=0.0).to(DTYPE)


@triton.jit
def sparse_row(logits, grad, columns_count, table, target, stored, HEAD: tl.constexpr):
    """A source head's row whose ``q`` are the entries of one row of a sparse R.

    A sweep over the logits for ``S``, the entries for ``Q`` and ``sum q x``, and a sweep for the gradient as if every
    ``q`` were 0, after which the gradient at the entries is stored again. A thread reads the logit of its entry before
    the sweep, which may overwrite it; a barrier lies before the sweep and one behind it. If a row has more entries than
    fit, the sweep stops where they end, and goes on with the next ones.
    """
    BLOCK: tl.constexpr = HEAD.block
    DTYPE: tl.constexpr = HEAD.dtype
    VEC: tl.constexpr = HEAD.vec
    LANES: tl.constexpr = BLOCK // _COLUMNS_A_LANE
    # One entry a thread. More than VEC of them, so that every round does at least one.
    ENTRIES: tl.constexpr = LANES if LANES > 16 else 16
    offsets = table[1]
    label = target[0]
    share = target[1]
    begin = tl.load(offsets + label, mask=share != 0, other=0).to(tl.int64)
    end = tl.load(offsets + label + 1, mask=share != 0, other=0).to(tl.int64)
    first = _columns_of_block(BLOCK, _COLUMNS_A_LANE, HEAD.access)
    no_entry = tl.zeros([ENTRIES], DTYPE)
    size, mass = no_entry, no_entry
    for k in range(begin, end, ENTRIES):
        mask, column, q = _entries(table, k, end, columns_count, ENTRIES, DTYPE)
        size += tl.abs(q)
        mass += q
    row_size = tl.sum(size, 0)
    loss = tl.full([], 0.0, DTYPE)
    if row_size != 0:
        top = tl.full([LANES], _LEAST_FLOAT64 if tl.float64 == DTYPE else _LEAST_FLOAT32, DTYPE)
        total = tl.zeros([LANES], tl.float64 if HEAD.kl else DTYPE)
        full = columns_count // BLOCK * BLOCK
        for start in range(0, full, BLOCK):
            top, total = _add_logits(top, total, logits, start + first, columns_count, HEAD, True)
        if full < columns_count:
            top, total = _add_logits(top, total, logits, full + first, columns_count, HEAD, False)
        row_top = tl.max(top, 0)
        row_total = tl.sum(total * exp(top - row_top), 0).to(DTYPE)
        row_mass = tl.sum(mass, 0)
        terms = no_entry  # of sum q x, or of KL
        for k in range(begin, end, ENTRIES):
            mask, column, q = _entries(table, k, end, columns_count, ENTRIES, DTYPE)
            z = tl.load(logits + column, mask=mask, other=0.0).to(DTYPE)
            if HEAD.kl:
                terms += _divergence(q, z - row_top, row_total)
            else:
                terms += _product(q, z - row_top)
        loss = tl.sum(terms, 0)
        if not HEAD.kl:
            loss = row_mass * tl.log(row_total) - loss
        if HEAD.has_gradient:
            scale = row_mass / row_total
            done = tl.full([], 0, tl.int32)  # columns, in units of VEC, as the compiler wants them
            while done < columns_count // VEC:
                mask, column, q = _entries(table, begin, end, columns_count, ENTRIES, DTYPE)
                stop = tl.where(begin + ENTRIES < end, tl.max(column, 0), columns_count) // VEC
                mask = mask & (column < stop * VEC)
                z = tl.load(logits + column, mask=mask, other=0.0).to(DTYPE)
                at_entries = stored * (exp(z - row_top) * scale - q)
                tl.debug_barrier()
                for start in range(done * VEC, stop * VEC, BLOCK):
                    columns = start + first
                    inside = columns < stop * VEC
                    x = tl.load(logits + columns, mask=inside, other=0.0).to(DTYPE) - row_top
                    g = stored * (exp(x) * scale)
                    tl.store(grad + columns, g.to(grad.dtype.element_ty), mask=inside)
                tl.debug_barrier()
                tl.store(grad + column, at_entries.to(grad.dtype.element_ty), mask=mask)
                begin += tl.sum(mask.to(tl.int64), 0)
                done = stop
    elif HEAD.has_gradient:
        _write_zeros(grad, columns_count, first, BLOCK)
    return loss, row_size
