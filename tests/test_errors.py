"""Errors cross Ray processes: each one survives pickling, message and exit code included."""

from __future__ import annotations

import pickle

import pytest

from distal import errors

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.DistalError)]


@pytest.mark.parametrize("kind", KINDS)
def test_errors_survive_pickling(kind: type[errors.DistalError]) -> None:
    error = kind("what; the value; what to do")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert str(copy) == "what; the value; what to do"
    assert copy.exit_code == kind.exit_code


@pytest.mark.parametrize("kind", KINDS)
def test_the_tree_in_the_docstring_is_complete(kind: type[errors.DistalError]) -> None:
    assert kind.__name__ in (errors.__doc__ or "")


def test_exit_codes() -> None:
    assert errors.DistalError.exit_code == 1
    assert errors.ConfigError.exit_code == 2
    assert errors.Damage.exit_code == 4
    assert issubclass(errors.UserError, ValueError)
