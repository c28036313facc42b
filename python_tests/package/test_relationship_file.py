"""Relationship files: round trips, refused files, and interrupted saves."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from cotuning_kernels import tensor_file
from cotuning_kernels.relationship import Relationship, RelationshipFileError
from cotuning_kernels.relationship.file import RELATIONSHIP_FILE
from support.scripts import run_script


def random_relationship(draw: torch.Generator, rows: int = 3, columns: int = 5, **fields: Any) -> Relationship:
    matrix = torch.softmax(2 * torch.randn(rows, columns, generator=draw), 1)
    matrix[1] = 0
    return Relationship(matrix, **fields)


def full_relationship(draw: torch.Generator) -> Relationship:
    return random_relationship(
        draw,
        target_classes=["chat", "chien", "été"],
        source_classes=["a", "b", 'quote"', "line\nbreak", "\ud800 alone"],
        method="direct",
        temperature=1.2345678901234567,
        counts=torch.tensor([2**40, 0, 7]),
        metadata={"source_model": "EfficientNet", "Anmerkung": "größer"},
    )


def same(one: Relationship, other: Relationship) -> bool:
    """Every field, the tensors bit for bit."""

    def equal(a: Tensor | None, b: Tensor | None) -> bool:
        if a is None or b is None:
            return a is b
        return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()

    return (
        equal(one.matrix, other.matrix)
        and equal(one.counts, other.counts)
        and (one.target_classes, one.source_classes) == (other.target_classes, other.source_classes)
        and (one.method, one.temperature, one.metadata) == (other.method, other.temperature, other.metadata)
    )


def save_bytes(relationship: Relationship, path: Path) -> bytes:
    relationship.save(path)
    return path.read_bytes()


def write_safetensors(path: Path, tensors: dict[str, Tensor], **metadata: str) -> None:
    path.write_bytes(safetensors.torch.save(tensors, metadata))


# ---------------------------------------------------------------------------------------------------------- round trips


def test_everything_comes_back(tmp_path: Path, draw: torch.Generator) -> None:
    path = tmp_path / "r.safetensors"
    saved = full_relationship(draw)
    saved.save(path)
    assert same(Relationship.load(path), saved)
    saved.save(str(path))
    assert same(Relationship.load(str(path)), saved)
    assert os.listdir(tmp_path) == ["r.safetensors"]  # no temporary is left
    plain = random_relationship(draw)
    plain.save(path)
    assert same(Relationship.load(path), plain)


def test_the_comparison_of_relationships_can_fail(draw: torch.Generator) -> None:
    one = full_relationship(draw)
    matrix = one.matrix.clone()
    matrix[0, 0] = torch.nextafter(matrix[0, 0], torch.tensor(2.0))
    fields = {name: getattr(one, name) for name in one.__dataclass_fields__}
    assert same(one, Relationship(**fields))
    for change in (
        {"matrix": matrix}, {"matrix": one.matrix.double()}, {"counts": None}, {"counts": one.counts + 1},
        {"target_classes": None}, {"source_classes": list("abcde")}, {"method": "reverse"}, {"temperature": 1.0},
        {"metadata": {}},
    ):  # fmt: skip
        assert not same(one, Relationship(**(fields | change)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_every_dtype_comes_back(dtype: torch.dtype, tmp_path: Path, draw: torch.Generator) -> None:
    saved = random_relationship(draw).to(dtype)
    saved.save(tmp_path / "r")
    loaded = Relationship.load(tmp_path / "r")
    assert loaded.matrix.dtype == dtype
    assert torch.equal(loaded.matrix, saved.matrix)


def test_views_of_larger_tensors_are_saved_by_themselves(tmp_path: Path) -> None:
    large = torch.full((100, 8), 0.25)
    Relationship(large[3:5, ::2]).save(tmp_path / "r")
    assert (tmp_path / "r").stat().st_size < 1000
    assert torch.equal(Relationship.load(tmp_path / "r").matrix, torch.full((2, 4), 0.25))


def test_other_programs_can_read_it(tmp_path: Path, draw: torch.Generator) -> None:
    saved = full_relationship(draw)
    saved.save(tmp_path / "r.safetensors")
    with safe_open(tmp_path / "r.safetensors", framework="numpy") as file:
        assert (file.get_tensor("matrix") == saved.matrix.numpy()).all()
        metadata = file.metadata()
    assert metadata["format"] == "cotuning_kernels.relationship"
    assert json.loads(metadata["record"])["target_classes"] == ["chat", "chien", "été"]


@settings(deadline=None, max_examples=40)
@given(names=st.lists(st.text(), min_size=3, max_size=3), metadata=st.dictionaries(st.text(), st.text(), max_size=3))
def test_any_text_comes_back(
    names: list[str], metadata: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "any-text.safetensors"
    saved = Relationship(torch.eye(3), names, names, metadata=metadata)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)  # fsync is slow
        saved.save(path)
    assert same(Relationship.load(path), saved)


def test_an_old_file_is_replaced_and_a_link_still_points_to_it(tmp_path: Path, draw: torch.Generator) -> None:
    (tmp_path / "elsewhere").mkdir()
    real, link = tmp_path / "elsewhere" / "r", tmp_path / "link"
    random_relationship(draw).save(real)
    link.symlink_to(real)
    newer = full_relationship(draw)
    newer.save(link)
    assert link.is_symlink()
    assert same(Relationship.load(real), newer)


def test_the_file_has_the_usual_permissions(tmp_path: Path, draw: torch.Generator) -> None:
    (tmp_path / "ordinary").touch()
    random_relationship(draw).save(tmp_path / "r")
    assert stat.S_IMODE((tmp_path / "r").stat().st_mode) == stat.S_IMODE((tmp_path / "ordinary").stat().st_mode)


# -------------------------------------------------------------------------------------------------------- refused files


def check_refused_or_same(path: Path, content: bytes, saved: Relationship) -> bool:
    """Whether ``content`` is refused; if not, it must equal ``saved``. Any other exception passes through."""
    path.write_bytes(content)
    refusal, loaded = "", None
    try:
        loaded = Relationship.load(path)
    except RelationshipFileError as error:
        refusal = str(error)
    assert (loaded is not None and same(loaded, saved)) or str(path) in refusal
    return loaded is None


def test_a_file_cut_anywhere_is_refused(tmp_path: Path, draw: torch.Generator) -> None:
    saved = full_relationship(draw)
    content = save_bytes(saved, tmp_path / "r")
    for length in range(len(content)):
        assert check_refused_or_same(tmp_path / "cut", content[:length], saved), f"cut to {length} bytes"
    assert not check_refused_or_same(tmp_path / "whole", content, saved)
    assert check_refused_or_same(tmp_path / "longer", content + b"\0", saved)


def test_a_flipped_bit_never_gives_another_relationship(tmp_path: Path, draw: torch.Generator) -> None:
    saved = full_relationship(draw)
    content = save_bytes(saved, tmp_path / "r")
    refused = 0
    for offset in range(len(content)):
        flipped = bytearray(content)
        flipped[offset] ^= 1 << int(torch.randint(0, 8, (), generator=draw))
        refused += check_refused_or_same(tmp_path / "flipped", bytes(flipped), saved)
    assert refused >= len(content) - 16  # the header is padded with a few spaces


def test_without_the_checksum_a_flipped_bit_would_be_another_relationship(
    tmp_path: Path, draw: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plants the fault that the test above must catch."""
    monkeypatch.setattr(tensor_file, "_digest", lambda text, tensors: "constant")
    saved = full_relationship(draw)
    content = bytearray(save_bytes(saved, tmp_path / "r"))
    content[8 + int.from_bytes(content[:8], "little")] ^= 1  # the first byte after the header: a count
    with pytest.raises(AssertionError):
        check_refused_or_same(tmp_path / "flipped", bytes(content), saved)


def header_only(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"is not a safetensors file \(0 bytes"),
        (b"1234567", r"is not a safetensors file \(7 bytes"),
        (b"class,probability\ncat,0.5\n" * 9, "is not a safetensors file"),
        (b"\x80\x02}q\x00." * 20, "is not a safetensors file"),  # a pickle
        (b"PK\x03\x04" + bytes(100), "is not a safetensors file"),  # torch.save
        (b"\xff" * 64, "is not a safetensors file"),
        (struct.pack("<Q", 10**7) + b"{}", "header should be 10000000 bytes, but the whole file has 10"),
        (header_only(b"[" * 100_000), "header is not JSON"),
        (header_only(b"not json at all"), "header is not JSON"),
        (header_only(b"\xff\xfe{}"), "header is not JSON"),
        (header_only(b"[1, 2]"), "not a relationship"),
        (header_only(b"{}"), r"not a relationship \(format None"),
        (header_only(b'{"__metadata__": 3}'), "not a relationship"),
        (header_only(b'{"__metadata__": {"format": "cotuning_kernels.relationship"}}'), "format version is None"),
        (
            header_only(b'{"__metadata__": {"format": "cotuning_kernels.relationship", "version": "1"}}'),
            "does not match its checksum",
        ),
        (
            header_only(
                b'{"__metadata__": {"format": "cotuning_kernels.relationship", "version": "1", "record": 5},'
                b'"matrix":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}'
            ),
            "is damaged or truncated",
        ),
    ],
)
def test_foreign_and_garbled_files(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(RelationshipFileError, match=message) as caught:
        Relationship.load(path)
    assert str(path) in str(caught.value)


def test_foreign_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"weight": torch.ones(3)}, format="pt")
    with pytest.raises(RelationshipFileError, match=r"not a relationship \(format 'pt', expected"):
        Relationship.load(path)


def test_a_large_foreign_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"weight": torch.ones(100_000)}, format="pt")
    monkeypatch.setattr(safetensors.torch, "load", lambda content: pytest.fail("it was read"))
    with pytest.raises(RelationshipFileError, match="not a relationship"):
        Relationship.load(path)


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("2", r"version 2, written by a newer cotuning_kernels; this one reads up to 1: pip install --upgrade"),
        ("one", "format version is 'one', not 1"),
        ("0", "format version is '0'"),
        ("²", "format version is"),
        ("9" * 5000, "format version is '999.*, not 1; learn"),
    ],
)
def test_versions(version: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "r"
    write_safetensors(path, {"matrix": torch.eye(2)}, format="cotuning_kernels.relationship", version=version)
    with pytest.raises(RelationshipFileError, match=message):
        Relationship.load(path)


RECORD = {"target_classes": None, "source_classes": None, "method": "direct", "temperature": 1.0, "metadata": {}}


@pytest.mark.parametrize(
    ("tensors", "record", "message"),
    [
        ({}, RECORD, "KeyError: 'matrix'"),
        ({"matrix": torch.eye(2)}, {}, "KeyError: 'target_classes'"),
        ({"matrix": torch.ones(2)}, RECORD, "expected .*N_t, N_s"),
        ({"matrix": torch.ones(2, 2)}, RECORD, "sums to 2"),
        ({"matrix": torch.ones(2, 2).int()}, RECORD, "torch.int32"),
        ({"matrix": torch.tensor([[torch.nan, 1]])}, RECORD, "is nan"),
        ({"matrix": torch.ones(0, 0)}, RECORD, r"\(0, 0\)"),
        ({"matrix": torch.eye(2), "counts": torch.ones(3).long()}, RECORD, "counts is"),
        ({"matrix": torch.eye(2)}, RECORD | {"target_classes": ["a"]}, "1 names, expected 2"),
        (
            {"matrix": torch.eye(2)},
            RECORD | {"target_classes": {"a": 1, "b": 2}, "source_classes": 5},
            "source_classes",
        ),
        ({"matrix": torch.eye(2)}, RECORD | {"method": ["direct"]}, "method is"),
        ({"matrix": torch.eye(2)}, RECORD | {"temperature": None}, "temperature is None"),
        ({"matrix": torch.eye(2)}, RECORD | {"temperature": 10**400}, "temperature is 1000"),
        ({"matrix": torch.eye(2)}, RECORD | {"metadata": [1]}, "metadata is"),
        ({"matrix": torch.eye(2)}, [1, 2], "its record is a list"),
    ],
)
def test_a_whole_file_with_the_wrong_things_in_it(
    tensors: dict[str, Tensor], record: Any, message: str, tmp_path: Path
) -> None:
    RELATIONSHIP_FILE.write(tmp_path / "r", tensors, record)
    with pytest.raises(RelationshipFileError, match=message) as caught:
        Relationship.load(tmp_path / "r")
    assert str(tmp_path / "r") in str(caught.value)


def write_record_as(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the writer use ``text`` as the record. Only the header is dumped with options."""
    dumps = json.dumps
    monkeypatch.setattr(tensor_file.json, "dumps", lambda x, **options: dumps(x, **options) if options else text)


def test_deeply_nested_json_does_not_end_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = "[" * 100_000 + "]" * 100_000
    write_record_as(deep, monkeypatch)
    RELATIONSHIP_FILE.write(tmp_path / "r", {"matrix": torch.eye(2)}, {})
    with pytest.raises(RelationshipFileError, match="its record is not JSON"):
        Relationship.load(tmp_path / "r")


def test_a_temperature_of_thousands_of_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = json.dumps(RECORD).replace("1.0", "9" * 5000)
    write_record_as(record, monkeypatch)
    RELATIONSHIP_FILE.write(tmp_path / "r", {"matrix": torch.eye(2)}, {})
    with pytest.raises(RelationshipFileError, match="its record is not JSON"):
        Relationship.load(tmp_path / "r")


def test_paths_that_are_not_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing does not exist"):
        Relationship.load(tmp_path / "missing")
    with pytest.raises(RelationshipFileError, match="is not a regular file"):
        Relationship.load(tmp_path)
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    with pytest.raises(RelationshipFileError, match="pipe is not a regular file"):
        Relationship.load(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="dangling"):
        Relationship.load(tmp_path / "dangling")


def test_a_long_header_is_refused_before_it_is_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """33 million lists in a header of 99 MB took 2.8 GB."""
    path = tmp_path / "bomb"
    path.write_bytes(header_only(b"[" + b"[]," * (6 << 20) + b"[]]"))
    monkeypatch.setattr(tensor_file.json, "loads", lambda text: pytest.fail("it was parsed"))
    with pytest.raises(RelationshipFileError, match=r"not the length of a header of at most 16777216\)"):
        Relationship.load(path)


def test_a_header_that_load_would_refuse_is_not_saved(tmp_path: Path) -> None:
    relationship = Relationship(torch.eye(2), metadata={"notes": "x" * (16 << 20)})
    with pytest.raises(ValueError, match=r"take 16777[0-9]{3} bytes, expected at most 16777216; shorten the metadata"):
        relationship.save(tmp_path / "r")
    assert os.listdir(tmp_path) == []


def test_long_names_of_many_classes_come_back(tmp_path: Path) -> None:
    """As many as in ImageNet-21k, each as long as its longest, with characters outside ASCII."""
    names = [f"{i:05}" + "é" * 100 for i in range(21841)]
    saved = Relationship(torch.full((1, 21841), 1 / 21841), source_classes=names)
    saved.save(tmp_path / "r")
    assert Relationship.load(tmp_path / "r").source_classes == tuple(names)


_SAVED = """
import sys, torch
from cotuning_kernels import Relationship
r = Relationship(torch.eye(3), ["a", "b", "c"], counts=torch.tensor([1, 2, 3]), metadata={"a": "1", "b": "2"})
r.save(sys.argv[1])
"""


def test_every_process_saves_the_same_bytes(tmp_path: Path) -> None:
    """The writer of safetensors does not: it orders metadata by a hash table with a new seed in each process."""
    for name in "123":
        done = run_script(_SAVED, str(tmp_path / name))
        assert done.returncode == 0, done.stderr
    assert len({(tmp_path / name).read_bytes() for name in "123"}) == 1


def test_a_file_of_the_first_release_comes_back(tmp_path: Path) -> None:
    """Version 1 as safetensors' own writer laid it out."""
    matrix, text = torch.tensor([[0.25, 0.75]]), json.dumps(RECORD)
    metadata = {"format": "cotuning_kernels.relationship", "version": "1", "record": text}
    metadata["sha256"] = "8a01547474024555e1a0b34d8397e327bcd4c240a19c8f9237afa3b31161c054"
    write_safetensors(tmp_path / "r", {"matrix": matrix}, **metadata)
    assert torch.equal(Relationship.load(tmp_path / "r").matrix, matrix)


def test_paths_that_cannot_be_written(tmp_path: Path, draw: torch.Generator) -> None:
    relationship = random_relationship(draw)
    with pytest.raises(IsADirectoryError, match="is a directory; give the name of a file"):
        relationship.save(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        relationship.save(tmp_path / "nowhere" / "r")
    assert os.listdir(tmp_path) == []


# -------------------------------------------------------------------------------------------------------- interruptions


class Interruption(BaseException):
    """Like KeyboardInterrupt, not an Exception."""


def interrupt(*arguments: Any, **options: Any) -> None:
    raise Interruption


def check_save_is_all_or_nothing(
    save: Callable[[Relationship, Path], None], interrupted: str, folder: Path, draw: torch.Generator
) -> None:
    """A ``save`` interrupted in a function of ``os`` leaves the old file unchanged, and no other file."""
    old, new = full_relationship(draw), random_relationship(draw)
    path = folder / "r"
    content = save_bytes(old, path)
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Interruption):
        patch.setattr(os, interrupted, interrupt)
        save(new, path)
    assert path.read_bytes() == content
    assert os.listdir(folder) == ["r"]


@pytest.mark.parametrize("interrupted", ["fsync", "replace"])
def test_an_interrupted_save_leaves_the_old_file(interrupted: str, tmp_path: Path, draw: torch.Generator) -> None:
    check_save_is_all_or_nothing(lambda relationship, path: relationship.save(path), interrupted, tmp_path, draw)


def save_in_place(relationship: Relationship, path: Path) -> None:
    safetensors.torch.save_file({"matrix": relationship.matrix}, path)


def save_and_leave_the_temporary(relationship: Relationship, path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    safetensors.torch.save_file({"matrix": relationship.matrix}, temporary)
    os.replace(temporary, path)


@pytest.mark.parametrize("broken", [save_in_place, save_and_leave_the_temporary])
def test_the_check_of_interrupted_saves_catches_a_careless_one(
    broken: Callable[[Relationship, Path], None], tmp_path: Path, draw: torch.Generator
) -> None:
    with pytest.raises(AssertionError):
        check_save_is_all_or_nothing(broken, "replace", tmp_path, draw)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_an_error_of_the_system_passes_through(
    call: str, tmp_path: Path, draw: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space left"):
        random_relationship(draw).save(tmp_path / "r")
    assert os.listdir(tmp_path) == []


def test_the_file_is_on_the_disk_before_it_gets_its_name(
    tmp_path: Path, draw: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(descriptor: int) -> None:
        calls.append("directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def recorded_replace(source: Path, target: Path) -> None:
        calls.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    random_relationship(draw).save(tmp_path / "r")
    assert calls == ["file", "replace", "directory"]


# A parent forks a child that saves in a loop, kills it at a random moment and inspects the folder; many times.
_KILLED = """
import json, os, random, signal, sys, time
import torch
from cotuning_kernels.relationship import Relationship, RelationshipFileError
torch.set_num_threads(1)
folder, careless, rounds, seed = sys.argv[1], sys.argv[2] == "careless", int(sys.argv[3]), int(sys.argv[4])
if careless:
    def replace(source, target):  # copies in pieces instead of renaming
        with open(source, "rb") as file, open(target, "wb") as out:
            while piece := file.read(4096):
                out.write(piece)
                out.flush()
                time.sleep(0.0001)
        os.unlink(source)
    os.replace = replace
os.fsync = lambda descriptor: time.sleep(0.002)  # on a fast disk too, most of the time is between write and rename
random.seed(seed)
path = os.path.join(folder, "r")
both = []
for shift in (0, 1):
    matrix = torch.zeros(60, 1000)
    matrix[:, shift] = 1
    both.append(Relationship(matrix, metadata={"which": str(shift)}))
both[0].save(path)
report = {"intact": 0, "damaged": 0, "in the middle": 0}
for _ in range(rounds):
    child = os.fork()
    if child == 0:
        while True:
            for relationship in both:
                relationship.save(path)
    time.sleep(random.uniform(0.002, 0.02))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    for name in os.listdir(folder):
        if name != "r":
            report["in the middle"] += 1
            os.unlink(os.path.join(folder, name))
    try:
        loaded = Relationship.load(path)
        which = int(loaded.metadata["which"])
        assert torch.equal(loaded.matrix, both[which].matrix)
        report["intact"] += 1
    except RelationshipFileError:
        report["damaged"] += 1
json.dump(report, sys.stdout)
"""


def killed_saves(folder: Path, way: str, rounds: int, seed: int) -> dict[str, int]:
    done = run_script(_KILLED, str(folder), way, str(rounds), str(seed))
    assert done.returncode == 0, done.stderr
    report: dict[str, int] = json.loads(done.stdout)
    return report


def test_a_killed_process_leaves_a_whole_file(tmp_path: Path, seed: int) -> None:
    report = killed_saves(tmp_path, "careful", 40, seed)
    assert report["intact"] == 40
    assert report["in the middle"] > 0  # some were killed between the first byte and the rename


def test_the_test_of_killed_processes_catches_a_careless_save(tmp_path: Path, seed: int) -> None:
    assert killed_saves(tmp_path, "careless", 20, seed)["damaged"] > 0
