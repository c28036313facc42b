"""Every recipe in ``examples/`` runs, on a few real images, and learns something."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest
import torch

from support.paths import EXAMPLES

RECIPES = {
    "pytorch": [],
    "timm": ["timm"],
    "transformers": ["transformers", "accelerate"],
    "lightning": ["lightning"],
}


@pytest.fixture(autouse=True)
def examples_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))


@pytest.fixture
def fashion_mnist() -> Iterator[None]:
    """The images, downloaded once per checkout (31 MB)."""
    from command_line import UserError
    from demo_data import fetch_fashion_mnist
    from recipe_fashion import CACHE

    CACHE.mkdir(exist_ok=True)
    try:
        fetch_fashion_mnist(CACHE)
    except UserError as error:
        pytest.skip(f"no Fashion-MNIST: {error}")
    return


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_recipe_learns(name: str, fashion_mnist: None) -> None:
    for library in RECIPES[name]:
        try:
            importlib.import_module(library)
        except ImportError as error:
            pytest.skip(f"{library} cannot be imported ({error}): pip install '.[recipes]'")
    recipe = importlib.import_module(f"recipe_{name}")
    state = torch.random.get_rng_state()
    try:
        trained, untrained = recipe.main(), recipe.main(epochs=0)
    finally:
        torch.random.set_rng_state(state)
    # Three classes: 33% is chance. The untrained head on pretrained features shows that the score comes from training.
    assert trained > 0.75
    assert untrained < trained - 0.1


def test_a_recipe_refuses_options(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = importlib.import_module("recipe_fashion")
    monkeypatch.setattr("sys.argv", ["recipe.py", "--epochs=1"])
    with pytest.raises(SystemExit):
        recipe.run(lambda: pytest.fail("it ran"), "A recipe.")
    assert "unrecognized arguments: --epochs=1" in capsys.readouterr().err


def test_every_example_has_its_command_and_time_on_the_page() -> None:
    page = (EXAMPLES.parent / "docs" / "examples.md").read_text(encoding="utf-8").replace("make demo", "demo.py")
    programs = [path.name for path in EXAMPLES.glob("*.py") if "__main__" in path.read_text(encoding="utf-8")]
    assert "ner.py" in programs
    assert [name for name in programs if name not in page] == []


def test_every_recipe_is_tested() -> None:
    there = {path.stem.removeprefix("recipe_") for path in EXAMPLES.glob("recipe_*.py")} - {"fashion"}
    assert there == set(RECIPES)
