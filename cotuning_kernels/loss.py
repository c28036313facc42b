"""The Co-Tuning loss as a module, the usual way to call it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cotuning_kernels import backends, functional, validation
from cotuning_kernels.functional import CoTuningMetrics, CoTuningTerms
from cotuning_kernels.linear_head import MEMORY_BUDGET
from cotuning_kernels.linear_loss import check_linear_options, features_as_rows
from cotuning_kernels.options import LossOptions, check_options, check_trade_off
from cotuning_kernels.shapes import logits_as_rows, shape_of_labels, target_as_rows
from cotuning_kernels.sparse_rows import SparseRows
from cotuning_kernels.targets import RelationshipLike, Target, as_collated

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["FusedCoTuningLoss", "FusedLinearCoTuningLoss"]


_SPARSE_BUFFERS = ("relationship_crow_indices", "relationship_col_indices", "relationship_values")


def _option(name: str) -> Any:
    """A property for one field of the module's :class:`LossOptions`, checked when it is set."""

    def get(module: _CoTuningCriterion) -> Any:
        return getattr(module.options, name)

    def set_(module: _CoTuningCriterion, value: Any) -> None:
        module._set_options(**{name: value})

    return property(get, set_, doc=f"``{name}`` of :func:`cotuning_kernels.functional.co_tuning_loss`; may be set.")


class _CoTuningCriterion(nn.Module):
    """What the losses have in common: the relationship as buffers, the options, and the state.

    A sparse relationship is three buffers: DDP, ``copy.deepcopy`` and ``load_state_dict`` take no sparse tensor.
    """

    weight: Tensor | None
    label_smoothing = _option("label_smoothing")
    ignore_index = _option("ignore_index")
    reduction = _option("reduction")
    source_loss = _option("source_loss")

    def __init__(
        self,
        relationship: Tensor | RelationshipLike,
        trade_off: float = 2.3,
        *,
        weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        source_loss: str = "cross_entropy",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        matrix = functional.matrix_of(relationship)
        if not isinstance(matrix, SparseRows):
            validation.check_is_tensor("relationship", matrix)
        matrix = matrix.detach()
        functional.check_matrix(matrix)
        if matrix.device.type != "meta":  # deferred initialisation: there are no values yet
            _check_probabilities(matrix)
        options = LossOptions(weight, trade_off, label_smoothing, ignore_index, reduction, source_loss)
        self._check_options(options, matrix.shape[0], matrix.device)
        if weight is not None and not weight.is_meta and not torch.isfinite(weight).all():
            raise ValueError(f"weight is {weight!r:.120}, expected finite numbers")
        backends.select(matrix.device.type, backend, matrix.device.index)
        if isinstance(matrix, SparseRows):
            self._num_source_classes = matrix.num_columns
            for name, tensor in zip(_SPARSE_BUFFERS, matrix[:3], strict=True):
                self.register_buffer(name, tensor.clone(memory_format=torch.contiguous_format))
        else:
            # register_buffer refuses the name of a property.
            self._buffers["relationship"] = matrix.clone(memory_format=torch.contiguous_format)
        self.register_buffer("weight", None if weight is None else weight.detach().clone())
        self._trade_off = float(trade_off)
        # The trade-off is a tensor, so that a compiled or captured training step sees a new value. It is not a buffer,
        # because .half() would round it.
        self._options = options._replace(weight=self.weight, trade_off=self._trade_off_on(matrix.device))
        self.backend = backend

    @property
    def relationship(self) -> Tensor:
        """``R``, ``(N_t, N_s)``: the buffer, or a ``torch.sparse_csr`` tensor of the three buffers' memory."""
        matrix = self._matrix()
        return matrix.as_csr() if isinstance(matrix, SparseRows) else matrix

    def _matrix(self) -> Tensor | SparseRows:
        # Attribute access would take 0.5 us more: nn.Module looks for a buffer elsewhere first.
        buffers: dict[str, Any] = self._buffers
        if "relationship" in buffers:
            matrix: Tensor = buffers["relationship"]
            return matrix
        crow_indices, col_indices, values = (buffers[name] for name in _SPARSE_BUFFERS)
        return SparseRows(crow_indices, col_indices, values, self._num_source_classes)

    @property
    def trade_off(self) -> float:
        """The factor of the source term. May be set between steps, for instance in a warm-up."""
        return self._trade_off

    @trade_off.setter
    def trade_off(self, value: float) -> None:
        check_trade_off(value, self._matrix().device)
        self._trade_off = float(value)
        assert isinstance(self._options.trade_off, Tensor)
        self._options.trade_off.fill_(self._trade_off)

    @property
    def options(self) -> LossOptions:
        """All options of the loss. The trade-off is a float64 tensor on the module's device."""
        options, weight = self._options, self._buffers["weight"]
        # The weight differs if it was assigned, or swapped by torch.func.functional_call.
        return options if options.weight is weight else options._replace(weight=weight)

    def _set_options(self, **changes: Any) -> None:
        options = self.options._replace(**changes)
        matrix = self._matrix()
        self._check_options(options, matrix.shape[0], matrix.device)
        self._options = options

    def _check_options(self, options: LossOptions, num_target_classes: int, device: torch.device) -> None:
        check_options(options, num_target_classes, device)

    def get_extra_state(self) -> Tensor:
        """The trade-off as part of the ``state_dict``, so that a resumed warm-up continues with it."""
        return torch.tensor(self._trade_off, dtype=torch.float64, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Load the trade-off from a ``state_dict``."""
        self.trade_off = float(state)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str], *errors: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *errors)
        with_trade_off = f"{prefix}_extra_state"
        if with_trade_off in missing_keys:  # a state_dict of buffers alone leaves the trade-off unchanged
            missing_keys.remove(with_trade_off)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """``.to()``, ``.cuda()`` and ``.half()`` call this: the trade-off changes device, not dtype."""
        super()._apply(fn, recurse)
        trade_off = self._trade_off_on(self._matrix().device)
        self._options = self._options._replace(weight=self.weight, trade_off=trade_off)
        return self

    def _replicate_for_data_parallel(self) -> Self:
        """nn.DataParallel moves only a replica's buffers to its device, so the replica's trade-off is a number."""
        replica: Self = super()._replicate_for_data_parallel()
        replica.__dict__["_options"] = self._options._replace(trade_off=self._trade_off)
        return replica

    def __copy__(self) -> Self:
        """A shallow copy shares the relationship, but not the trade-off."""
        copied = type(self).__new__(type(self))
        copied.__dict__.update(self.__dict__)
        copied._options = self._options._replace(trade_off=self._trade_off_on(self._matrix().device))
        return copied

    def _trade_off_on(self, device: torch.device) -> Tensor:
        with torch.inference_mode(False):  # a tensor made in inference mode could not be set later
            return torch.tensor(self._trade_off, dtype=torch.float64, device=device)

    def extra_repr(self) -> str:
        """The options, for ``repr``."""
        target_classes, source_classes = self._matrix().shape
        return (
            f"target_classes={target_classes}, source_classes={source_classes}, trade_off={self.trade_off}, "
            f"label_smoothing={self.label_smoothing}, ignore_index={self.ignore_index}, "
            f"reduction={self.reduction!r}, source_loss={self.source_loss!r}, backend={self.backend!r}"
        )


def _check_probabilities(matrix: Tensor | SparseRows) -> None:
    if isinstance(matrix, SparseRows):
        matrix.check("relationship")
        wrong = ~torch.isfinite(matrix.values) | (matrix.values < 0)
        if wrong.any():
            k = int(wrong.nonzero()[0])
            row, column = int(matrix.row_of_entries()[k]), int(matrix.col_indices[k])
            raise ValueError(f"relationship[{row}, {column}] is {float(matrix.values[k])}, expected a probability")
        return
    bad = ~torch.isfinite(matrix) | (matrix < 0)
    if bad.any():
        row, column = (int(i) for i in bad.nonzero()[0])
        mend = ""
        if matrix[row].isnan().all():
            mend = (
                f"; the whole row is NaN, as the mean of a target class without training images is, in tllib for "
                f"instance. relationship[{row}] = 0 leaves the class without source supervision"
            )
        raise ValueError(f"relationship[{row}, {column}] is {float(matrix[row, column])}, expected a probability{mend}")


class FusedCoTuningLoss(_CoTuningCriterion):
    r"""Co-Tuning's loss: cross entropy of the target head plus ``trade_off`` times that of the kept source head.

    .. math:: L = \mathrm{CE}(z^t, y) + \lambda \, \mathrm{CE}(z^s, R_y)

    Example::

        criterion = FusedCoTuningLoss(relationship, trade_off=2.3)
        source_logits, target_logits = model(images)
        loss = criterion(source_logits, target_logits, labels)
        loss.backward()

    Args:
        relationship: ``R[t, s] = p(y_source = s | y_target = t)``, a floating tensor ``(N_t, N_s)`` or a
            :class:`cotuning_kernels.Relationship`. It becomes a buffer: it moves with ``.to()`` and is part of the
            ``state_dict``, as is the trade-off. A row of zeros is a target class without source supervision. A sparse
            one (:meth:`cotuning_kernels.Relationship.sparsified`) becomes three buffers.
        trade_off: the factor of the source term. The attribute may be set between steps, for instance in a warm-up.
        weight, label_smoothing, ignore_index, reduction, source_loss, inplace, backend: see
            :func:`cotuning_kernels.functional.co_tuning_loss`. They are attributes too, and may be set.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape or value; a relationship that is negative or not
            finite.
        RuntimeError: the requested backend is unavailable; the message says how to install it.
    """

    def __init__(
        self,
        relationship: Tensor | RelationshipLike,
        trade_off: float = 2.3,
        *,
        weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        source_loss: str = "cross_entropy",
        inplace: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            relationship, trade_off, weight=weight, label_smoothing=label_smoothing, ignore_index=ignore_index,
            reduction=reduction, source_loss=source_loss, backend=backend,
        )  # fmt: skip
        self.inplace = inplace

    def forward(
        self, source_logits: Tensor, target_logits: Tensor, target: Target, *, return_terms: bool = False
    ) -> Tensor | CoTuningTerms:
        """The loss of a batch; with ``return_terms``, also its two parts for logging.

        Args:
            source_logits: ``(B, N_s)``, or ``(N_s,)``, or ``(B, N_s, d1, ...)``.
            target_logits: ``(B, N_t)``, or ``(N_t,)``, or ``(B, N_t, d1, ...)``.
            target: class indices ``(B,)``, class probabilities ``(B, N_t)`` or a mixup pair
                ``(labels_a, labels_b, share of labels_a)``; with the logits' further dimensions.
            return_terms: return :class:`cotuning_kernels.CoTuningTerms`.

        Returns:
            The loss, shape ``()``, or that of the class indices with ``reduction="none"``: float64 where any logits
            are float64, else float32 whatever the logits. It can be differentiated once. With ``return_terms`` the
            loss and its two parts, detached.

        Raises:
            TypeError, ValueError: an argument has a wrong type, dtype, shape, device or value.
            IndexError: a label is out of range (CPU); on an accelerator an assertion of the device.
            RuntimeError: the requested backend does not serve the logits' device; the message says how to install it.
        """
        functional.require_target_logits(target_logits)
        matrix: Any = self._buffers.get("relationship")  # a call of _matrix would take longer
        if matrix is None:
            matrix = self._matrix()
        return functional.compute_loss(
            source_logits, target_logits, target, matrix, self.options, self.inplace, self.backend, return_terms
        )

    def as_rows(
        self, source_logits: Tensor, target_logits: Tensor, target: Target
    ) -> tuple[tuple[Tensor, Tensor], Target]:
        """The logits, and the target, as rows: for :func:`cotuning_kernels.distributed.global_mean_loss`."""
        functional.require_target_logits(target_logits)
        target = as_collated(target)
        if isinstance(source_logits, Tensor) and source_logits.dim() not in (0, 2):
            validation.check_shapes(source_logits, target_logits, target)
            target = target_as_rows(target, shape_of_labels(source_logits))
            source_logits, target_logits = logits_as_rows(source_logits), logits_as_rows(target_logits)
        return (source_logits, target_logits), target

    def terms(self, inputs: tuple[Tensor, Tensor], target: Target, options: LossOptions) -> CoTuningTerms:
        """The loss with other options than the module's own."""
        found = functional.compute_loss(*inputs, target, self._matrix(), options, self.inplace, self.backend, True)
        assert isinstance(found, CoTuningTerms)
        return found


class FusedLinearCoTuningLoss(_CoTuningCriterion):
    r"""Co-Tuning's loss of two linear heads, whose logits exist only for a chunk of rows at a time.

    .. math:: L = \mathrm{CE}(W^t f + b^t, y) + \lambda \, \mathrm{CE}(W^s f + b^s, R_y)

    For heads of many classes, whose logits need more memory than the rest of the step. It is :class:`FusedCoTuningLoss`
    on the logits of the two heads, up to rounding. Rows without source supervision never reach the source head.

    Example::

        criterion = FusedLinearCoTuningLoss(relationship, trade_off=2.3)
        features = backbone(images)
        loss = criterion(features, old.weight, old.bias, new.weight, new.bias, labels)
        loss.backward()

    Args:
        relationship, trade_off: as for :class:`FusedCoTuningLoss`.
        weight, label_smoothing, ignore_index, reduction, source_loss, memory_budget, backend: see
            :func:`cotuning_kernels.functional.linear_co_tuning_loss`. They are attributes too, and may be set.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape or value; a relationship that is negative or not
            finite.
        RuntimeError: the requested backend is unavailable; the message says how to install it.
    """

    def __init__(
        self,
        relationship: Tensor | RelationshipLike,
        trade_off: float = 2.3,
        *,
        weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        source_loss: str = "cross_entropy",
        memory_budget: int = MEMORY_BUDGET,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            relationship, trade_off, weight=weight, label_smoothing=label_smoothing, ignore_index=ignore_index,
            reduction=reduction, source_loss=source_loss, backend=backend,
        )  # fmt: skip
        check_linear_options(self.options, memory_budget)
        self.memory_budget = memory_budget

    def forward(
        self,
        features: Tensor | tuple[Tensor, Tensor],
        source_weight: Tensor,
        source_bias: Tensor | None,
        target_weight: Tensor,
        target_bias: Tensor | None,
        target: Target,
        *,
        return_terms: bool = False,
        return_metrics: bool = False,
    ) -> Tensor | CoTuningTerms | CoTuningMetrics:
        """The loss of a batch; on request its two parts, or these with accuracies and log-sum-exps, for logging.

        Args:
            features: ``(..., D)``, or a pair: those of the source head and those of the target head.
            source_weight, source_bias: ``(N_s, D)`` and ``(N_s,)`` or None.
            target_weight, target_bias: ``(N_t, D)`` and ``(N_t,)`` or None.
            target: class indices ``(...)``, class probabilities ``(..., N_t)`` or a mixup pair.
            return_terms: return :class:`cotuning_kernels.CoTuningTerms`.
            return_metrics: return :class:`cotuning_kernels.CoTuningMetrics`.

        Returns:
            The loss, shape ``()``: float64 where any features are float64, else float32. It can be differentiated once.

        Raises:
            TypeError, ValueError: an argument has a wrong type, dtype, shape, device or value.
            IndexError: a label is out of range (CPU); on an accelerator an assertion of the device.
            RuntimeError: the requested backend does not serve the features' device.
        """
        return functional.compute_linear_loss(
            features, (source_weight, source_bias, target_weight, target_bias), target, self._matrix(),
            self.options, self.memory_budget, self.backend, return_terms, return_metrics,
        )  # fmt: skip

    def _check_options(self, options: LossOptions, num_target_classes: int, device: torch.device) -> None:
        super()._check_options(options, num_target_classes, device)
        check_linear_options(options, MEMORY_BUDGET)

    def as_rows(
        self,
        features: Tensor | tuple[Tensor, Tensor],
        source_weight: Tensor,
        source_bias: Tensor | None,
        target_weight: Tensor,
        target_bias: Tensor | None,
        target: Target,
    ) -> tuple[tuple[Any, Any], Target]:
        """The features, and the target, as rows: for :func:`cotuning_kernels.distributed.global_mean_loss`."""
        pair = features if isinstance(features, tuple | list) else (features, features)
        rows, target = features_as_rows(pair, as_collated(target))
        return (tuple(rows), (source_weight, source_bias, target_weight, target_bias)), target

    def terms(self, inputs: tuple[Any, Any], target: Target, options: LossOptions) -> CoTuningTerms:
        """The loss with other options than the module's own."""
        found = functional.compute_linear_loss(
            *inputs, target, self._matrix(), options, self.memory_budget, self.backend, True, False
        )
        assert isinstance(found, CoTuningTerms)
        return found
