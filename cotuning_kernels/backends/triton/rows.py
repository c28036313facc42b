"""The rows of one head: their losses and gradients, and whether there is a target at all.

A row has logits ``z`` and a target distribution ``q`` (a row of R for the source head, a label for the target head),
``Q = sum(q)``. With ``x = z - max(z)``, ``e = exp(x)`` and ``S = sum(e)``

    loss     = Q log S - sum_{q != 0} q x               gradient = Q / S * e - q
    KL adds    sum_{q != 0} q log q                     (the same gradient)

A row without any ``q != 0`` takes no part: its loss and gradient are 0, whatever its logits are. The gradient is
multiplied by ``stored`` as it is written (see ``co_tuning_loss.py``).

Traffic. Each logit is read once, each entry of its row of R once (mostly from L2, where R stays) and each gradient is
written once: ``2 * itemsize`` bytes a logit, and R. The length of the row decides between four ways:

* ``whole_rows``: the registers of a program hold logits and R, of one row or several.
* ``packed_row``: the registers hold both, two numbers in each, where logits and R have 16 bits.
* ``kept_row``: the registers hold the logits alone. R is read as the gradient is written, which needs ``Q`` before
  ``q`` has been seen. Rows of R are distributions, so ``Q`` is taken to be 1, or, with probabilities, the share of
  their classes that have supervision. Where the entries sum to something else, the gradient is written a second time.
* ``long_row``: the registers hold neither. Both are read twice, the second time from L2 if they are still there.

A row without a label is not read at all. A packed or kept row without supervision reads no logit, a long one reads
nothing twice.

Shapes. ``rows``, labels and shares are (ROWS, 1), or scalars where a program takes one long row. ``columns`` is
(1, BLOCK) and ``mask`` (ROWS, BLOCK), or both have the shape of a long row's block.

Tuples that the functions share:

* ``matrices``: ``(logits, stride, gradient, stride)``
* ``table``: where ``q`` comes from, ``(R or probabilities, stride, class weights, label smoothing, classes)``
* ``target``: ``(label, its share, second label, its share)``, from ``read_target``

``HEAD`` is a :class:`~cotuning_kernels.backends.triton.launch.Head`: all that is known when a kernel is compiled.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from cotuning_kernels.backends.triton.exponential import exp
from cotuning_kernels.backends.triton.labels import LABELS, PAIR, PROBABILITIES
from cotuning_kernels.backends.triton.launch import COLUMNS_A_LANE, KEPT_COLUMNS_A_LANE

__all__ = ["has_share", "kept_row", "long_row", "packed_row", "whole_rows"]

_COLUMNS_A_LANE = tl.constexpr(COLUMNS_A_LANE)
_KEPT_COLUMNS_A_LANE = tl.constexpr(KEPT_COLUMNS_A_LANE)
_GLANCE = tl.constexpr(128)
_LEAST_FLOAT32 = tl.constexpr(torch.finfo(torch.float32).min)
_LEAST_FLOAT64 = tl.constexpr(torch.finfo(torch.float64).min)


@triton.jit
def has_share(target, HEAD: tl.constexpr):
    """Whether any label of a row counts: a row whose labels are all ignored is not read."""
    _, share, _, share_b = target
    if HEAD.form == PROBABILITIES:
        return True
    if HEAD.form == PAIR:
        return (share != 0) | (share_b != 0)
    return share != 0


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
    read = mask & has_share(target, HEAD)
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
    loss = mass * tl.log(total) - tl.sum(_product(q, x), 1, keep_dims=True)
    if HEAD.kl:
        loss += tl.sum(tl.where(q != 0, q * tl.log(q), 0.0), 1, keep_dims=True)
    if HEAD.has_gradient:
        g = tl.where(takes_part, stored * (e * (mass / total) - q), 0.0)
        tl.store(
            grad + rows * grad_stride + columns, g.to(grad.dtype.element_ty), mask=mask, eviction_policy="evict_first"
        )  # fmt: skip
    return tl.where(takes_part, loss, 0.0), size, size_b


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
def _columns_of_kept(BLOCK: tl.constexpr, ACCESS: tl.constexpr):
    """In 64 bits: the compiler then adds constants to one address instead of computing each."""
    return _columns_of_block(BLOCK, max(_KEPT_COLUMNS_A_LANE, ACCESS), ACCESS).to(tl.int64)


@triton.jit
def _product(q, x):
    """``q x``; a logit of -inf where ``q = 0`` contributes nothing, where the product alone would be NaN."""
    return q * tl.where(q != 0, x, 0.0)


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
    first = _columns_of_kept(BLOCK, ACCESS)
    zero = tl.zeros([first.shape[1]], DTYPE)
    count = tl.where(has_label, columns_count, 0)
    row_mass = supervised
    few = tl.arange(0, _GLANCE)
    glance = tl.load(q_row + few, mask=few < count, other=0.0, eviction_policy=POLICY).to(DTYPE)
    row_size = tl.sum(tl.abs(glance), 0)
    if row_size == 0:
        size, mass = zero, zero
        for start in range(0, count, BLOCK):
            columns = start + first
            q = tl.load(q_row + columns, mask=columns < count, other=0.0, eviction_policy=POLICY).to(DTYPE)
            size += _lanes(tl.abs(q), "sum")
            mass += _lanes(q, "sum")
        row_size = tl.sum(size, 0)
        row_mass = tl.sum(mass, 0)
    loss = tl.full([], 0.0, DTYPE)
    if row_size != 0:
        z = ()
        top = zero - float("inf")
        for k in tl.static_range(BLOCKS):
            columns = k * BLOCK + first
            mask = (columns < columns_count) | (k + 1 < BLOCKS)
            z_k = tl.load(logits + columns, mask=mask, other=-float("inf"), eviction_policy="evict_first").to(DTYPE)
            top = tl.maximum(top, _lanes(z_k, "max"))
            z = z + (z_k,)  # type: ignore[assignment]  # noqa: RUF005  (Triton knows no star)
        row_top = tl.max(top, 0)
        total = zero
        for k in tl.static_range(BLOCKS):
            total += _lanes(exp(z[k] - row_top), "sum")
        row_total = tl.sum(total, 0)
        times, writes = 0, True
        while writes:
            scale = row_mass / row_total
            mass, dot = zero, zero
            for k in tl.static_range(BLOCKS):
                columns = k * BLOCK + first
                mask = (columns < columns_count) | (k + 1 < BLOCKS)
                q = tl.load(q_row + columns, mask=mask, other=0.0, eviction_policy=POLICY).to(DTYPE)
                x = z[k] - row_top
                mass += _lanes(q, "sum")
                dot += _lanes(_product(q, x), "sum")
                if GRADIENT:
                    g = stored * (exp(x) * scale - q)
                    tl.store(grad + columns, g.to(grad.dtype.element_ty), mask=mask, eviction_policy="evict_first")
            found = tl.sum(mass, 0)
            loss = found * tl.log(row_total) - tl.sum(dot, 0)
            writes = GRADIENT and _is_other(found, row_mass)
            row_mass = found
            # The loop runs at most twice, but the compiler does not know that. It would compute before the loop, and
            # keep in registers, all exponentials, and all addresses where every element has its own.
            times += 1
            nothing = times // 256
            row_top += nothing
            if ACCESS == 1:
                first += nothing
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
def packed_row(logits, grad, q_row, columns_count, has_label, stored, HEAD: tl.constexpr):
    """A kept row whose logits and ``q`` both have 16 bits: the registers hold all of them, two numbers in each."""
    BLOCK: tl.constexpr = HEAD.block
    BLOCKS: tl.constexpr = HEAD.kept
    ACCESS: tl.constexpr = HEAD.access
    POLICY: tl.constexpr = "" if HEAD.form == PROBABILITIES else "evict_last"  # R stays in L2, P R is read once
    DTYPE: tl.constexpr = HEAD.dtype
    GRADIENT: tl.constexpr = HEAD.has_gradient
    first = _columns_of_kept(BLOCK, ACCESS)
    zero = tl.zeros([first.shape[1]], DTYPE)
    count = tl.where(has_label, columns_count, 0)
    q, size, mass = (), zero, zero
    for k in tl.static_range(0, BLOCKS, 2):
        columns = k * BLOCK + first
        q_even = tl.load(q_row + columns, mask=columns < count, other=0.0, eviction_policy=POLICY)
        columns += BLOCK
        q_odd = tl.load(q_row + columns, mask=columns < count, other=0.0, eviction_policy=POLICY)
        size += _lanes(tl.abs(q_even.to(DTYPE)) + tl.abs(q_odd.to(DTYPE)), "sum")
        mass += _lanes(q_even.to(DTYPE) + q_odd.to(DTYPE), "sum")
        q = q + (_packed(q_even, q_odd),)  # type: ignore[assignment]  # noqa: RUF005
    row_size = tl.sum(size, 0)
    loss = tl.full([], 0.0, DTYPE)
    if row_size != 0:
        z = ()
        top = zero - float("inf")
        for k in tl.static_range(0, BLOCKS, 2):
            columns = k * BLOCK + first
            mask = (columns < columns_count) | (k + 1 < BLOCKS)
            z_even = tl.load(logits + columns, mask=mask, other=-float("inf"), eviction_policy="evict_first")
            columns += BLOCK
            mask = (columns < columns_count) | (k + 2 < BLOCKS)
            z_odd = tl.load(logits + columns, mask=mask, other=-float("inf"), eviction_policy="evict_first")
            top = tl.maximum(top, tl.maximum(_lanes(z_even.to(DTYPE), "max"), _lanes(z_odd.to(DTYPE), "max")))
            z = z + (_packed(z_even, z_odd),)  # type: ignore[assignment]  # noqa: RUF005
        row_top = tl.max(top, 0)
        # These sums are never below 0, so `nothing` is 0, but the compiler does not know that. It would unpack once and
        # keep that in registers, and the exponentials of the first sweep for the second.
        nothing = (row_size < 0).to(tl.int32)
        total = zero
        for k in tl.static_range(BLOCKS):
            x = _unpacked(z[k // 2] + nothing, k % 2, logits.dtype.element_ty).to(DTYPE) - row_top
            total += _lanes(exp(x), "sum")
        row_total = tl.sum(total, 0)
        nothing = (row_total < 0).to(tl.int32)
        row_mass = tl.sum(mass, 0)
        scale = row_mass / row_total
        dot = zero
        for k in tl.static_range(BLOCKS):
            columns = k * BLOCK + first
            mask = (columns < columns_count) | (k + 1 < BLOCKS)
            q_k = _unpacked(q[k // 2] + nothing, k % 2, q_row.dtype.element_ty).to(DTYPE)
            x = _unpacked(z[k // 2] + nothing, k % 2, logits.dtype.element_ty).to(DTYPE) - row_top
            dot += _lanes(_product(q_k, x), "sum")
            if GRADIENT:
                g = stored * (exp(x) * scale - q_k)
                tl.store(grad + columns, g.to(grad.dtype.element_ty), mask=mask, eviction_policy="evict_first")
        loss = row_mass * tl.log(row_total) - tl.sum(dot, 0)
    elif GRADIENT:
        _write_zeros(grad, columns_count, first, BLOCK)
    return loss, row_size


@triton.jit
def _packed(even, odd):
    return even.to(tl.uint16, bitcast=True).to(tl.int32) | (odd.to(tl.uint16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def _unpacked(pair, ODD: tl.constexpr, dtype: tl.constexpr):
    return (pair >> (16 * ODD)).to(tl.uint16).to(dtype, bitcast=True)


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
    top, total, dot, mass, size, size_b, whole_size, entropy = sums
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
    # The fall from the least number may be infinite, like a logit of -inf where q = 0: neither contributes.
    dot += tl.where(mass != 0, mass * fall, 0.0) + _lanes(_product(q, x), "sum")
    mass += _lanes(q, "sum")
    if HEAD.kl:
        entropy += _lanes(tl.where(q != 0, q * tl.log(q), 0.0), "sum")
    return new_top, total, dot, mass, size, size_b, whole_size, entropy


@triton.jit
def _write_block(
    grad, top, scale, stored, logits, columns_count, table, target, row, columns, HEAD: tl.constexpr, FULL: tl.constexpr
):  # fmt: skip
    """The gradient of some columns of a long row."""
    mask, z, q, q_b = _block(logits, columns_count, table, target, row, columns, HEAD, FULL)
    if HEAD.is_source and HEAD.form == PAIR:
        q += q_b
    g = stored * (exp(z - top) * scale - q)
    tl.store(grad + columns, g.to(grad.dtype.element_ty), mask=mask, eviction_policy="evict_first")


@triton.jit
def long_row(logits, grad, columns_count, table, target, row, stored, HEAD: tl.constexpr):
    """A row longer than the registers, a block of columns at a time: a sweep for the sums, one for the gradient.

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
    sums = top, zero, zero, zero, zero, zero, zero, zero
    count = tl.where(has_share(target, HEAD), columns_count, 0)
    full = count // BLOCK * BLOCK
    for start in range(0, full, BLOCK):
        sums = _add_block(sums, logits, count, table, target, row, start + first, HEAD, True)
    if full < count:
        sums = _add_block(sums, logits, count, table, target, row, full + first, HEAD, False)
    top, total, dot, mass, size, size_b, whole_size, entropy = sums
    row_top = tl.max(top, 0)
    fall = top - row_top
    row_total = tl.sum(total * exp(fall), 0)
    row_dot = tl.sum(dot + tl.where(mass != 0, mass * fall, 0.0), 0)
    row_mass = tl.sum(mass, 0)
    row_size = tl.sum(size, 0)
    row_size_b = row_size
    takes_part = row_size != 0
    if PARTS:
        row_size_b = tl.sum(size_b, 0)
        takes_part = tl.sum(whole_size, 0) != 0
    loss = row_mass * tl.log(row_total) - row_dot
    if HEAD.kl:
        loss += tl.sum(entropy, 0)
    if HEAD.has_gradient:
        full = columns_count // BLOCK * BLOCK
        if takes_part:
            scale = row_mass / row_total
            for start in range(0, full, BLOCK):
                _write_block(
                    grad, row_top, scale, stored, logits, columns_count, table, target, row, start + first, HEAD, True
                )  # fmt: skip
            if full < columns_count:
                _write_block(
                    grad, row_top, scale, stored, logits, columns_count, table, target, row, full + first, HEAD, False
                )  # fmt: skip
        else:
            _write_zeros(grad, columns_count, first, BLOCK)
    return tl.where(takes_part, loss, 0.0), row_size, row_size_b
