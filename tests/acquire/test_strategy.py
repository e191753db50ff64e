"""Whole runs by each way of selecting, with real actors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from distal import Run, run
from distal.acquire.k_center import k_center
from distal.artifacts import checkpoints
from distal.artifacts.assignments import Assignments
from distal.artifacts.scores import Scores
from distal.artifacts.selection import Selection
from distal.driver.reanalyse import select_run
from distal.errors import ConfigError
from distal.model.spec import ModelSpec
from distal.pool import Pool
from distal.report.verify import verify
from distal.score.predict import Predictor
from tests.helpers import small_config

pytestmark = pytest.mark.usefixtures("stand_ins")

ONE = ("loop.cycles=1", "train.epochs=2")


def test_k_center_of_the_best_by_margin(pool: Pool, tmp_path: Path) -> None:
    """The last checkpoint alone is scored, and embeddings are those of a plain forward pass over the candidates."""
    config = small_config(
        tmp_path / "run",
        pool,
        None,
        *ONE,
        "select.measure=margin",
        "select.batch=k_center",
        "select.candidate_factor=3",
    )
    result = run(config)
    cycle = Run.open(tmp_path / "run").cycle(0)
    assignments = Assignments.open(cycle.assignments)
    n_eligible = 238 - 24
    assert assignments.n_rows == 1
    assert result.cycles[0].images_scored == n_eligible
    assert Scores.open(cycle.scores).measures == ("margin",)
    last = checkpoints.read(cycle.checkpoints, 1)
    assert assignments.weights == {0: last.sha256}

    score = Scores.open(cycle.scores).read("margin", 0, 240)
    best = np.argsort(-np.where(np.isnan(score), -1, score), kind="stable")[:48]
    spec = ModelSpec.of(cycle.config.model, pool)
    net = spec.build().eval()
    predictor = Predictor(net, spec.preprocess(), batch_size=32)
    predictor.load(checkpoints.load(last))
    given = []
    net.get_submodule(
        str([n for n, m in net.named_modules() if type(m).__name__ == "Linear"][-1])
    ).register_forward_hook(lambda _, inputs, __: given.append(inputs[0]))
    ordered = np.sort(best)
    predictor.logits(pool.take(ordered))
    plain = np.concatenate([batch.numpy() for batch in given])[: len(best)]
    chosen = cycle.chosen()
    assert set(chosen.indices.tolist()) <= set(best.tolist())
    assert chosen.indices.tolist() == best[k_center(plain[np.searchsorted(ordered, best)], 16)].tolist()
    assert set(chosen.table["decided_by"].to_pylist()) == {"k_center"}
    assert chosen.tie_share == 0
    again = select_run(tmp_path / "run", budget=5)  # from what is stored, so by the scores alone
    assert Selection.read(again.selection).indices.tolist() == best[:5].tolist()
    assert verify(tmp_path / "run").state == "sound"


@pytest.mark.slow
def test_nothing_is_scored_for_a_draw_or_a_list(pool: Pool, tmp_path: Path) -> None:
    """A random first batch, then one that was chosen elsewhere."""
    names = [f"s1-{i:05d}" for i in range(100, 106)]
    (tmp_path / "ids.txt").write_text("\n".join(names))
    folder = tmp_path / "run"
    drawn = small_config(folder, pool, None, "select.measure=random", "loop.cycles=1", "train.epochs=1")
    assert run(drawn).cycles[0].images_scored == 0
    first = Run.open(folder).cycle(0).chosen()
    assert len(first) == 16
    labelled = {*Run.open(folder).ledger(before=0).indices.tolist(), *first.indices.tolist()}
    listed = ["train.epochs=1", f"select.from={tmp_path / 'ids.txt'}"]
    if labelled & set(range(100, 106)):
        with pytest.raises(ConfigError, match="is labelled already"):
            run(small_config(folder, pool, None, *listed))
        names = [f"s1-{i:05d}" for i in range(100, 140) if i not in labelled][:6]
        (tmp_path / "ids.txt").write_text("\n".join(names))
    assert run(small_config(folder, pool, None, *listed)).cycles[1].images_scored == 0
    assert Run.open(folder).cycle(1).chosen().sample_ids == names
    assert verify(folder).state == "sound"


@pytest.mark.slow
def test_the_authors_dispersion_under_the_training_transform(pool: Pool, tmp_path: Path) -> None:
    """The transform changes what is predicted, and is the same however the work was shared out."""
    keys = (*ONE, "loop.initial=24", "score.transform=train", "select.measure=dispersion_authors")
    votes = {}
    for name, more in {
        "one": ("score.actors=1",),
        "many": ("pool.block_size=32", "score.actors=auto"),
        "clean": ("score.transform=clean",),
    }.items():
        measure = ("select.measure=dispersion",) if name == "clean" else ()
        run(small_config(tmp_path / name, pool, None, *keys, *more, *measure))
        votes[name] = Assignments.open(Run.open(tmp_path / name).cycle(0).assignments).read(0, 240)
    assert np.mean(votes["one"] == votes["many"]) > 0.99  # other batches, other last bits
    assert np.mean(votes["one"] == votes["clean"]) < 0.99
    with pytest.raises(ConfigError, match=r"dispersion_authors needs score.transform: train"):
        small_config(tmp_path / "bad", pool, None, "select.measure=dispersion_authors")


@pytest.mark.slow
def test_a_random_part_is_scored_and_selected_from(pool: Pool, tmp_path: Path) -> None:
    result = run(small_config(tmp_path / "run", pool, None, *ONE, "select.subpool=0.5"))
    cycle = Run.open(tmp_path / "run").cycle(0)
    eligible = Assignments.open(cycle.assignments).eligible(0, 240)
    assert 70 < eligible.sum() < 150
    assert result.cycles[0].images_scored == 2 * eligible.sum()
    assert eligible[cycle.chosen().indices].all()
