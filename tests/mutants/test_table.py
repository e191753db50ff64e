"""Every mutant still applies to the code. `python -m tests.mutants` tries them."""

from __future__ import annotations

import ast

import pytest

from tests.mutants.table import MUTANTS, Mutant
from tests.mutants.tree import ROOT


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_applies(mutant: Mutant) -> None:
    original = (ROOT / mutant.file).read_text()
    changed = mutant.apply(original)
    assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(original))
    assert all((ROOT / each.partition("::")[0]).is_file() for each in mutant.killers)


def test_names_are_unique() -> None:
    names = [mutant.name for mutant in MUTANTS]
    assert len(set(names)) == len(names)
