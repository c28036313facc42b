"""The rows of the conformance table, as data. Adding an edge case is one row in ``CASES``."""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from support.problems import DTYPES, Problem, Target, compute_dtype

Edit = Callable[[Problem], None]
"""Changes a problem in place, in float64, before it is cast to the dtype under test."""


@dataclass(frozen=True)
class Case:
    """One row of the table: how to draw a problem. Names of target and relationship kinds are those of the builders."""

    name: str
    why: str
    shape: tuple[int, int, int] = (4, 7, 40)
    target: str = "labels"
    relationship: str = "normalised"
    weight: str = "none"
    upstream: str = "random"
    edits: tuple[Edit, ...] = ()
    relationship_dtype: torch.dtype | None = None
    target_logits_dtype: torch.dtype | None = None
    options: dict[str, Any] = field(default_factory=dict)
    dtypes: tuple[torch.dtype, ...] = DTYPES

    def build(self, dtype: torch.dtype, seed: int) -> Problem:
        """Draw the problem; the same seed draws the same numbers for every dtype."""
        draw = torch.Generator().manual_seed(seed + zlib.crc32(self.name.encode()))
        batch, target_classes, source_classes = self.shape
        relationship = _relationship(self.relationship, target_classes, source_classes, draw)
        problem = Problem(
            source_logits=2 * _normal(draw, batch, source_classes),
            target_logits=2 * _normal(draw, batch, target_classes),
            target=_target(self.target, batch, target_classes, self.options.get("ignore_index", -100), draw),
            relationship=relationship.to(self.relationship_dtype or torch.promote_types(dtype, torch.float32)),
            upstream=torch.zeros(()),
            weight=_weight(self.weight, target_classes, draw),
            **self.options,
        )
        for edit in self.edits:
            edit(problem)
        problem.source_logits = problem.source_logits.to(dtype)
        problem.target_logits = problem.target_logits.to(self.target_logits_dtype or dtype)
        loss_dtype = compute_dtype(problem.source_logits, problem.target_logits)
        problem.upstream = _upstream(self.upstream, batch if problem.reduction == "none" else None, draw).to(loss_dtype)
        return problem


def _normal(draw: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=draw, dtype=torch.float64)


def _uniform(draw: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=draw, dtype=torch.float64)


def _relationship(kind: str, target_classes: int, source_classes: int, draw: torch.Generator) -> Tensor:
    dense = torch.softmax(2 * _normal(draw, target_classes, source_classes), dim=1)
    if kind == "dense":
        return dense
    if kind == "one-hot":
        return F.one_hot(dense.argmax(1), source_classes).double()
    # A quarter of the entries is 0, and never a whole row.
    kept = (_uniform(draw, target_classes, source_classes) > 0.25) | (dense == dense.amax(1, keepdim=True))
    sparse = dense * kept
    sparse /= sparse.sum(1, keepdim=True)
    if kind == "unnormalised":
        sparse *= 0.1 + 3 * _uniform(draw, target_classes, 1)
    elif kind == "unsupervised":
        sparse[::2] = 0
    elif kind == "all unsupervised":
        sparse[:] = 0
    else:
        assert kind == "normalised", kind
    return sparse


def _target(kind: str, batch: int, classes: int, ignore_index: int, draw: torch.Generator) -> Target:
    def labels() -> Tensor:
        # Consecutive classes from a random start: a batch of two or more has supervised and unsupervised ones.
        start = int(torch.randint(classes, (), generator=draw))
        drawn = (torch.arange(batch) + start) % classes
        # A class that is the ignore_index itself appears only where a case asks for ignored rows.
        return torch.where(drawn == ignore_index, (drawn + 1) % classes, drawn)

    def ignoring(every: int, first: int) -> Tensor:
        chosen = labels()
        chosen[first::every] = ignore_index
        return chosen

    share = _uniform(draw, batch).float()
    if kind == "pair, float share":
        return labels(), labels(), float(_uniform(draw, 1))
    if kind == "pair, scalar share":
        return labels(), labels(), torch.tensor(0.3)
    if kind == "pair, shares 0 and 1":
        # An ignored label with no share at all must not matter.
        a, b, share = labels(), labels(), (torch.arange(batch) % 2).float()
        a[:1] = ignore_index
        return a, b, share
    probabilities = torch.softmax(_normal(draw, batch, classes), dim=1)
    targets: dict[str, Callable[[], Target]] = {
        "labels": labels,
        "int32": lambda: labels().int(),
        "ignoring": lambda: ignoring(3, 0),
        "all ignored": lambda: ignoring(1, 0),
        "one label": lambda: torch.full_like(labels(), int(labels()[0])),
        "pair": lambda: (labels(), labels(), share),
        "int32 pair": lambda: (labels().int(), labels().int(), share),
        "half pair": lambda: (labels(), labels(), share.half()),
        "double pair": lambda: (labels(), labels(), share.double()),
        "equal pair": lambda: (labels().fill_(classes - 1), labels().fill_(classes - 1), share),
        # Row 0 ignores both sides, row 2 the first, row 3 the second.
        "pair ignoring": lambda: (ignoring(2, 0), ignoring(3, 0), share),
        "probabilities": lambda: probabilities.float(),
        "half probabilities": lambda: probabilities.bfloat16(),
        "double probabilities": lambda: probabilities,
        "one-hot probabilities": lambda: F.one_hot(labels(), classes).float(),
        "unnormalised probabilities": lambda: (probabilities * 3 * _uniform(draw, batch, 1)).float(),
        "no probabilities": lambda: torch.zeros(batch, classes),
        "probabilities, zero rows": lambda: (probabilities * (torch.arange(batch) % 2)[:, None]).float(),
    }
    return targets[kind]()


def _weight(kind: str, classes: int, draw: torch.Generator) -> Tensor | None:
    if kind == "none":
        return None
    weight = (0.5 + _uniform(draw, classes)).float()
    if kind == "half":
        return weight.half()
    if kind == "zeros":
        weight[::2] = 0
    return weight


def _upstream(kind: str, rows: int | None, draw: torch.Generator) -> Tensor:
    values = _normal(draw, *(() if rows is None else (rows,)))
    if kind == "zero":
        return torch.zeros_like(values)
    if kind == "gradient scaler":
        return values.sign() * 65536.0
    if kind == "expanded":
        return _normal(draw, 1).expand(rows or 0)
    return values


# ------------------------------------------------------------------------------------------------------------- edits


def source(rows: int | slice, columns: int | slice, value: float) -> Edit:
    """Set source logits."""

    def edit(problem: Problem) -> None:
        problem.source_logits[rows, columns] = value

    return edit


def target(rows: int | slice, columns: int | slice, value: float) -> Edit:
    """Set target logits."""

    def edit(problem: Problem) -> None:
        problem.target_logits[rows, columns] = value

    return edit


def both(rows: int | slice, columns: int | slice, value: float) -> Edit:
    """Set logits of both heads."""

    def edit(problem: Problem) -> None:
        problem.source_logits[rows, columns] = value
        problem.target_logits[rows, columns] = value

    return edit


def scaled(factor: float, offset: float = 0.0) -> Edit:
    """Scale and shift all logits."""

    def edit(problem: Problem) -> None:
        problem.source_logits.mul_(factor).add_(offset)
        problem.target_logits.mul_(factor).add_(offset)

    return edit


def masked_where_not_a_label(problem: Problem) -> None:
    """-inf where a distribution is 0: in all columns of the source logits, in every second of the target logits."""
    p = problem.distribution()
    q = p @ problem.relationship.double()
    problem.source_logits.masked_fill_(q == 0, -math.inf)
    every_second = torch.arange(p.shape[1]) % 2 == 0
    problem.target_logits.masked_fill_((p == 0) & every_second, -math.inf)


def staircase(step: float) -> Edit:
    """A step up (or down) every 16 columns: the running maximum changes many times."""

    def edit(problem: Problem) -> None:
        problem.source_logits += step * (torch.arange(problem.source_logits.shape[1]) // 16)
        problem.target_logits += step * (torch.arange(problem.target_logits.shape[1]) // 16)

    return edit


def labels_of_class(label: int) -> Edit:
    """Every row has this label."""

    def edit(problem: Problem) -> None:
        assert isinstance(problem.target, Tensor)
        problem.target.fill_(label)

    return edit


def predicts_the_relationship(problem: Problem) -> None:
    """Source logits log(q) + constant: the source head is exactly right, the gradient vanishes."""
    q = problem.distribution() @ problem.relationship.double()
    problem.source_logits.copy_(torch.log(q) + 0.7)


def rows_that_cancel(problem: Problem) -> None:
    """Every second row of R has non-zero entries whose sum is exactly 0 in any order."""
    signs = torch.tensor([0.25, -0.25]).repeat(problem.relationship.shape[1] // 2)
    problem.relationship[::2] = 0
    problem.relationship[::2, : len(signs)] = signs.to(problem.relationship.dtype)


def supervised_late(problem: Problem) -> None:
    """Rows of R are 0 in their first 130 columns, as in a table made by hand."""
    problem.relationship[:, :130] = 0


def supervised_almost(bits: int) -> Edit:
    """Rows of R have sums that differ from 1 by almost ``2**-bits``."""

    def edit(problem: Problem) -> None:
        problem.relationship *= 1 + 0.95 * 2.0**-bits

    return edit


def garbage_where_unsupervised(value: float) -> Edit:
    """Source logits of rows without source supervision, which no kernel may read."""

    def edit(problem: Problem) -> None:
        q = problem.distribution() @ problem.relationship.double()
        problem.source_logits[(q == 0).all(1), ::3] = value

    return edit


def garbage_where_ignored(value: float) -> Edit:
    """Logits of ignored rows, which no kernel may read."""

    def edit(problem: Problem) -> None:
        ignored = (problem.distribution() == 0).all(1)
        problem.source_logits[ignored, ::3] = value
        problem.target_logits[ignored, ::3] = value

    return edit


# ---------------------------------------------------------------------------------------------------------- the cases

_INF, _NAN = math.inf, math.nan

_TAILS = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 63, 64, 65, 95, 127, 128, 129, 257)
"""One below, at and above the width of every vector (4 to 64 elements), and of the start of a row (64 elements)."""


def _sizes() -> list[Case]:
    tails = [
        Case(f"N_s={n}", "vector tails of either head; N_t runs through the same widths backwards", (3, m, n))
        for n, m in zip(_TAILS, reversed(_TAILS), strict=True)
    ]
    # The loops for pairs, probabilities and KL differ from the loop for labels; each has its own tails.
    others = [
        Case(f"{kind}, {loss}, N_s={n}", "vector tails of this target form's loop", (3, 19, n), kind,
             options={"source_loss": loss})
        for kind in ("labels", "pair", "probabilities") for loss in ("cross_entropy", "kl")
        for n in (1, 15, 16, 17, 33, 65, 129) if (kind, loss) != ("labels", "cross_entropy")
    ]  # fmt: skip
    shapes = [
        ((48, 200, 1000), "the paper's heads and batch; 1000 is no multiple of 16"),
        ((1, 200, 1000), "one row: a row's mean is the row"),
        ((1, 1, 1), "everything of size one"),
        ((3, 1, 40), "N_t = 1: the target head's loss and gradient are 0"),
        ((5, 2, 1001), "an odd head of the common size, and the smallest real target head"),
        ((3, 1000, 20), "ImageNet's head as target, with a small source head"),
        ((2, 9, 21841), "ImageNet-21k's head"),
        ((2, 9, 30522), "BERT's vocabulary: larger than any cache line of partial sums"),
        ((300, 40, 401), "more than 100000 elements: the parallel path, and an uneven split of the rows"),
    ]
    cases = [Case("x".join(map(str, shape)), why, shape) for shape, why in shapes]
    cases.append(Case("2x9x21841, R in bfloat16", "the same with a smaller R", (2, 9, 21841),
                      relationship_dtype=torch.bfloat16, dtypes=(torch.bfloat16,)))  # fmt: skip
    empty = [
        Case(f"empty batch, {kind}, {reduction}", "NaN, 0 or an empty loss, as F.cross_entropy", (0, 7, 40), kind,
             options={"reduction": reduction})
        for kind in ("labels", "pair", "probabilities") for reduction in ("mean", "sum", "none")
    ]  # fmt: skip
    return [*tails, *others, *cases, *empty]


def _options() -> list[Case]:
    # The full cross of target forms, reductions and options of the target term: all change the mean's divisor.
    target_term = [
        Case(f"{kind}, {reduction}, weight {weight}, smoothing {smoothing}", "options meet in the divisor of the mean",
             (6, 9, 21), kind, weight=weight, options={"reduction": reduction, "label_smoothing": smoothing})
        for kind, reduction, weight, smoothing in itertools.product(
            ("labels", "ignoring", "pair", "pair ignoring", "probabilities", "probabilities, zero rows"),
            ("mean", "sum", "none"), ("none", "random", "zeros"), (0.0, 0.1),
        )
    ]  # fmt: skip
    # The full cross of everything that changes the divisor of the source term's mean.
    source_term = [
        Case(f"{kind}, {reduction}, {relationship}, {loss}", "meet in the divisor of the source term's mean",
             (6, 9, 21), kind, relationship, options={"reduction": reduction, "source_loss": loss})
        for kind, reduction, relationship, loss in itertools.product(
            ("labels", "ignoring", "pair", "pair ignoring", "probabilities, zero rows"), ("mean", "sum", "none"),
            ("unnormalised", "unsupervised", "all unsupervised"), ("cross_entropy", "kl"),
        )
    ]  # fmt: skip
    kinds = {
        "int32": "labels of 4 bytes",
        "int32 pair": "labels of 4 bytes, and their stride",
        "half pair": "shares in half precision, upcast exactly",
        "double pair": "shares in double, not to be rounded on the way",
        "pair, float share": "one share for the batch, a Python float (Beta draws in mixup)",
        "pair, scalar share": "one share for the batch, a tensor of no dimension",
        "pair, shares 0 and 1": "a side without share contributes nothing, not even when it is ignored",
        "equal pair": "both labels equal: Q counts them once each",
        "one label": "all rows read the same row of R",
        "one-hot probabilities": "must equal labels",
        "half probabilities": "a teacher's output under autocast",
        "double probabilities": "not to be rounded on the way, except to the compute dtype",
        "unnormalised probabilities": "Q of the target head differs from 1",
    }
    forms = [Case(kind, why, target=kind) for kind, why in kinds.items()]
    forms += [
        Case(f"{kind}, {reduction}", "no row takes part: NaN mean as F.cross_entropy, gradient exactly 0",
             target=kind, options={"reduction": reduction})
        for kind in ("all ignored", "no probabilities") for reduction in ("mean", "sum", "none")
    ]  # fmt: skip
    scalars: list[tuple[str, str, dict[str, Any]]] = [
        ("ignore_index=3", "a real class is ignored, as F.cross_entropy allows", {"ignore_index": 3}),
        ("ignore_index=-1", "the other habit", {"ignore_index": -1}),
        ("trade_off=0", "a warm-up's first step: the source gradient is 0", {"trade_off": 0.0}),
        ("trade_off=-0.7", "linear in the trade-off whatever its sign", {"trade_off": -0.7}),
        ("trade_off=1e4", "the source term dominates", {"trade_off": 1e4}),
        ("label_smoothing=1", "the label itself no longer counts", {"label_smoothing": 1.0}),
    ]
    forms += [Case(name, why, target="ignoring", options=options) for name, why, options in scalars]
    forms.append(Case("half weight", "a weight in half precision", weight="half"))
    # No label smoothing here: the loss would be infinite and F.cross_entropy's gradient inf - inf, so no standard.
    forms.append(Case("no weight at all", "a divisor of 0: NaN as F.cross_entropy", weight="zeros",
                      edits=(labels_of_class(2),)))  # fmt: skip
    for dtype in DTYPES:
        forms += [
            Case(f"R in {dtype}, {kind}, {loss}", "the relationship has a dtype of its own", target=kind,
                 relationship_dtype=dtype, options={"source_loss": loss})
            for kind in ("labels", "pair", "probabilities") for loss in ("cross_entropy", "kl")
        ]  # fmt: skip
        forms.append(Case(f"target head in {dtype}", "an fp32 head beside a half one", target_logits_dtype=dtype))
    forms += [
        Case(f"rows of R that cancel, {kind}, {reduction}", "supervised rows with Q = 0: entries matter, not their sum",
             (4, 7, 90), kind, edits=(rows_that_cancel,), options={"reduction": reduction})
        for kind in ("labels", "pair, shares 0 and 1", "pair, scalar share", "one-hot probabilities")
        for reduction in ("mean", "none")
    ]  # fmt: skip
    forms += [
        Case(f"supervised late, {kind}", "the beginning of a row of R does not say whether it has entries", (4, 7, 150),
             kind, edits=(supervised_late,))
        for kind in ("labels", "pair", "one-hot probabilities")
    ]  # fmt: skip
    forms += [
        Case(f"wide R in {dtype}, {kind}", "a row of logits and one of R, two numbers in a register",
             (5, 7, 150), kind, relationship, relationship_dtype=dtype)
        for dtype in (torch.bfloat16, torch.float16)
        for kind, relationship in (("ignoring", "unsupervised"), ("labels", "unnormalised"),
                                   ("one-hot probabilities", "normalised"))
    ]  # fmt: skip
    forms += [
        Case(f"Q almost 1, {bits} bits", "it must not be taken for 1 where the result shows it", (4, 7, 150),
             options={"reduction": "none"}, edits=(supervised_almost(bits),))
        for bits in (11, 14, 22)
    ]  # fmt: skip
    upstreams = {
        "zero": "the loss is multiplied by 0",
        "gradient scaler": "65536, as a GradScaler starts: fp16 gradients of a mean survive, others become inf",
    }
    forms += [
        Case(f"upstream {kind}, {reduction}", why, upstream=kind, target="ignoring", options={"reduction": reduction})
        for kind, why in upstreams.items() for reduction in ("mean", "none")
    ]  # fmt: skip
    expanded = "loss.sum().backward() sends a tensor of stride 0"
    forms.append(Case("upstream expanded", expanded, upstream="expanded", options={"reduction": "none"}))
    # Options change the arithmetic on rows, dtypes change how elements are loaded: every option meets every dtype
    # somewhere in the table, but not every combination of options does.
    crossed = [
        replace(case, dtypes=(torch.float32, DTYPES[1 + zlib.crc32(case.name.encode()) % 3]))
        for case in (*target_term, *source_term)
    ]
    return [*crossed, *forms]


def _numbers() -> list[Case]:
    """Values of the logits. One row is edited at a time; the results of the others must not change."""
    wide = (4, 90, 300)
    cases = [
        Case("q=0 meets -inf", "contributes 0, never NaN (a masked vocabulary)", edits=(masked_where_not_a_label,)),
        Case("q=0 meets -inf, long", "the same through whole vectors", wide, edits=(masked_where_not_a_label,)),
        Case("q=0 meets -inf, KL", "q log q of 0 is 0", wide, options={"source_loss": "kl"},
             edits=(masked_where_not_a_label,)),
        Case("q=0 meets -inf, pair", "where neither side has mass", wide, "pair", edits=(masked_where_not_a_label,)),
        Case("q=0 meets -inf, probabilities", "P has no zeros here, R has", wide, "one-hot probabilities",
             edits=(masked_where_not_a_label,)),
        Case("q=0 meets -inf, zero weight", "w = 0 takes the label's mass away", wide, weight="zeros",
             edits=(target(slice(None), slice(0, None, 2), -_INF),)),
        Case("smoothing meets -inf", "smoothing gives mass to the masked class: +inf, as F.cross_entropy", wide,
             options={"label_smoothing": 0.1, "reduction": "none"}, edits=(target(1, 5, -_INF),)),
        Case("all the mass at -inf", "loss +inf, gradient of the formula", relationship="one-hot",
             options={"reduction": "none"}, edits=(source(1, slice(0, 39), -_INF), target(2, slice(0, 6), -_INF))),
        Case("NaN in an ignored row", "no kernel reads it", (7, 5, 70), "ignoring",
             edits=(garbage_where_ignored(_NAN),)),
        Case("-inf row, ignored", "no kernel reads it", (7, 5, 70), "ignoring", edits=(garbage_where_ignored(-_INF),)),
        Case("+inf in an ignored pair", "no kernel reads it", (7, 5, 70), "pair ignoring",
             edits=(garbage_where_ignored(_INF),)),
        Case("NaN where unsupervised", "no kernel reads the source head there", (7, 5, 70), relationship="unsupervised",
             edits=(garbage_where_unsupervised(_NAN),)),
        Case("+inf where unsupervised, KL", "no kernel reads the source head there", (7, 5, 70), "pair", "unsupervised",
             options={"source_loss": "kl"}, edits=(garbage_where_unsupervised(_INF),)),
        Case("offset 1e4", "softmax does not change, and neither may the loss: q . z must not be summed as it stands",
             wide, edits=(scaled(1.0, 1e4),)),
        Case("offset -1e4", "the same below", wide, edits=(scaled(1.0, -1e4),)),
        Case("offset 1e4, KL pair", "the same in the other loops", wide, "pair", options={"source_loss": "kl"},
             edits=(scaled(1.0, 1e4),)),
        Case("logits of 1e4", "one-hot softmax: exp underflows everywhere else", wide, edits=(scaled(5e3),)),
        Case("logits of 30", "peaked, but nothing underflows to 0", wide, edits=(scaled(15.0),)),
        Case("tiny logits", "uniform softmax", wide, edits=(scaled(1e-3),)),
        Case("equal logits", "zero differences, no redo", wide, edits=(scaled(0.0, 3.0),)),
        Case("huge spread", "differences near the largest float32", (3, 5, 130), options={"reduction": "none"},
             edits=(both(slice(None), slice(0, 2), -3e4), both(slice(None), slice(2, 4), 3e4))),
        Case("exact prediction, KL", "loss and gradient vanish, only rounding is left", wide, relationship="dense",
             options={"source_loss": "kl"}, edits=(predicts_the_relationship,)),
        Case("exact prediction, KL pair", "the same for a mixture", wide, "pair", "dense",
             options={"source_loss": "kl"}, edits=(predicts_the_relationship,)),
        Case("unnormalised pair", "Q of a mixture of unnormalised rows", wide, "pair", "unnormalised"),
    ]  # fmt: skip
    for loss in ("cross_entropy", "kl"):
        cases += [
            Case(f"q>0 meets -inf, {loss}, {reduction}", "loss +inf, gradient of the formula", relationship="dense",
                 options={"source_loss": loss, "reduction": reduction}, edits=(source(1, 3, -_INF),))
            for reduction in ("mean", "none")
        ]  # fmt: skip
    for kind in ("labels", "pair", "probabilities"):
        cases += [
            Case(f"row of -inf, {kind}", "NaN for this row, and for no other", (4, 9, 70), kind,
                 options={"reduction": "none"}, edits=(source(1, slice(None), -_INF), target(2, slice(None), -_INF))),
            Case(f"+inf, {kind}", "NaN for this row, and for no other", (4, 9, 70), kind,
                 options={"reduction": "none"}, edits=(source(1, 66, _INF), target(2, 3, _INF))),
        ]  # fmt: skip
        for column in (0, 40, 69):
            cases.append(
                Case(f"NaN in column {column}, {kind}", "start, body, tail: none may swallow it", (4, 9, 70), kind,
                     options={"reduction": "none"}, edits=(source(1, column, _NAN), target(2, column % 9, _NAN)))
            )  # fmt: skip
    # A term with factor 0 does not count: its logits are not read, and 0 * inf and 0 * NaN do not arise.
    for value in (-_INF, _INF, _NAN):
        for where, edit in {"a logit": source(1, 3, value), "all": source(slice(None), slice(None), value)}.items():
            cases += [
                Case(f"trade_off=0 meets {value} in {where}, {kind}", "a source term with factor 0 does not count",
                     (4, 9, 70), kind, "dense", edits=(edit,),
                     options={"trade_off": 0.0, "reduction": reduction, "source_loss": loss})
                for kind, reduction, loss in (
                    ("labels", "mean", "cross_entropy"), ("int32", "none", "kl"), ("ignoring", "mean", "kl"),
                    ("pair", "sum", "cross_entropy"), ("pair ignoring", "mean", "kl"), ("probabilities", "mean", "kl"),
                    ("probabilities, zero rows", "none", "cross_entropy"),
                )
            ]  # fmt: skip
    cases += [
        Case(f"trade_off=0, {kind}, {reduction}", "the source term and its gradient are 0, the target term is as ever",
             (6, 9, 21), kind, "unsupervised", weight="random",
             options={"trade_off": 0.0, "reduction": reduction, "label_smoothing": 0.1})
        for kind in ("ignoring", "all ignored", "pair ignoring", "one-hot probabilities", "no probabilities")
        for reduction in ("mean", "sum", "none")
    ]  # fmt: skip
    # A row is swept once with the maximum of its start, and again where the true maximum lies far above.
    for column in (0, 15, 16, 63, 64, 65, 127, 299):
        cases.append(
            Case(f"maximum in column {column}", "far above all others, wherever it lies", (3, 90, 300),
                 edits=(source(1, column, 5e3), target(1, column % 90, 5e3)))
        )  # fmt: skip
    for height in (20.0, 55.0, 59.0, 60.0, 61.0, 65.0, 80.0, 88.0, 89.0, 100.0, 200.0):
        cases.append(
            Case(f"late maximum {height:g} above", "about the height where one sweep no longer does, and exp overflows",
                 (3, 90, 300), edits=(scaled(0.5), source(1, 250, height), target(1, 80, height)))
        )  # fmt: skip
    # The CPU keeps the exponentials of a long row in its gradient; in place, the second sweep reads its logits there.
    for kind, edits in (
        ("labels", (source(1, 1500, 5e3),)),
        ("pair", (source(1, 1500, _NAN),)),
        ("probabilities", (source(1, 1500, -_INF), source(2, 1700, 200.0))),
    ):
        cases.append(
            Case(f"long row swept twice, {kind}", "a row is long from 1639 floats or 820 doubles on", (3, 5, 1701),
                 kind, options={"reduction": "none"}, edits=edits)
        )  # fmt: skip
    starts = {"-inf": -_INF, "-1e4": -1e4, "-80": -80.0}
    cases += [
        Case(f"start of {name}", "the first elements say nothing about the maximum", (3, 90, 300),
             "one-hot probabilities", "dense", options={"reduction": "none"},
             edits=(source(1, slice(0, 128), value), target(1, slice(0, 70), value)))
        for name, value in starts.items()
    ]  # fmt: skip
    stairs = (3, 300, 300)
    cases += [
        Case(
            "staircase up", "the maximum is overtaken again and again, never by much", stairs, edits=(staircase(50.0),)
        ),
        Case("steep staircase up", "and by more than exp can hold", stairs, edits=(staircase(300.0),)),
        Case("staircase down", "the first maximum stays", stairs, edits=(staircase(-50.0),)),
    ]
    return cases


CASES = (*_sizes(), *_options(), *_numbers())
assert len({case.name for case in CASES}) == len(CASES), "two cases have one name"


def covering(cases: Sequence[Case]) -> list[Case]:
    """Choose few cases in which every two values that meet in a case meet again.

    A value is a shape, a kind of target, an edit, an option and so on. Bugs mostly need one or two of them. Each turn
    takes the case with the most new pairs.
    """
    left = {case.name: _pairs(case) for case in cases}
    missing = set().union(*left.values())
    chosen = []
    while missing:
        case = max(cases, key=lambda case: len(left[case.name] & missing))
        chosen.append(case)
        missing -= left[case.name]
    return chosen


def _pairs(case: Case) -> set[tuple[Any, ...]]:
    values: list[tuple[str, Any]] = [
        (name, x) for name, x in vars(case).items() if name not in ("name", "why", "options", "edits")
    ]
    values += [("option", item) for item in case.options.items()]
    values += [("edit", edit.__qualname__) for edit in case.edits]
    return set(itertools.combinations(values, 2))
