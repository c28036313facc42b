"""Every Python block of the README and of docs/ runs and gives the results that its page states.

The blocks of a page run in order and share a namespace, in an empty folder. A page's hidden setup makes the small
models and data that its blocks use; its check looks at the results. A page whose blocks need neither has no entry, and
a block that uses an unknown name fails.
"""

from __future__ import annotations

import doctest
import os
import re
import socket
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import cotuning_kernels as ck

PROJECT = Path(__file__).resolve().parents[2]
PAGES = [
    *(
        PROJECT / name
        for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md", "csrc/README.md")
    ),
    *sorted((PROJECT / "docs").rglob("*.md")),
]
# The authors' factor for all logits, and their values of C, in their order.
SCALE = 0.8840456604957581
INVERSE_PENALTIES = [1e4, 3e3, 1e3, 300, 100, 30, 10, 3, 1, 0.3, 0.1, 0.03, 0.01, 3e-3, 1e-3, 3e-4, 1e-4]
PARENTS = ("docs", "examples", "benchmarks", "csrc", "cotuning_kernels", "python_tests", "tools", "build_support")
FOLDERS = f"(?:{'|'.join(PARENTS)})"
SOURCE, TARGET = 6, 3


@dataclass
class Run:
    """Runs a page's blocks in order; ``after[heading]`` has the namespace after each block below the heading."""

    namespace: dict[str, Any]
    after: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def value(self, heading: str, block: int, name: str) -> Any:
        return self.after[heading][block][name]


def blocks_of(text: str) -> Iterator[tuple[str, int, str]]:
    """Heading, line of the first code line, and code of each Python block."""
    heading, fence, start, code = "", "", 0, list[str]()
    for number, line in enumerate(text.splitlines(), start=1):
        if fence:
            if line == fence:
                if start:
                    yield heading, start, "\n".join(code)
                fence = ""
            else:
                code.append(line)
        elif line.startswith("```"):
            fence, code = re.match("`+", line)[0], []  # type: ignore[index]
            start = number + 1 if line.strip("`") == "python" else 0
        elif line.startswith("#"):
            heading = line.lstrip("# ")


def name_of(page: Path) -> str:
    return page.relative_to(PROJECT).as_posix()


WITH_BLOCKS = [page for page in PAGES if any(blocks_of(page.read_text()))]
WITH_PROMPTS = [page for page in PAGES if ">>> " in page.read_text()]


@pytest.mark.parametrize("page", WITH_BLOCKS, ids=name_of)
def test_the_blocks_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    setup, check = PREPARED.get(name_of(page), (lambda _: {}, lambda _: None))
    run = Run({"__name__": page.stem, **setup(monkeypatch)})
    try:
        for heading, line, code in blocks_of(page.read_text()):
            # Pad with empty lines, so that a traceback shows the page's line numbers.
            exec(compile("\n" * (line - 1) + code, page, "exec"), run.namespace)
            run.after.setdefault(heading, []).append(dict(run.namespace))
        check(run)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@pytest.mark.parametrize("page", WITH_PROMPTS, ids=name_of)
def test_the_prompts_of_a_page_answer_as_it_says(page: Path) -> None:
    example = doctest.DocTestParser().get_doctest(page.read_text(), {}, page.name, str(page), 0)
    outcome = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(example)
    assert outcome.attempted > 0
    assert outcome.failed == 0


def test_every_prepared_page_has_blocks() -> None:
    assert set(PREPARED) <= {name_of(page) for page in WITH_BLOCKS}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_links_of_a_page_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    gone = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not gone


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_paths_and_commands_of_a_page_exist(page: Path) -> None:
    text = re.sub(r"^```python.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    paths = re.findall(rf"(?<![\w/.]){FOLDERS}/[\w./*-]*[\w/*]", text)
    # Bare names, such as `loss.cpp` beside the path of its folder.
    names = set(re.findall(r"`([\w*]+\.(?:py|h|cpp|cu|cuh|toml|json))`", text))
    names = {name for name in names if not any(path for folder in PARENTS for path in (PROJECT / folder).rglob(name))}
    modules = [f"{name.replace('.', '/')}*" for name in re.findall(rf"python -m ({FOLDERS}[\w.]*\w)", text)]
    gone = [path for path in (*paths, *modules, *names) if not any(PROJECT.glob(path.rstrip("/")))]
    commands = re.findall(r"python -m benchmarks ([a-z_]+)", text)
    gone += [command for command in commands if not (PROJECT / f"benchmarks/{command}.py").exists()]
    targets = re.findall(r"^([a-z]+):", (PROJECT / "Makefile").read_text(), flags=re.MULTILINE)
    gone += [
        target for target in re.findall(r"(?:`|^    )make ([a-z]+)", text, flags=re.MULTILINE) if target not in targets
    ]
    assert not gone


def test_the_reference_has_every_public_name() -> None:
    page = (PROJECT / "docs/api/cotuning_kernels.rst").read_text()
    described = set(re.findall(r"auto(?:class|function):: (\w+)", page))
    assert described == set(ck.__all__) - {"functional"}  # has its own page


# ---- setup and check of each page ------------------------------------------------------------------------------------


def classifier() -> nn.Module:
    head = nn.Linear(4 * 2 * 2, SOURCE)
    head.weight.data *= 5  # predictions far from uniform
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), head).eval()


def image_loader(rows: int = 30, batch: int = 10) -> DataLoader[Any]:
    labels = torch.arange(rows) % TARGET
    return DataLoader(TensorDataset(torch.randn(rows, 1, 4, 4) + labels.view(-1, 1, 1, 1), labels), batch)


def readme(_: pytest.MonkeyPatch) -> dict[str, Any]:
    loader = image_loader()
    return {"pretrained": classifier(), "plain_loader": loader, "train_loader": loader, "names": ["cat", "dog", "owl"]}


def check_readme(run: Run) -> None:
    values = run.namespace
    torch.testing.assert_close(values["relationship"].matrix, values["R"])
    fused = values["criterion"](values["source_logits"], values["target_logits"], values["labels"])
    torch.testing.assert_close(fused, values["loss"])
    assert values["classifier"](values["images"]).shape == (10, TARGET)


def guide(_: pytest.MonkeyPatch) -> dict[str, Any]:
    loader = image_loader()
    images, labels = next(iter(loader))
    source_logits = torch.randn(200, SOURCE)
    return {
        "pretrained": classifier(), "plain_loader": loader, "train_loader": loader, "validation_loader": image_loader(),
        "names": ["cat", "dog", "background"], "images": images, "labels": labels, "share": 0.3,
        "source_logits": source_logits,
        "source_labels": torch.distributions.Categorical(logits=source_logits / 2).sample(),
    }  # fmt: skip


def check_guide(run: Run) -> None:
    first = run.value("The relationship", 0, "relationship")
    assert first.target_classes == ("cat", "dog", "background")
    assert run.value("The relationship", 1, "relationship").supervised.tolist() == [True, True, False]
    assert run.value("Direct and reverse", 0, "relationship").method == "reverse"
    assert run.value("Calibration", 0, "fit").converged
    model = run.value("The model", 1, "model").train()
    assert [layer.training for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)] == [False]
    assert run.value("Before training", 0, "scores").uniform_entropy == pytest.approx(np.log(SOURCE))
    values = run.after["The loss"][0]
    torch.testing.assert_close(values["loss"].detach(), values["target_term"] + 2.3 * values["source_term"])
    assert run.namespace["criterion"].trade_off == pytest.approx(2.3 * 2 / 100)  # the value at the third and last step
    values = run.namespace
    R = values["relationship"].matrix
    expected = F.cross_entropy(values["target_logits"], values["labels"])
    expected = expected + 2.3 * F.cross_entropy(values["source_logits"], R[values["labels"]])
    torch.testing.assert_close(values["loss"], expected)


def distributed(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    loader = image_loader()
    return {"pretrained": classifier(), "dataset": loader.dataset, "loader": loader, "num_classes": TARGET}


def check_distributed(run: Run) -> None:
    values = run.namespace
    everything = DataLoader(values["dataset"], 30)
    alone = ck.learn_relationship(values["pretrained"], everything, TARGET)
    torch.testing.assert_close(values["relationship"].matrix, alone.matrix)
    assert bool(values["loss"].isfinite())


def examples(_: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"relationship": ck.Relationship(torch.tensor([[0.25, 0.75]]), target_classes=("PER",))}


def check_examples(run: Run) -> None:
    assert run.namespace["relationship"].matrix.tolist() == [[0, 0], [0.25, 0.75], [0.25, 0.75]]


# ---- the page on migrating: stand-ins for the other libraries, in NumPy and plain torch -----------------------------


class TllibRelationship:
    """Same interface and results as ``tllib.regularization.co_tuning.Relationship``."""

    def __init__(self, loader: Any, classifier: nn.Module, device: str, cache: str | None = None) -> None:
        if cache is not None and os.path.exists(cache):
            self.relationship = np.load(cache)
            return
        with torch.no_grad():
            logits = np.concatenate([classifier(x.to(device)).double().numpy() for x, _ in loader])
        labels = np.concatenate([y.numpy() for _, y in loader])
        self.relationship = class_means(softmax(logits), labels).astype(np.float32)
        if cache is not None:
            np.save(cache, self.relationship)

    def __getitem__(self, category: Any) -> Any:
        return self.relationship[category]


class TllibCoTuningLoss(nn.Module):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return (-target * F.log_softmax(input, dim=-1)).sum(dim=-1).mean()


def softmax(logits: Any) -> Any:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def class_means(probabilities: Any, labels: Any) -> Any:
    return np.stack([probabilities[labels == t].mean(axis=0) for t in range(labels.max() + 1)])


def newton_scale(logits: Any, labels: Any) -> float:
    """The factor of the logits with the least negative log likelihood, which ``calibrate`` searches for."""
    scale = 1.0
    for _ in range(100):
        p = softmax(scale * logits)
        mean = (p * logits).sum(axis=1)
        slope = (mean - logits[np.arange(len(labels)), labels]).sum()
        step = slope / ((p * logits**2).sum(axis=1) - mean**2).sum()
        scale -= step
        if abs(step) < 1e-14 * scale:
            break
    return float(scale)


def newton_regression(x: Any, labels: Any, inverse_penalty: float) -> Any:
    """The minimum of ``sum of cross entropies + |W|^2 / (2 C)``, without intercept, by Newton's method."""
    classes = labels.max() + 1
    one_hot = np.eye(classes)[labels]
    W = np.zeros((classes, x.shape[1]))

    def objective(W: Any) -> float:
        logits = x @ W.T
        log_sums = np.log(np.exp(logits).sum(axis=1))
        return float((log_sums - (one_hot * logits).sum(axis=1)).sum() + (W**2).sum() / (2 * inverse_penalty))

    for _ in range(200):
        p = softmax(x @ W.T)
        gradient = ((p - one_hot).T @ x + W / inverse_penalty).ravel()
        curvature = np.einsum("nt,tu->ntu", p, np.eye(classes)) - np.einsum("nt,nu->ntu", p, p)
        hessian = np.einsum("ntu,ni,nj->tiuj", curvature, x, x).reshape(gradient.size, gradient.size)
        step = np.linalg.solve(hessian + np.eye(gradient.size) / inverse_penalty, gradient).reshape(W.shape)
        shrink = 1.0
        while shrink > 1e-12 and objective(W - shrink * step) > objective(W):
            shrink /= 2
        W = W - shrink * step
        if np.abs(step).max() < 1e-12:
            break
    return W


def authors_direct(train_logits: Any, train_labels: Any, validation_logits: Any, validation_labels: Any) -> Any:
    logits, labels = (
        np.concatenate([train_logits, validation_logits]),
        np.concatenate([train_labels, validation_labels]),
    )
    return class_means(softmax(logits * SCALE), labels)


def authors_reverse(train_logits: Any, train_labels: Any, validation_logits: Any, validation_labels: Any) -> Any:
    """The authors' computation with converged regressions: the page says that scikit-learn's had not converged."""
    train, validation = softmax(train_logits * SCALE), softmax(validation_logits * SCALE)
    fits = [newton_regression(train, train_labels, C) for C in INVERSE_PENALTIES]
    accuracies = [((validation @ W.T).argmax(axis=1) == validation_labels).mean() for W in fits]
    W = fits[int(np.argmax(accuracies))]
    given_source = softmax(W.T * newton_scale(validation @ W.T, validation_labels))
    joint = (given_source * np.concatenate([train, validation]).mean(axis=0)[:, None]).T
    return joint / joint.sum(axis=1, keepdims=True)


def migrating(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    tllib = types.ModuleType("tllib.regularization.co_tuning")
    tllib.Relationship, tllib.CoTuningLoss = TllibRelationship, TllibCoTuningLoss  # type: ignore[attr-defined]
    authors = types.ModuleType("module.relationship_learning")
    authors.direct_relationship_learning = authors_direct  # type: ignore[attr-defined]
    authors.relationship_learning = authors_reverse  # type: ignore[attr-defined]
    authors.calibrate = lambda logits, labels: newton_scale(  # type: ignore[attr-defined]
        logits.double().numpy(), labels.numpy()
    )
    for stand_in in (tllib, authors):
        parent, _, _ = stand_in.__name__.partition(".")
        for name in (parent, stand_in.__name__.rpartition(".")[0], stand_in.__name__):
            monkeypatch.setitem(sys.modules, name, stand_in)
    loader = image_loader()
    pretrained = classifier()
    x, label_t = next(iter(loader))
    random = np.random.default_rng(0)

    def labelled(rows: int) -> tuple[Any, Any]:
        labels = np.arange(rows) % TARGET
        return random.normal(size=(rows, SOURCE)) + 1.5 * np.eye(SOURCE)[labels], labels

    train, validation = labelled(90), labelled(60)
    logits = torch.randn(200, SOURCE)
    return {
        "loader": loader, "classifier": pretrained, "device": "cpu", "trade_off": 1.7, "x": x, "label_t": label_t,
        "model": ck.CoTuningModel.from_classifier(pretrained, TARGET), "num_target_classes": TARGET,
        "num_source_classes": SOURCE, "train_logits": train[0], "train_labels": train[1],
        "validation_logits": validation[0], "validation_labels": validation[1], "logits": logits,
        "labels": torch.distributions.Categorical(logits=logits / 1.4).sample(),
    }  # fmt: skip


def check_migrating(run: Run) -> None:
    theirs, ours, last = run.after["The training step"]
    torch.testing.assert_close(ours["relationship"].matrix, torch.from_numpy(theirs["relationship"].relationship))
    torch.testing.assert_close(ours["loss"], theirs["loss"])
    loaded = run.value("A relationship that tllib has computed", 0, "criterion")
    torch.testing.assert_close(loaded(ours["y_s"], ours["y_t"], ours["label_t"]), theirs["loss"])
    before, after = (run.value("The direct relationship", block, "relationship") for block in (0, 1))
    assert np.abs(before - after.matrix.numpy()).max() < 1e-7
    before, after = (run.value("The reverse relationship", block, "relationship") for block in (0, 1))
    assert np.abs(before - after.matrix.numpy()).max() < 1e-3
    train, validation = (
        (torch.from_numpy(run.namespace[f"{part}_logits"]), torch.from_numpy(run.namespace[f"{part}_labels"]))
        for part in ("train", "validation")
    )
    after = ck.learn_reverse_relationship(*train, *validation, TARGET, temperature=1 / SCALE, tolerance=1e-9)
    assert np.abs(before - after.matrix.numpy()).max() < 1e-5
    scale, temperature = run.value("Calibration", 0, "scale"), run.value("Calibration", 1, "temperature")
    assert temperature * scale == pytest.approx(1, rel=1e-6)
    expected = F.cross_entropy(theirs["y_t"], theirs["label_t"])
    expected = expected + 2.3 * TllibCoTuningLoss()(theirs["y_s"], torch.from_numpy(last["array"])[theirs["label_t"]])
    torch.testing.assert_close(last["loss"], expected)


PREPARED: dict[str, tuple[Callable[[pytest.MonkeyPatch], dict[str, Any]], Callable[[Run], None]]] = {
    "README.md": (readme, check_readme),
    "docs/guide.md": (guide, check_guide),
    "docs/migrating.md": (migrating, check_migrating),
    "docs/distributed.md": (distributed, check_distributed),
    "docs/examples.md": (examples, check_examples),
}
