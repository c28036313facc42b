"""Learning the relationship of 200 target classes to 1000 source classes from the logits of 50 000 images."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.contestants import RELATIONSHIP_CONTESTANTS, check_relationship
from benchmarks.problems import RELATIONSHIP_BATCHES, RELATIONSHIP_SHAPE, RelationshipProblem
from benchmarks.timing import finished


@pytest.fixture(scope="module", params=RELATIONSHIP_BATCHES, ids=lambda batch: f"batches_of_{batch}")
def problem(request: pytest.FixtureRequest, device: str) -> RelationshipProblem:
    """Batches of logits. The contestants are checked on them here."""
    made = RelationshipProblem.make(RELATIONSHIP_SHAPE, batch=request.param, device=device)
    check_relationship(made)
    return made


@pytest.mark.parametrize("contestant", RELATIONSHIP_CONTESTANTS)
def test_relationship(benchmark: BenchmarkFixture, problem: RelationshipProblem, contestant: str, device: str) -> None:
    learn = RELATIONSHIP_CONTESTANTS[contestant]
    benchmark.group = f"relationship {RELATIONSHIP_SHAPE}, batches of {len(problem.labels[0])}"
    benchmark.pedantic(finished(lambda: learn(problem), device), rounds=7, warmup_rounds=1)
