"""Scores before training: how much the pretrained classifier says about the target classes.

:func:`transferability` runs the classifier over the target training set once and computes the scores below. Each score
also has its own function. For ``n`` rows, ``theta`` are the source classifier's predictions, ``(n, N_s)``, whose rows
sum to 1; ``y`` are the target labels, and

    J[t, s] = 1/n sum over rows of class t of theta[s]        P(t | s) = J[t, s] / sum_t J[t, s]
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cotuning_kernels.heads import find_head
from cotuning_kernels.labelled_logits import positive_integer, positive_number
from cotuning_kernels.relationship import passes
from cotuning_kernels.relationship.learn import device_of, target_classes_of
from cotuning_kernels.validation import check_ignore_index

__all__ = ["Transferability", "h_score", "label_mapping_accuracy", "leep", "log_me", "nce", "transferability"]

# From this share of the uniform distribution's entropy on, a row says nothing. Even a good source head gives rows that
# spread over tens of classes: an ImageNet head's rows on Fashion-MNIST have a share of 0.4 to 0.6.
_SAYS_NOTHING = 0.95


class Transferability(NamedTuple):
    """The scores of :func:`transferability`; larger is better except for ``relationship_entropy``."""

    leep: float
    """Log expected empirical prediction, in nats, at most 0 (Nguyen et al., ICML 2020)."""
    nce: float
    """Negative conditional entropy of the labels given the predicted source class, in nats, at most 0 (Tran et al.,
    ICCV 2019)."""
    log_me: float | None
    """Logarithm of the maximum evidence of a linear model on the features, per row (You et al., ICML 2021). ``None``
    if the features are not known."""
    h_score: float | None
    """Trace of the inverse covariance of the features times that of their class means (Bao et al., ICIP 2019)."""
    label_mapping_accuracy: float
    """Share of the rows whose class the mapping ``theta @ P(t | s)``, learnt from all other rows, predicts."""
    relationship_entropy: float
    """Mean entropy of the relationship's rows, in nats; compare it with ``uniform_entropy``."""
    uniform_entropy: float
    """``log(N_s)``: the entropy of a row that says nothing."""
    top_mass: float
    """Mean sum of the ``top`` largest entries of a row of the relationship."""
    majority_share: float
    """Share of the largest class: the accuracy of always predicting it."""
    rows: int
    """The number of rows with a label."""


def transferability(
    source_model: Callable[..., Any],
    loader: Iterable[Any],
    num_target_classes: int | None = None,
    *,
    head: str | None = None,
    temperature: float = 1.0,
    top: int = 10,
    target_classes: Sequence[str] | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
    max_batches: int | None = None,
    ignore_index: int = -100,
) -> Transferability:
    """Score a pretrained classifier on the target training set, in one pass and without training.

    It warns if the source head says nothing about the target classes, for instance because it is freshly initialised:
    Co-Tuning would teach it noise. Predictions and features of all rows stay in memory, ``4 n (N_s + D)`` bytes.

    Args:
        source_model: the pretrained classifier, as for :func:`cotuning_kernels.learn_relationship`.
        loader: as for :func:`cotuning_kernels.learn_relationship`; without augmentation.
        num_target_classes: ``N_t``; by default as for :func:`cotuning_kernels.learn_relationship`.
        head: dotted name of the classifier's head, whose inputs are the features. By default it is found as in
            :meth:`cotuning_kernels.CoTuningModel.from_classifier`; if it is not found, there are no features.
        temperature: the source logits are divided by it.
        top: the number of entries of a row that ``top_mass`` adds up.
        target_classes: names; their number is the default of ``N_t``.
        device, progress, max_batches, ignore_index: as for :func:`cotuning_kernels.learn_relationship`.

    Returns:
        :class:`Transferability`.

    Raises:
        TypeError, ValueError, IndexError: as :func:`cotuning_kernels.learn_relationship`; ``head`` names no head; no
            row has a label.
    """
    number, _ = target_classes_of(loader, num_target_classes, target_classes)
    temperature = positive_number("temperature", temperature)
    top = positive_integer("top", top)
    if max_batches is not None:
        max_batches = positive_integer("max_batches", max_batches)
    check_ignore_index(ignore_index)
    place = device_of(source_model) if device is None else torch.device(device)
    layer = _head_of(source_model, head)
    collector = _FeatureCollector(number, ignore_index)
    handle = None if layer is None else layer.register_forward_pre_hook(collector.see)
    try:
        passes.run(source_model, loader, collector, "loader", None, place, progress, max_batches, None)
    finally:
        if handle is not None:
            handle.remove()
    if collector.is_empty:
        raise ValueError("the loader gave no row with a label, so there is nothing to score")
    logits, labels = collector.rows()
    theta = torch.softmax(logits.float() / temperature, 1)
    features = collector.features()
    sums = _class_sums(theta, labels, number)
    relationship = sums[sums.sum(1) > 0]
    relationship = relationship / relationship.sum(1, keepdim=True)
    scores = Transferability(
        leep=leep(theta, labels, number),
        nce=nce(theta.argmax(1), labels, number, theta.shape[1]),
        log_me=None if features is None else log_me(features, labels, number),
        h_score=None if features is None else h_score(features, labels),
        label_mapping_accuracy=label_mapping_accuracy(theta, labels, number),
        relationship_entropy=float(torch.special.entr(relationship).sum(1).mean()),
        uniform_entropy=math.log(theta.shape[1]),
        top_mass=float(relationship.topk(min(top, theta.shape[1]), dim=1).values.sum(1).mean()),
        majority_share=float(torch.bincount(labels, minlength=number).max() / len(labels)),
        rows=len(labels),
    )
    _warn_if_nothing_is_said(scores)
    return scores


def leep(theta: Tensor, labels: Tensor, num_target_classes: int) -> float:
    r"""Mean over the rows of :math:`\log \sum_s P(y \mid s) \, \theta_s`.

    Args:
        theta: ``(n, N_s)``, the source classifier's predictions.
        labels: ``(n,)``, target classes.
        num_target_classes: ``N_t``.
    """
    sums = _class_sums(theta, labels, num_target_classes)
    given_source = sums / sums.sum(0).clamp(min=torch.finfo(sums.dtype).tiny)
    return float((theta.double() * given_source[labels]).sum(1).log().mean())


def nce(source_labels: Tensor, labels: Tensor, num_target_classes: int, num_source_classes: int) -> float:
    r"""Mean over the rows of :math:`\log P(y \mid z)`, where ``z`` is the predicted source class.

    Args:
        source_labels: ``(n,)``, predicted source classes.
        labels: ``(n,)``, target classes.
        num_target_classes, num_source_classes: ``N_t`` and ``N_s``.
    """
    counts = torch.zeros(num_target_classes, num_source_classes, dtype=torch.float64, device=labels.device)
    counts.index_put_((labels, source_labels), counts.new_ones(()), accumulate=True)
    given_source = counts / counts.sum(0).clamp(min=1)
    return float(given_source[labels, source_labels].log().mean())


def h_score(features: Tensor, labels: Tensor) -> float:
    r"""Trace of :math:`\mathrm{cov}(f)^{+} \, \mathrm{cov}(E[f \mid y])`; with fewer rows than features it is nearly
    the number of classes minus one for any features.

    Args:
        features: ``(n, D)``.
        labels: ``(n,)``, target classes.
    """
    centred = features.double() - features.double().mean(0)
    means = torch.zeros_like(centred)
    for label in labels.unique():
        of_class = labels == label
        means[of_class] = centred[of_class].mean(0)
    # In the basis of the principal axes the covariance is diagonal. Its pseudo-inverse omits axes without variance.
    _, sizes, axes = torch.linalg.svd(centred, full_matrices=False)
    kept = sizes > sizes.max() * max(centred.shape) * torch.finfo(torch.float64).eps
    return float(((means @ axes[kept].T) / sizes[kept]).square().sum())


def log_me(features: Tensor, labels: Tensor, num_target_classes: int) -> float:
    r"""Mean over the classes of the maximum of :math:`\frac{1}{n} \log p(y_t \mid F, \alpha, \beta)`.

    ``y_t`` is 1 for the rows of class ``t`` and 0 for others. It is modelled as ``F w`` plus noise of precision
    :math:`\beta`, with weights ``w`` of precision :math:`\alpha`.

    Args:
        features: ``(n, D)``.
        labels: ``(n,)``, target classes.
        num_target_classes: ``N_t``.
    """
    rows, width = features.shape
    directions, sizes, _ = torch.linalg.svd(features.double(), full_matrices=False)
    squares = sizes.square()
    evidence = []
    for label in range(num_target_classes):
        target = (labels == label).double()
        along = directions.T @ target
        evidence.append(_evidence(squares, along.square(), float(target @ target), rows, width))
    return sum(evidence) / len(evidence)


def _evidence(squares: Tensor, along: Tensor, total: float, rows: int, width: int) -> float:
    """Maximum of the log evidence per row, by MacKay's fixed point for ``alpha`` and ``beta``.

    ``squares`` are the squared singular values of the features, ``along`` the squared parts of the target along their
    left singular vectors, ``total`` its squared length.
    """
    alpha = beta = 1.0
    tiny = 1e-12
    for _ in range(200):
        ratio = alpha / beta
        effective = float((squares / (squares + ratio)).sum())
        weights = float((squares * along / (squares + ratio).square()).sum())
        residual = float((along * (ratio / (squares + ratio)).square()).sum() + max(0.0, total - float(along.sum())))
        alpha, beta = effective / (weights + tiny), (rows - effective) / (residual + tiny)
        if abs(alpha / beta - ratio) <= 1e-6 * ratio:
            break
    ratio = alpha / beta
    weights = float((squares * along / (squares + ratio).square()).sum())
    residual = float((along * (ratio / (squares + ratio)).square()).sum() + max(0.0, total - float(along.sum())))
    precision = float((alpha + beta * squares).log().sum()) + (width - len(squares)) * math.log(alpha)
    log_evidence = width * math.log(alpha) + rows * math.log(beta / (2 * math.pi)) - precision
    return (log_evidence - beta * residual - alpha * weights) / (2 * rows)


def label_mapping_accuracy(theta: Tensor, labels: Tensor, num_target_classes: int, *, smoothing: float = 1.0) -> float:
    r"""Accuracy of :math:`\arg\max_t \sum_s \theta_s P(t \mid s)`, where the sums for a row leave that row out.

    :math:`P(t \mid s)` has Laplace smoothing: ``(sum of class t + smoothing) / (sum of all + smoothing N_t)``.

    Args:
        theta: ``(n, N_s)``, the source classifier's predictions.
        labels: ``(n,)``, target classes.
        num_target_classes: ``N_t``.
        smoothing: added to each sum.
    """
    sums = _class_sums(theta, labels, num_target_classes)
    totals = sums.sum(0)
    right = 0
    for some, own in zip(theta.double().split(_ROWS), labels.split(_ROWS), strict=True):
        weighted = some / (totals - some + smoothing * num_target_classes)
        scores = weighted @ (sums + smoothing).T
        scores[torch.arange(len(own)), own] -= (weighted * some).sum(1)
        right += int((scores.argmax(1) == own).sum())
    return right / len(labels)


# Float64 copies are made of this many rows at a time.
_ROWS = 4096


def _class_sums(theta: Tensor, labels: Tensor, num_target_classes: int) -> Tensor:
    sums = torch.zeros(num_target_classes, theta.shape[1], dtype=torch.float64, device=theta.device)
    for some, own in zip(theta.split(_ROWS), labels.split(_ROWS), strict=True):
        sums.index_add_(0, own, some.double())
    return sums


class _FeatureCollector(passes.LogitCollector):
    """Also keeps the features of the labelled rows: the input of the head's last call."""

    def __init__(self, num_target_classes: int, ignore_index: int) -> None:
        super().__init__(num_target_classes, ignore_index)
        self._seen: Tensor | None = None
        self._features: list[Tensor] = []

    def see(self, head: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen = inputs[0] if inputs and isinstance(inputs[0], Tensor) else None
        if seen is not None and isinstance(head, nn.Conv2d):
            seen = seen.mean((2, 3))
        self._seen = None if seen is None else seen.detach().flatten(0, -2)

    def update(self, logits: Tensor, labels: Tensor) -> None:
        super().update(logits, labels)
        if self._seen is not None and len(self._seen) == len(labels):
            labelled = labels.to(self._seen.device) != self._ignore_index
            self._features.append(self._seen[labelled].float())

    @property
    def is_empty(self) -> bool:
        return not any(len(labels) for _, labels in self._batches)

    def features(self) -> Tensor | None:
        """``(n, D)`` of the rows that :meth:`rows` gives, or ``None`` if the head was not called once per batch."""
        _, labels = self.rows()
        features = torch.cat(self._features).to(labels.device) if self._features else None
        return features if features is not None and len(features) == len(labels) else None


def _head_of(source_model: Any, head: str | None) -> nn.Module | None:
    if not isinstance(source_model, nn.Module):
        return None
    try:
        return source_model.get_submodule(find_head(source_model, head, checked_later=True))
    except (TypeError, ValueError):
        if head is not None:
            raise
        return None


def _warn_if_nothing_is_said(scores: Transferability) -> None:
    if scores.relationship_entropy > _SAYS_NOTHING * scores.uniform_entropy:
        why = (
            f"its predictions are nearly uniform for every target class (entropy {scores.relationship_entropy:.2f} of "
            f"{scores.uniform_entropy:.2f} nats)"
        )
    elif scores.label_mapping_accuracy <= scores.majority_share + _spread(scores):
        why = (
            f"its predictions do not tell the target classes apart (a mapping of them is right in "
            f"{scores.label_mapping_accuracy:.1%} of the rows, the largest class has {scores.majority_share:.1%})"
        )
    else:
        return
    warnings.warn(
        f"transferability: the source head says nothing about these images: {why}. Is it the pretrained head, and are "
        "the images normalised as in its pretraining? Co-Tuning needs a source head that says something",
        stacklevel=3,
    )


def _spread(scores: Transferability) -> float:
    """Two standard deviations of the accuracy of guessing."""
    return 2 * math.sqrt(scores.majority_share * (1 - scores.majority_share) / scores.rows)
