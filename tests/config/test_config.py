from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from distal import config as configuration
from distal.config import ScoreConfig, check_unchanged, load, load_any, parse
from distal.errors import ConfigError, RunConflict
from distal.report.plan import plan
from distal.train.rank import learning_rate

ROOT = Path(__file__).parents[2]
MINIMAL = {"run": "r", "pool": {"path": "p"}}


def test_docs_are_generated_from_the_models() -> None:
    """Run `python -m distal.config > docs/config.md` when this fails."""
    assert (ROOT / "docs" / "config.md").read_text() == configuration.markdown()


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_config_loads(path: Path) -> None:
    load_any(path)


@pytest.mark.parametrize("n_classes", [10, 100])
def test_the_protocol_of_the_authors(n_classes: int) -> None:
    """From a tenth of the 50,000 images to 35%, exactly balanced; 4.5 M forwards against .5 M training images."""
    loaded = load(ROOT / "configs" / f"cifar{n_classes}.yaml")
    stats, loop, train = loaded.model.normalize, loaded.loop, loaded.train
    assert isinstance(stats, configuration.ChannelStats)
    assert [value * 255 for value in stats.mean] == pytest.approx([125.3, 123.0, 113.9], abs=1e-6)
    assert [value * 255 for value in stats.std] == pytest.approx([63.0, 62.1, 66.7], abs=1e-6)
    assert [loop.initial + cycle * loop.budget for cycle in range(loop.cycles)] == list(range(5_000, 17_501, 2_500))
    assert loop.initial % n_classes == 0
    rates = [learning_rate(train, epoch) for epoch in range(1, 101)]
    assert rates == [0.02] * 60 + [0.01] * 20 + [0.005] * 20
    authors = ["select.measure=dispersion_authors", "score.transform=train"]  # what the file says of their code
    assert load(ROOT / "configs" / f"cifar{n_classes}.yaml", authors).select.measure == "dispersion_authors"
    planned = plan(loaded)
    assert (planned.samples, planned.candidates, planned.forwards) == (50_000, 45_000, 4_500_000)


def test_the_commented_yaml_is_the_default_configuration() -> None:
    assert parse(yaml.safe_load(configuration.commented_yaml())) == load(ROOT / "configs" / "quickstart.yaml")


def test_every_key_is_described_and_says_when_it_may_change() -> None:
    for name, field in configuration.documented_keys(configuration.Config):
        assert field.description, name
        assert field.json_schema_extra["changes"] in (  # type: ignore[index]
            configuration.NEVER,
            configuration.NEXT_CYCLE,
            configuration.PLACE,
            configuration.ANY_TIME,
        )


def test_overrides_are_yaml() -> None:
    loaded = parse(MINIMAL, ["train.lr=1e-3", "eval.test=null", "score.record=[margin, entropy]", "seed=7"])
    assert loaded.train.lr == 1e-3
    assert loaded.eval.test is None
    assert loaded.score.record == ("margin", "entropy")
    assert loaded.seed == 7


def test_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    loaded = parse(MINIMAL, ["pool.source=data/x.parquet", "eval.test=builtin:x", "eval.val=v", "model.weights=w.pt"])
    assert loaded.run == str(tmp_path / "r")
    assert loaded.pool.source == str(tmp_path / "data/x.parquet")
    assert (loaded.eval.test, loaded.eval.val) == ("builtin:x", str(tmp_path / "v"))
    assert parse(MINIMAL, ["pool.source=torchvision:x"]).pool.source == "torchvision:x"
    assert parse(MINIMAL, ["eval.test=torchvision:x/test"]).eval.test == "torchvision:x/test"
    assert loaded.model.weights == str(tmp_path / "w.pt")
    assert parse(MINIMAL, ["model.weights=IMAGENET1K_V1"]).model.weights == "IMAGENET1K_V1"
    assert loaded.absolute() == loaded


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["pool.pth=x"], "unknown key pool.pth; known keys: pool.block_size, pool.classes, pool.limit"),
        (["trian.lr=1"], "unknown key trian; known keys: device, durable, eval, label, loop"),
        (["train.epoch=1"], r"unknown key train.epoch; known keys: .*; did you mean train.epochs\?$"),
        (["train.lr=abc"], "train.lr must be a valid number, got 'abc'$"),
        (["loop.budget=true"], "loop.budget must be a valid integer, got True"),
        (["pool.limit=10.0"], "pool.limit must be .*, got 10.0"),
        (["train.lr=.inf"], "train.lr must be a finite number, got inf"),
        (["train.batch_size=4", "train.workers=4"], "train: batch_size 4 must be at least 2 per worker"),
        (["train.lr=-1"], "train.lr must be greater than 0, got -1"),
        (["loop.budget=0"], "loop.budget must be greater than or equal to 1, got 0"),
        (["pool.block_size=x"], "pool.block_size must be .* or 'auto', got 'x'"),
        (["select.measure=foo"], "select.measure: 'foo' is unknown; known: dispersion, .*, random$"),
        (["select.measure=margin@last=2"], "margin has no window; a window is for dispersion, "),
        (["select.measure=flips@first=2"], "'first=2' is no part of a window; those are from=N, last=N or a share"),
        (["select.measure=flips@last=-1"], "last=-1: must be a whole number"),
        (["select.measure=flips@last=2.5"], "last=2.5: must be a whole number"),
        (["select.batch=k_centre"], "select.batch must be 'top_k', 'power'"),
        (["select.candidate_factor=0.5"], "select.candidate_factor must be greater than or equal to 1, got 0.5"),
        (["score.eliminate=exact", "select.batch=power"], "score.eliminate: exact is for select.batch: top_k, not for"),
        (
            ["select.measure=flips@last=1"],
            "flips@last=1: that is 1 of 15 checkpoints, and a measure of one is always 0",
        ),
        (["train.batch_size=64", "train.workers=3"], "train: batch_size 64 must be a multiple of workers 3"),
        (["train.schedule=milestones"], "train: schedule: milestones and a list of milestones go together"),
        (["ray.address=ray://head:10001"], "ray.address: must be local, auto or host:port, got 'ray://head:10001'"),
        (["eval.metrics=[f1]"], "eval.metrics.0 must be 'accuracy', 'balanced_accuracy', .* or 'ece', got 'f1'"),
        (["eval.metrics=[]"], "eval.metrics: name at least one of accuracy, balanced_accuracy, "),
        (["pool.path=s3://bucket/p"], "pool.path: 's3://bucket/p' is a s3:// URL; only local"),
        (["select.measure=entropy"], "select.measure: entropy needs score.record to contain it"),
        (["score.record=[]"], "select.tie_break: margin needs score.record to contain it"),
        (["loop.initial=3", "train.workers=2"], r"loop.initial: 3 must be at least 2 per rank \(train.workers: 2\)"),
        (["train"], "'train': an override is written key.sub=value"),
        (["train.lr=[1"], r"'train.lr=\[1': '\[1' is not a valid YAML value"),
        (["pool=3"], "pool must be a valid dictionary"),
        (["train.lr=-1", "seed=-1"], r"seed must be greater than or equal to 0, got -1 \(and 1 more\)"),
    ],
)
def test_mistakes_get_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse(MINIMAL, overrides)
    assert "\n" not in str(caught.value)


def test_a_missing_key_is_named() -> None:
    with pytest.raises(ConfigError, match="pool.path is missing; set it in the file or as pool.path="):
        parse({"run": "r", "pool": {}})


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [", "not valid YAML"), ("- 1", "a mapping of keys"), ("", "a mapping of keys"), (None, "no such file")],
)
def test_unusable_files(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "c.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load(path)


def test_configurations_are_immutable_and_survive_a_record() -> None:
    loaded = parse(MINIMAL, ["train.schedule=milestones", "train.milestones=[3, 6]"])
    with pytest.raises(ValueError, match="frozen"):
        loaded.seed = 1  # type: ignore[misc]
    record = yaml.safe_load(yaml.safe_dump(loaded.to_record()))
    assert configuration.from_record(record) == loaded


def test_checkpoint_epochs() -> None:
    def epochs(n: int, every: int) -> list[int]:
        return parse(MINIMAL, [f"train.epochs={n}", f"train.checkpoint_every={every}"]).train.checkpoint_epochs

    assert epochs(3, 1) == [1, 2, 3]
    assert epochs(5, 2) == [2, 4, 5]  # the last epoch always gives one
    assert epochs(2, 9) == [2]


class TestChanges:
    """What a run that exists accepts."""

    old = parse(MINIMAL)

    @pytest.mark.parametrize(
        ("override", "said"),
        [
            ("train.lr=0.1", "train.lr: 0.05 -> 0.1"),
            ("select.measure=margin", "select.measure: dispersion -> margin"),
            ("score.record=[margin, entropy]", r"score.record: \[margin\] -> \[margin, entropy\]"),
            ("model.weights=IMAGENET1K_V1", "model.weights: null -> IMAGENET1K_V1"),
        ],
    )
    def test_results_are_fixed_once_a_cycle_has_begun(self, override: str, said: str) -> None:
        with pytest.raises(RunConflict, match=rf"{said}: cycle 2 has begun .* may apply from cycle 3"):
            check_unchanged(self.old, parse(MINIMAL, [override]), 2)

    def test_speed_length_and_places_may_change_any_time(self) -> None:
        new = [
            "loop.cycles=9",
            "score.actors=4",
            "score.cache_gb=2",
            "ray.address=auto",
            "pool.path=elsewhere",
            "run=r",
        ]
        check_unchanged(self.old, parse(MINIMAL, new), 2)

    def test_what_a_run_is(self) -> None:
        assert sorted(self.old.identity_keys()) == [
            "loop.balance",
            "loop.initial",
            "pool.block_size",
            "pool.limit",
            "seed",
        ]

    def test_a_hash_is_of_what_is_not_a_default(self) -> None:
        """A key that is added later, with a default that changes nothing, changes no hash."""
        assert self.old.digest("train.") == parse(MINIMAL, ["train.lr=0.05", "select.measure=random"]).digest("train.")
        assert self.old.digest("train.") == self.old.digest("label.") != parse(MINIMAL, ["train.lr=1"]).digest("train.")


def test_result_keys_and_autos() -> None:
    loaded = parse(MINIMAL)
    assert "train.lr" in loaded.result_keys()
    assert "score.actors" not in loaded.result_keys()
    assert loaded.autos() == ["device", "pool.block_size", "train.threads", "score.precision", "score.batch_size"]
    resolved = loaded.with_values({"train.threads": 2, "pool.block_size": 64})
    assert (resolved.train.threads, resolved.pool.block_size) == (2, 64)
    assert resolved.train.lr == loaded.train.lr


def test_a_pattern_needs_no_quotes_on_the_command_line() -> None:
    tree = {
        "run": "r",
        "pool": {"path": "p"},
        "model": {"num_classes": 2, "normalize": "pool"},
        "checkpoints": {"path": "c"},
    }
    assert parse(tree, ["checkpoints.pattern=*.ckpt"], ScoreConfig).checkpoints.pattern == "*.ckpt"
