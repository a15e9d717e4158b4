"""The mutants of `make test-mutants` fit the sources, and the committed result is about them: all were caught."""

import dataclasses
import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def mutants(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("mutants")


def test_every_mutant_fits_its_source(mutants):
    assert not mutants.find_stale()


def test_the_committed_result_is_current(mutants):
    result = json.loads((ROOT / "tests" / "mutants.json").read_text())
    caught = {m["name"]: m for m in result["mutants"]}
    assert result["survivors"] == []
    for mutant in mutants.MUTANTS:
        assert mutant.name in caught, f"run make test-mutants: {mutant.name} is not in tests/mutants.json"
        recorded = caught[mutant.name]
        assert recorded["caught_by"]
        assert {k: recorded[k] for k in dataclasses.asdict(mutant)} == dataclasses.asdict(mutant)
    assert len(caught) == len(mutants.MUTANTS) >= 10
