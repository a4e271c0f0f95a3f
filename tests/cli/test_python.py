"""How options of Python become a command line, and which run a path stands for."""

from pathlib import Path

from lightning_danube.cli.python import Run, _options


def test_overrides_are_written_as_flags() -> None:
    overrides = {
        "name": "more-web",
        "seed_everything": 3,
        "trainer": {"max_steps": 100, "precision": None},
        "data": {"class_path": "CurriculumData", "seed": 1, "tokenizer": "mistral"},
        "model": {"decoder": {"hidden_size": 32}},
        "ckpt_path": None,
    }
    assert list(_options(overrides)) == [
        ("name", "more-web"),
        ("seed_everything", "3"),
        ("trainer.max_steps", "100"),
        ("trainer.precision", "null"),
        ("data.class_path", "CurriculumData"),
        ("data.init_args.seed", "1"),
        ("data.init_args.tokenizer", "mistral"),
        ("model.init_args.decoder", '{"hidden_size": 32}'),
        ("ckpt_path", "null"),
    ]
    assert list(_options({"data": "CurriculumData"})) == [("data", "CurriculumData")]


def test_a_run_is_its_newest_version(tmp_path: Path) -> None:
    for version in (2, 9, 10):
        directory = tmp_path / "tiny" / f"version_{version}"
        directory.mkdir(parents=True)
        (directory / "config.yaml").write_text(f"name: v{version}\n")
        (directory / "summary.json").write_text(f'{{"steps": {version}}}')
    assert Run(tmp_path / "tiny").directory == tmp_path / "tiny" / "version_10"
    assert Run(tmp_path / "tiny").summary == {"steps": 10} and Run(tmp_path / "tiny").config == {"name": "v10"}
    assert Run(str(tmp_path / "tiny" / "version_2")).summary == {"steps": 2}
