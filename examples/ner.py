"""Co-Tuning for named-entity recognition: a masked language model and CoNLL-2003 column files, both by path.

The source classes are the wordpieces of the vocabulary (about 30 000), the source head is the head of the masked
language model, and the target classes are the tags. A kind of entity is translated to the language model's mean
prediction at its tokens in the training set; "O" and special tokens have no source supervision.

    pip install '.[ner]'
    python examples/ner.py --model bert-base-cased/ --train eng.train --validation eng.testa --test eng.testb

``--trade-off 0`` is plain fine-tuning. The authors used 0.7 on CoNLL-2003; their repository
(github.com/thuml/CoTuning, nlp/readme.md) gives test F1 scores of 0.9116, 0.9134 and 0.9131 for three runs with
bert-base-cased, ten epochs and batches of 32 sentences on each of eight GPUs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

try:
    import torch
    from command_line import UserError, device, exit_code, number
    from seqeval.metrics import classification_report, f1_score
    from torch import Tensor, nn
    from torch.nn import functional as F
    from torch.utils.data import DataLoader, Dataset
    from tqdm import tqdm
    from transformers import AutoTokenizer, BertForMaskedLM

    import cotuning_kernels as ck
except ImportError as missing:
    sys.exit(f"ner: {missing}: pip install '.[ner]' in the project's folder.")

IGNORED = -100  # a later piece of a word, or a special token


# ------------------------------------------------------------------------------------------------------------- the data


class Sentence(NamedTuple):
    words: list[str]
    tags: list[str]


def read_conll(path: Path) -> list[Sentence]:
    """Sentences of a column file: the word is the first column, the tag the last, an empty line ends a sentence."""
    sentences, words, tags = [], [], []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): give a CoNLL-2003 column file.") from None
    for number, line in enumerate([*lines, ""], start=1):
        columns = line.split()
        if columns and columns[0] == "-DOCSTART-":
            continue
        if not columns and words:
            sentences.append(Sentence(words, tags))
            words, tags = [], []
        elif len(columns) == 1:
            raise UserError(f"{path}:{number} has one column, {line!r}: expected a word, ..., and its tag.")
        elif columns:
            words.append(columns[0])
            tags.append(columns[-1])
    if not sentences:
        raise UserError(f"{path} has no sentence: give a CoNLL-2003 column file.")
    return sentences


def kind_of(tag: str) -> str | None:
    """The kind of entity of a tag ("B-PER" and "I-PER": "PER"), ``None`` for "O"."""
    return None if tag == "O" else tag.split("-", 1)[-1]


@dataclass
class Tags:
    """The tags of the training set, "O" first, and the kinds of entities in them."""

    tags: list[str]
    kinds: list[str]

    @classmethod
    def of(cls, sentences: Sequence[Sentence]) -> Tags:
        tags = sorted({tag for sentence in sentences for tag in sentence.tags} - {"O"})
        return cls(["O", *tags], sorted({kind for tag in tags if (kind := kind_of(tag)) is not None}))

    def index(self, tag: str) -> int:
        # A tag absent from the training set cannot be learnt; the metric keeps its true name.
        return self.tags.index(tag) if tag in self.tags else 0


class Tokens(Dataset[tuple[dict[str, Tensor], Tensor]]):
    """A sentence's wordpieces, and the label of each first piece of a word; ``IGNORED`` for other pieces."""

    def __init__(self, sentences: Sequence[Sentence], labels: list[list[int]], tokenizer: Any, longest: int) -> None:
        self.labels = labels
        self.encodings = [
            tokenizer(list(sentence.words), is_split_into_words=True, truncation=True, max_length=longest)
            for sentence in sentences
        ]

    def __len__(self) -> int:
        return len(self.encodings)

    def __getitem__(self, i: int) -> tuple[dict[str, Tensor], Tensor]:
        encoding, labels, previous = self.encodings[i], [], None
        for word in encoding.word_ids():
            labels.append(IGNORED if word is None or word == previous else self.labels[i][word])
            previous = word
        inputs = {name: torch.tensor(encoding[name]) for name in ("input_ids", "attention_mask")}
        return inputs, torch.tensor(labels)


def moved(inputs: dict[str, Tensor], place: torch.device | str) -> dict[str, Tensor]:
    return {name: x.to(place) for name, x in inputs.items()}


def padded(batch: list[tuple[dict[str, Tensor], Tensor]]) -> tuple[dict[str, Tensor], Tensor]:
    pad = nn.utils.rnn.pad_sequence
    # Padding has attention 0 and no label, so its wordpiece does not matter.
    inputs = {name: pad([x[name] for x, _ in batch], batch_first=True) for name in batch[0][0]}
    return inputs, pad([labels for _, labels in batch], batch_first=True, padding_value=IGNORED)


# ------------------------------------------------------------------------------------------------------------ the model


class Tagger(nn.Module):
    """A masked language model with a second head for the tags, on the same features."""

    def __init__(self, language_model: BertForMaskedLM, num_tags: int) -> None:
        super().__init__()
        self.encoder = language_model.bert
        self.source_head = language_model.cls
        self.dropout = nn.Dropout(language_model.config.hidden_dropout_prob)
        self.target_head = nn.Linear(language_model.config.hidden_size, num_tags)

    def features(self, inputs: dict[str, Tensor]) -> Tensor:
        features: Tensor = self.dropout(self.encoder(**inputs).last_hidden_state)
        return features


def loss_of(
    model: Tagger,
    inputs: dict[str, Tensor],
    labels: Tensor,
    relationship: Tensor,
    trade_off: float,
    by_chunks: bool = False,
) -> Tensor:
    """Both terms, each the mean over the tokens that count in it.

    The source head, by far the largest layer, only sees the tokens of entities: other tokens have no supervision, so
    the loss would ignore their logits.
    """
    labelled = labels != IGNORED
    features, labels = model.features(inputs)[labelled], labels[labelled]
    loss = F.cross_entropy(model.target_head(features), labels)
    supervised = (relationship != 0).any(dim=1)[labels]
    if trade_off == 0 or not supervised.any():
        return loss
    if by_chunks:  # the logits of all wordpieces exist for a chunk of tokens at a time
        head = model.source_head.predictions
        source_term = ck.functional.linear_source_label_loss(
            head.transform(features[supervised]), head.decoder.weight, head.decoder.bias, labels[supervised],
            relationship,
        )  # fmt: skip
        return loss + trade_off * source_term
    source_logits = model.source_head(features[supervised])
    # The logits are not read again, so their gradient may overwrite them, which halves the memory of the 30k head.
    # (Without a compiled kernel the reference serves, which cannot.)
    source_term = ck.functional.source_label_loss(
        source_logits,
        labels[supervised],
        relationship,
        inplace=ck.backends.select(source_logits.device.type) != "reference",
    )
    return loss + trade_off * source_term


@torch.no_grad()
def predict(model: Tagger, loader: Any, tags: Tags) -> Iterator[list[str]]:
    """The predicted tags of each sentence's words, without truncated ones."""
    model.eval()
    for inputs, labels in loader:
        features = model.features(moved(inputs, model.target_head.weight.device))
        best = model.target_head(features).argmax(dim=-1).cpu()
        for row, row_labels in zip(best, labels, strict=True):
            yield [tags.tags[t] for t in row[row_labels != IGNORED].tolist()]


def evaluate(model: Tagger, sentences: Sequence[Sentence], loader: Any, tags: Tags) -> tuple[float, str]:
    """The F1 score of whole entities (seqeval), and its table by kind. Truncated words count as "O"."""
    truth = [list(sentence.tags) for sentence in sentences]
    found = list(predict(model, loader, tags))
    found = [f + ["O"] * (len(t) - len(f)) for f, t in zip(found, truth, strict=True)]
    return float(f1_score(truth, found)), classification_report(truth, found, digits=4, zero_division=0)


# ---------------------------------------------------------------------------------------------------------- the program


def ner(options: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(options.seed)
    try:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        language_model = BertForMaskedLM.from_pretrained(options.model).to(options.device)
    except (OSError, ValueError) as error:
        raise UserError(f"{options.model} holds no BERT with its tokenizer ({error!s:.200}).") from None
    sets = {name: read_conll(getattr(options, name)) for name in ("train", "validation", "test")}
    tags = Tags.of(sets["train"])
    if not tags.kinds:
        raise UserError(f"{options.train} has no entity: every tag is O.")

    def loader(name: str, labels: list[list[int]], **more: Any) -> DataLoader[Any]:
        data = Tokens(sets[name], labels, tokenizer, options.max_length)
        return DataLoader(data, options.batch_size, collate_fn=padded, **more)

    def tag_labels(name: str) -> list[list[int]]:
        return [[tags.index(tag) for tag in sentence.tags] for sentence in sets[name]]

    kinds: list[list[int]] = [
        [IGNORED if (kind := kind_of(tag)) is None else tags.kinds.index(kind) for tag in sentence.tags]
        for sentence in sets["train"]
    ]
    begun = time.perf_counter()
    of_kinds = ck.learn_relationship(
        language_model,
        loader("train", kinds),
        target_classes=tags.kinds,
        source_classes=tokenizer.convert_ids_to_tokens(range(language_model.config.vocab_size)),
    )
    relationship = of_kinds.regrouped([kind_of(tag) for tag in tags.tags], tags.tags)
    learning_seconds = time.perf_counter() - begun
    for kind in tags.kinds:
        likeliest = ", ".join(f"{piece} {share:.1%}" for piece, share in of_kinds.top_source_classes(kind, k=6))
        print(f"{kind:>6}  {likeliest}")

    model = Tagger(language_model, len(tags.tags)).to(options.device)
    matrix = relationship.matrix.to(options.device)
    optimizer = torch.optim.AdamW(model.parameters(), options.lr, weight_decay=0.01)
    steps = loader("train", tag_labels("train"), shuffle=True)
    total = options.epochs * len(steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total)
    begun = time.perf_counter()
    for epoch in range(options.epochs):
        model.train()
        for inputs, labels in tqdm(steps, desc=f"epoch {epoch + 1}", ncols=80, leave=False):
            inputs, labels = moved(inputs, options.device), labels.to(options.device)
            loss = loss_of(model, inputs, labels, matrix, options.trade_off, options.by_chunks)
            optimizer.zero_grad()
            loss.backward()
            if options.clip > 0:
                nn.utils.clip_grad_norm_(model.parameters(), options.clip)
            optimizer.step()
            schedule.step()
    training_seconds = time.perf_counter() - begun
    result: dict[str, Any] = {
        "trade_off": options.trade_off,
        "seed": options.seed,
        "relationship_seconds": round(learning_seconds, 2),
        "training_seconds": round(training_seconds, 2),
    }
    for name in ("validation", "test"):
        result[f"{name}_f1"], table = evaluate(model, sets[name], loader(name, tag_labels(name)), tags)
    print(f"{table}\nvalidation F1 {result['validation_f1']:.4f}, test F1 {result['test_f1']:.4f}")
    if options.output is not None:
        options.output.write_text(json.dumps(result, indent=2) + "\n")
    return result


def main(arguments: list[str] | None = None) -> int:
    return exit_code("ner", lambda: ner(parse(arguments)))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of a BertForMaskedLM checkpoint with its tokenizer")
    for name in ("train", "validation", "test"):
        parser.add_argument(f"--{name}", type=Path, required=True, metavar="FILE", help="CoNLL-2003 column file")
    parser.add_argument(
        "--trade-off", type=number(float, 0), default=0.7, metavar="X", help="weight of the source term"
    )
    parser.add_argument("--epochs", type=number(int, 1), default=10, metavar="N", help="passes over the training set")
    parser.add_argument("--batch-size", type=number(int, 1), default=32, metavar="N", help="sentences")
    parser.add_argument(
        "--lr", type=number(float, 0), default=5e-5, metavar="X", help="of AdamW, falling linearly to 0"
    )
    parser.add_argument(
        "--clip", type=number(float, 0), default=1.0, metavar="X", help="largest norm of all gradients; 0: any"
    )
    parser.add_argument(
        "--by-chunks", action="store_true", help="never hold the logits of all tokens: less memory for large batches"
    )
    parser.add_argument(
        "--max-length", type=number(int, 3), default=128, metavar="N", help="wordpieces of a sentence at most"
    )
    parser.add_argument(
        "--seed", type=number(int, 0, 2**63 - 1), default=0, metavar="N", help="of the new head, dropout and batches"
    )
    parser.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the scores there, as JSON")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
