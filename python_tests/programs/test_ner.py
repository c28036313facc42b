"""The named-entity example, offline: a tiny BERT, trained here on the sentences below.

The scores show that the program works; they say nothing about BERT, CoNLL-2003 or Co-Tuning.
"""

from __future__ import annotations

import importlib
import itertools
import json
import random
import re
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cotuning_kernels import backends
from cotuning_kernels.backends.registry import REGISTRY
from support.paths import EXAMPLES

PEOPLE = [
    "Anna",
    "Boris",
    "Clara",
    "David",
    "Elena",
    "Felix",
    "Greta",
    "Hugo",
    "Irma",
    "Jonas",
    "Karla",
    "Leo",
    "Maria",
    "Nils",
    "Olga",
    "Paul",
]
FAMILIES = ["Adler", "Brandt", "Cordes", "Dietz", "Ebert", "Fuchs", "Gruber", "Hahn", "Imhoff", "Jansen"]
PLACES = [
    "Athens",
    "Berlin",
    "Cairo",
    "Dublin",
    "Essen",
    "Florence",
    "Geneva",
    "Havana",
    "Istanbul",
    "Jakarta",
    "Kyoto",
    "Lima",
]
FIRMS = ["Acme", "Borealis", "Cygnus", "Deltaworks", "Eastline", "Fairmount", "Globex", "Hexa"]
TEMPLATES = [
    "<PER> lives in <LOC> .",
    "<PER> <FAM> works for <ORG> in <LOC> .",
    "yesterday <PER> met <PER> at the harbour of <LOC> .",
    "the shares of <ORG> fell by two percent .",
    "<ORG> opens a new office in <LOC> next year .",
    "the train from <LOC> to <LOC> was late again .",
    "<PER> <FAM> of <ORG> did not answer our letter .",
    "it rained all day , and nobody went out .",
]
WORDS = {"PER": PEOPLE, "FAM": FAMILIES, "LOC": PLACES, "ORG": FIRMS}
Sentence = list[tuple[str, str]]


def sentences(count: int, draw: random.Random) -> list[Sentence]:
    def written_out(template: str) -> Iterator[tuple[str, str]]:
        for word in template.split():
            slot = word.strip("<>")
            if slot == word:
                yield word, "O"
            else:
                yield draw.choice(WORDS[slot]), "I-PER" if slot == "FAM" else f"B-{slot}"

    return [list(written_out(draw.choice(TEMPLATES))) for _ in range(count)]


def write_conll(path: Path, data: list[Sentence]) -> None:
    blocks = ["\n".join(f"{word} NN I-NP {tag}" for word, tag in sentence) for sentence in data]
    path.write_text("-DOCSTART- -X- -X- O\n\n" + "\n\n".join(blocks) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def ner() -> Iterator[ModuleType]:
    """The example as a module."""
    for library in ("transformers", "seqeval"):
        pytest.importorskip(library, reason=f"{library} is not installed: pip install '.[ner]'")
    sys.path.insert(0, str(EXAMPLES))
    yield importlib.import_module("ner")
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    draw = random.Random(1)
    for name, count in (("train", 60), ("validation", 40), ("test", 80)):
        write_conll(folder / name, sentences(count, draw))
    return folder


@pytest.fixture(scope="module")
def tiny_bert(ner: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A masked language model with two layers, trained for some seconds; some words are two wordpieces."""
    from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("tiny_bert_of_the_tests")
    words = {word for word in " ".join(TEMPLATES).split() if "<" not in word}
    names = set(itertools.chain(PEOPLE, FAMILIES, PLACES, FIRMS))
    # Long names are two pieces, like rare words.
    pieces = {piece for name in names for piece in ([name] if len(name) < 7 else [name[:4], "##" + name[4:]])}
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(words | pieces)]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"), do_lower_case=False)
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(
        vocab_size=len(vocabulary), hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
        max_position_embeddings=40, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    ))  # fmt: skip
    text = [" ".join(word for word, _ in sentence) for sentence in sentences(600, random.Random(2))]
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(150):
        batch = tokenizer(text[step * 32 % 576 :][:32], return_tensors="pt", padding=True)
        masked = (torch.rand(batch["input_ids"].shape) < 0.2) & (batch["input_ids"] > 4)
        inputs = batch["input_ids"].masked_fill(masked & (torch.rand(masked.shape) < 0.8), 4)
        logits = model(input_ids=inputs, attention_mask=batch["attention_mask"]).logits
        loss = F.cross_entropy(logits[masked], batch["input_ids"][masked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def arguments(tiny_bert: Path, corpus: Path, *more: str) -> list[str]:
    files = [f"--{name}={corpus / name}" for name in ("train", "validation", "test")]
    return [f"--model={tiny_bert}", *files, "--batch-size=8", "--epochs=8", "--lr=2e-3", *more]


@pytest.mark.parametrize(("trade_off", "flags"), [("0", []), ("0.7", []), ("0.7", ["--by-chunks"])])
def test_it_finds_entities(
    ner: ModuleType,
    tiny_bert: Path,
    corpus: Path,
    tmp_path: Path,
    trade_off: str,
    flags: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "result.json"
    more = (f"--trade-off={trade_off}", f"--output={output}", *flags)
    assert ner.main(arguments(tiny_bert, corpus, *more)) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^ +LOC  .*%", shown, re.MULTILINE)
    result = json.loads(output.read_text())
    assert result["trade_off"] == float(trade_off)
    assert result["test_f1"] > 0.85
    assert result["validation_f1"] > 0.85


def test_untrained_it_does_not(ner: ModuleType, tiny_bert: Path, corpus: Path, tmp_path: Path) -> None:
    """Without training the score is low."""
    output = tmp_path / "result.json"
    assert ner.main(arguments(tiny_bert, corpus, "--lr=0", f"--output={output}")) == 0
    assert json.loads(output.read_text())["test_f1"] < 0.5


def test_the_relationship_knows_the_kinds(ner: ModuleType, tiny_bert: Path, corpus: Path) -> None:
    """The language model mostly predicts places at places, and so on; "O" has no supervision."""
    from transformers import AutoTokenizer, BertForMaskedLM

    import cotuning_kernels as ck

    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    data = ner.read_conll(corpus / "train")
    tags = ner.Tags.of(data)
    assert (tags.tags, tags.kinds) == (["O", "B-LOC", "B-ORG", "B-PER", "I-PER"], ["LOC", "ORG", "PER"])
    labels = [[-100 if tag == "O" else tags.kinds.index(tag[2:]) for tag in sentence.tags] for sentence in data]
    loader = torch.utils.data.DataLoader(ner.Tokens(data, labels, tokenizer, 32), 16, collate_fn=ner.padded)
    names = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    model = BertForMaskedLM.from_pretrained(tiny_bert)
    found = ck.learn_relationship(model, loader, target_classes=tags.kinds, source_classes=names, progress=False)
    assert found.counts is not None
    assert found.counts.tolist() == [sum(row.count(kind) for row in labels) for kind in range(3)]
    firsts = {kind: {name if len(name) < 7 else name[:4] for name in words} for kind, words in WORDS.items()}
    firsts["PER"] |= firsts["FAM"]
    for kind in tags.kinds:
        likeliest = [name for name, _ in found.top_source_classes(kind, k=4)]
        assert set(likeliest) <= firsts[kind]
    of_tags = found.regrouped([ner.kind_of(tag) for tag in tags.tags], tags.tags)
    assert not of_tags.supervised[0]
    assert torch.equal(of_tags.matrix[3], of_tags.matrix[4])


def test_labels_stand_at_the_first_piece_of_a_word(ner: ModuleType, tiny_bert: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    sentence = ner.Sentence(["Deltaworks", "opens"], ["B-ORG", "O"])
    inputs, labels = ner.Tokens([sentence], [[1, 0]], tokenizer, 32)[0]
    assert tokenizer.convert_ids_to_tokens(inputs["input_ids"]) == ["[CLS]", "Delt", "##aworks", "opens", "[SEP]"]
    assert labels.tolist() == [-100, 1, -100, 0, -100]


@pytest.mark.parametrize("by_chunks", [True, False])
@pytest.mark.parametrize("kernels", [True, False])
def test_the_loss_is_the_unfused_one(
    by_chunks: bool, kernels: bool, ner: ModuleType, tiny_bert: Path, draw: torch.Generator
) -> None:
    """Loss and gradients against PyTorch's own operations on all tokens, with and without kernels."""
    from transformers import BertForMaskedLM

    inputs: dict[str, Any] = {"input_ids": torch.randint(5, 50, (3, 7), generator=draw)}
    labels = torch.randint(0, 5, (3, 7), generator=draw)
    labels[0, :3] = labels[2, 5] = -100
    language_model = BertForMaskedLM.from_pretrained(tiny_bert)
    relationship = torch.rand(5, language_model.config.vocab_size, generator=draw).softmax(1)
    relationship[0] = 0
    gradients = []
    model: nn.Module = ner.Tagger(language_model, 5).eval()
    with nullcontext() if kernels else REGISTRY.override(missing={"cpp": "it was not built"}):
        assert kernels or backends.select("cpu") == "reference"
        ours = ner.loss_of(model, inputs, labels, relationship, 0.7, by_chunks)
    features = model.features(inputs)
    counted = labels > 0
    unfused = F.cross_entropy(model.target_head(features).flatten(0, 1), labels.flatten())
    unfused = unfused + 0.7 * F.cross_entropy(model.source_head(features)[counted], relationship[labels[counted]])
    torch.testing.assert_close(ours, unfused, rtol=1e-5, atol=0)
    for loss in (ours, unfused):
        gradients.append(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
    for mine, theirs in zip(*gradients, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)


def test_everything_goes_to_the_device(
    ner: ModuleType, tiny_bert: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU under a second name serves as the device: what is sent there, and what is not."""
    modules: list[str] = []
    tensors: list[torch.Tensor] = []
    module_to, tensor_to = nn.Module.to, torch.Tensor.to

    def sent_module(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        modules.extend([type(self).__name__] if str(args[0]) == "cpu:0" else [])
        return module_to(self, *args, **kwargs)

    def sent(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        # Evaluation takes the device from the model's weights, which report it as "cpu".
        arrived = tensor_to(self, *args, **kwargs)
        tensors.extend([arrived] if args and str(args[0]) in ("cpu", "cpu:0") else [])
        return arrived

    seen: list[torch.Tensor] = []
    features = ner.Tagger.features
    monkeypatch.setattr(
        ner.Tagger, "features", lambda self, inputs: seen.append(inputs["input_ids"]) or features(self, inputs)
    )
    monkeypatch.setattr(nn.Module, "to", sent_module)
    monkeypatch.setattr(torch.Tensor, "to", sent)
    assert ner.main(arguments(tiny_bert, corpus, "--epochs=1", "--device=cpu:0")) == 0
    assert {"BertForMaskedLM", "Tagger"} <= set(modules)
    there = {id(x) for x in tensors}
    assert seen
    assert all(id(x) in there for x in seen)  # every batch, in training and in testing
    vocabulary = len((tiny_bert / "vocab.txt").read_text().splitlines())
    assert any(x.shape == (5, vocabulary) for x in tensors)  # the relationship


@pytest.mark.parametrize("name", ["meta", "gpu", "cuda:77"])
def test_devices_that_do_not_compute_are_refused(
    ner: ModuleType, tiny_bert: Path, corpus: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        ner.main(arguments(tiny_bert, corpus, f"--device={name}"))
    assert f"argument --device: '{name}' is no device of this torch (" in capsys.readouterr().err


def test_what_is_wrong_is_said(
    ner: ModuleType, tiny_bert: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").write_text("\n\n")
    (tmp_path / "words").write_text("Anna\nlives\n")
    (tmp_path / "no_entity").write_text("it O\nrained O\n")
    for name, message in (
        ("empty", "has no sentence"),
        ("words", "words:1 has one column, 'Anna'"),
        ("no_entity", "has no entity: every tag is O"),
        ("missing", "cannot be read"),
    ):
        assert ner.main(arguments(tiny_bert, corpus, f"--train={tmp_path / name}")) == 1
        assert message in capsys.readouterr().err
    assert ner.main(arguments(tmp_path, corpus)) == 1
    assert "holds no BERT with its tokenizer" in capsys.readouterr().err
