"""The definition of correct: Co-Tuning in plain PyTorch, one formula a line, differentiable by autograd alone.

Every backend is tested against this file, so it is written to be read, not to be fast: it builds the dense ``(B, N_t)``
target distribution and the dense ``(B, N_s)`` source distribution that the kernels avoid. It imports nothing else of
the package. Arithmetic is float64 if any logits are float64, else float32 (never less); a kernel may compute each head
in the precision of that head's logits.

Notation, after You, Kou, Long and Wang, "Co-Tuning for Transfer Learning", NeurIPS 2020:

    P[i, t]   target distribution of row i over the N_t target classes (a one-hot row for a class index)
    R[t, s]   category relationship p(y_source = s | y_target = t)
    q = P R   row i's distribution over the N_s source classes (the paper's "translated" label)
    loss      CE(target_logits, P) + trade_off * CE(source_logits, q)

A sparse relationship (``torch.sparse_csr``) is the dense one with zeros for the missing entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["co_tuning_loss", "softmax_class_sums", "source_label_loss", "temperature_terms", "translate_labels"]


def co_tuning_loss(
    source_logits: Tensor,
    target_logits: Tensor | None,
    target: Tensor | tuple[Tensor, Tensor, Tensor | float],
    relationship: Tensor,
    *,
    trade_off: float | Tensor = 2.3,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    source_loss: str = "cross_entropy",
) -> tuple[Tensor, Tensor, Tensor]:
    """``(loss, target_term, source_term)``, from the arguments of ``cotuning_kernels.functional.co_tuning_loss``.

    A ``trade_off`` of 0 takes the source supervision from every row, so the source logits do not matter: a source term
    that is infinite or NaN times 0 would be NaN. Without ``target_logits`` the loss is the source term alone, without
    the trade-off.
    """
    if target_logits is None:
        source_term = source_label_loss(
            source_logits, target, relationship, ignore_index=ignore_index, reduction=reduction, source_loss=source_loss
        )
        return source_term, torch.zeros_like(source_term), source_term
    relationship = relationship.to_dense()
    dtype = _compute_dtype(source_logits, target_logits)
    target_term = _target_term(target_logits.to(dtype), target, weight, label_smoothing, ignore_index, reduction)
    if isinstance(trade_off, Tensor):
        relationship = relationship.masked_fill(trade_off == 0, 0)
        trade_off = trade_off.to(dtype, copy=True)  # it may change before the backward pass
    else:
        relationship = torch.zeros_like(relationship) if trade_off == 0 else relationship
        trade_off = float(trade_off)
    source_term = _source_term(source_logits.to(dtype), target, relationship, ignore_index, reduction, source_loss)
    return target_term + trade_off * source_term, target_term, source_term


def source_label_loss(
    source_logits: Tensor,
    target: Tensor | tuple[Tensor, Tensor, Tensor | float],
    relationship: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    source_loss: str = "cross_entropy",
) -> Tensor:
    """The source term alone: ``CE(source_logits, q)`` or ``KL(q || softmax(source_logits))``."""
    dtype = _compute_dtype(source_logits)
    relationship = relationship.to_dense()
    return _source_term(source_logits.to(dtype), target, relationship, ignore_index, reduction, source_loss)


def translate_labels(
    target: Tensor | tuple[Tensor, Tensor, Tensor | float], relationship: Tensor, *, ignore_index: int = -100
) -> Tensor:
    """``q = P R``, shape ``(B, N_s)``, in the relationship's dtype; rows whose label is ignored are zero."""
    relationship = relationship.to_dense()
    dtype = torch.promote_types(relationship.dtype, torch.float32)
    distribution = _target_distribution(target, relationship.shape[0], ignore_index, dtype)
    return _product(distribution, relationship.to(dtype)).to(relationship.dtype)


def softmax_class_sums(
    logits: Tensor, labels: Tensor, num_classes: int, *, inverse_temperature: float = 1.0, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """``sums[t] =`` sum over rows of class t of ``softmax(logits * inverse_temperature)`` (float64), and the counts.

    ``sums[t] / counts[t]`` is the direct relationship of the paper, eq. (4): the mean prediction of a class.
    """
    labels = _checked_labels("labels", labels, num_classes, ignore_index)
    valid = labels != ignore_index
    probabilities = torch.softmax(logits[valid].double() * inverse_temperature, dim=1)
    index = labels[valid]
    sums = torch.zeros(num_classes, logits.shape[1], dtype=torch.float64, device=logits.device)
    return sums.index_add_(0, index, probabilities), torch.bincount(index, minlength=num_classes)


def temperature_terms(
    logits: Tensor, labels: Tensor, *, inverse_temperature: float = 1.0, ignore_index: int = -100
) -> Tensor:
    """``[NLL, dNLL/db, d2NLL/db2, rows]`` (float64, summed over rows) at ``b = inverse_temperature``.

    With ``p = softmax(b z)``: ``NLL = logsumexp(b z) - b z_y``, its derivative is ``E_p[z] - z_y`` and the second one
    ``Var_p[z]``, which is never negative: the NLL is convex in ``b``, and Newton's method finds its one minimum.
    """
    labels = _checked_labels("labels", labels, logits.shape[1], ignore_index)
    valid = labels != ignore_index
    z = logits[valid].double()
    z_label = z.gather(1, labels[valid][:, None])[:, 0]
    log_p = torch.log_softmax(z * inverse_temperature, dim=1)
    p = log_p.exp()
    # A logit of -inf has p = 0 and contributes nothing; the product alone would be NaN.
    z_or_zero = torch.where(p > 0, z, torch.zeros_like(z))
    mean = (p * z_or_zero).sum(1)
    variance = (p * (z_or_zero - mean[:, None]) ** 2).sum(1)
    nll = -log_p.gather(1, labels[valid][:, None])[:, 0]
    rows = valid.sum().double()
    return torch.stack([nll.sum(), (mean - z_label).sum(), variance.sum(), rows])


def _compute_dtype(*logits: Tensor) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in logits) else torch.float32


def _checked_labels(name: str, labels: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """The labels as int64: in 32 bits, ``ignore_index + 2**32`` would equal ``ignore_index``.

    Raises IndexError naming the first bad row. On an accelerator the indexing below asserts, without a host read.
    """
    labels = labels.long()
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        return labels
    bad = (labels != ignore_index) & ((labels < 0) | (labels >= num_classes))
    if bad.any():
        row = int(bad.nonzero()[0])
        raise IndexError(
            f"{name}[{row}] is {int(labels[row])}, expected a class index in [0, {num_classes}) or "
            f"ignore_index={ignore_index}"
        )
    return labels


def _one_hot(name: str, labels: Tensor, num_classes: int, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """One row per label; a row of zeros for an ignored label."""
    labels = _checked_labels(name, labels, num_classes, ignore_index)
    valid = labels != ignore_index
    index = torch.where(valid, labels, torch.zeros_like(labels))
    one_hot = torch.zeros(labels.shape[0], num_classes, dtype=dtype, device=labels.device)
    return one_hot.scatter(1, index[:, None], valid[:, None].to(dtype))


def _target_distribution(
    target: Tensor | tuple[Tensor, Tensor, Tensor | float], num_classes: int, ignore_index: int, dtype: torch.dtype
) -> Tensor:
    """``P``, shape ``(B, N_t)``, from class indices, from a mixup pair ``(a, b, share of a)``, or as given."""
    if isinstance(target, tuple):
        a, b, share = target
        share = torch.as_tensor(share, dtype=dtype, device=a.device).reshape(-1, 1)
        one_hot_a = _one_hot("target[0]", a, num_classes, ignore_index, dtype)
        return share * one_hot_a + (1 - share) * _one_hot("target[1]", b, num_classes, ignore_index, dtype)
    if target.is_floating_point():
        return target.to(dtype)
    return _one_hot("target", target, num_classes, ignore_index, dtype)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in their own dtype: autocast would round a distribution to half precision."""
    if a.device.type == "meta":  # it has no autocast
        return a @ b
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


def _soft_cross_entropy(logits: Tensor, distribution: Tensor) -> Tensor:
    """``-sum_j distribution[i, j] * log_softmax(logits)[i, j]`` for each row ``i``; exactly 0, with gradient 0, if the
    row of ``distribution`` is all zeros, for any logits."""
    # 0 * -inf is NaN, but a class with no target mass contributes nothing.
    log_p = _log_softmax_where_supervised(logits, distribution)
    return -torch.where(distribution != 0, distribution * log_p, torch.zeros_like(log_p)).sum(1)


def _divergence(logits: Tensor, distribution: Tensor) -> Tensor:
    """``sum_j q_j (log q_j - log_softmax(logits)_j)`` for each row ``q`` of ``distribution``; 0 as above.

    The difference is taken before the sum: after it, near its minimum 0, two sums of the size of the entropy would
    cancel.
    """
    log_p = _log_softmax_where_supervised(logits, distribution)
    terms = torch.xlogy(distribution, distribution) - distribution * log_p
    return torch.where(distribution != 0, terms, torch.zeros_like(log_p)).sum(1)


def _log_softmax_where_supervised(logits: Tensor, distribution: Tensor) -> Tensor:
    takes_part = (distribution != 0).any(1, keepdim=True)
    return torch.log_softmax(torch.where(takes_part, logits, torch.zeros_like(logits)), dim=1)


def _target_term(
    logits: Tensor,
    target: Tensor | tuple[Tensor, Tensor, Tensor | float],
    weight: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    """``F.cross_entropy`` with all its options, extended to mixup pairs."""
    num_classes = logits.shape[1]
    probabilities = isinstance(target, Tensor) and target.is_floating_point()
    distribution = _target_distribution(target, num_classes, ignore_index, logits.dtype)
    class_weight = logits.new_ones(num_classes) if weight is None else weight.to(logits.dtype)
    # Smoothing gives every class label_smoothing / N_t, but not for an ignored part of a row.
    smoothed = 1.0 if probabilities else distribution.sum(1, keepdim=True)
    smooth = (1 - label_smoothing) * distribution + label_smoothing / num_classes * smoothed
    rows = _soft_cross_entropy(logits, class_weight * smooth)
    if reduction == "none":
        return rows
    if reduction == "sum":
        return rows.sum()
    # F.cross_entropy divides by the weight of the labels, but by the batch size if targets are probabilities.
    return rows.sum() / (len(rows) if probabilities else (distribution * class_weight).sum())


def _source_term(
    logits: Tensor,
    target: Tensor | tuple[Tensor, Tensor, Tensor | float],
    relationship: Tensor,
    ignore_index: int,
    reduction: str,
    source_loss: str,
) -> Tensor:
    """Cross entropy or KL against the translated labels, averaged over the rows that have source supervision."""
    relationship = relationship.to(logits.dtype)
    distribution = _target_distribution(target, relationship.shape[0], ignore_index, logits.dtype)
    translated = _product(distribution, relationship)
    rows = _divergence(logits, translated) if source_loss == "kl" else _soft_cross_entropy(logits, translated)
    if reduction == "none":
        return rows
    if reduction == "sum":
        return rows.sum()
    # A class whose row of R is zero has no source supervision. A row counts by the share of its target that has
    # it: 1 or 0 for a class index, in between for a mixture, so that a mixup pair averages like its two halves.
    supervised = (relationship != 0).any(1).to(logits.dtype)
    count = _product(distribution, supervised).sum()
    any_valid = (distribution != 0).any()
    # A batch without supervised rows is ordinary (a sentence of "O" tags): the term is 0. A batch without valid rows
    # gives NaN, as in F.cross_entropy.
    return torch.where((count == 0) & any_valid, rows.sum(), rows.sum() / count)
