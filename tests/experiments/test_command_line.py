import sys
from pathlib import Path

import pytest
from absl import flags

from experiments import command_line, train

CONFIG = Path(__file__).parents[2] / "configs" / "digits_sparse_momentum.py"


@pytest.fixture
def parse(monkeypatch):
    def parse(*arguments):
        argv = ["train", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", argv)  # where ml_collections looks for changes of the config
        return command_line.parse_flags(argv)

    yield parse
    flags.FLAGS.unparse_flags()


def test_changes_reach_the_config(parse):
    rest = parse(f"--config={CONFIG}", "--workdir=somewhere", "--config.sparsity.growth=random", "--config.seed=3")
    config = train.FLAGS.config
    assert (config.sparsity.growth, config.seed, config.epochs, train.FLAGS.workdir) == ("random", 3, 100, "somewhere")
    assert rest == ["train"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--config.epoch=3", "no key 'epoch'; did you mean 'epochs'?"),
        ("--config.sparsity.grwth=random", "no key 'sparsity.grwth'; did you mean 'sparsity.growth'?"),
        ("--config.epochs.x=3", "no key 'epochs.x'; did you mean 'epochs'?"),
        ("--config.zzz.qqq=3", "no key 'zzz.qqq'\n"),
    ],
)
@pytest.mark.parametrize(
    "config", [(f"--config={CONFIG}",), ("--config", CONFIG)], ids=["one argument", "two arguments"]
)
def test_unknown_key_names_the_nearest_and_all(parse, config, change, message):
    with pytest.raises(SystemExit) as stop:
        parse(*config, "--workdir=somewhere", change)
    assert message in stop.value.code
    assert "data.std, data.streamed, data.validation, data.workers, data_dir, dense, epochs," in stop.value.code


def test_missing_config_file(parse):
    with pytest.raises(SystemExit, match=r"No such file or directory: 'nowhere\.py'"):
        parse("--config=nowhere.py", "--workdir=somewhere", "--config.epochs=3")


def test_value_of_the_wrong_type(parse, capsys):
    with pytest.raises(SystemExit):
        parse(f"--config={CONFIG}", "--workdir=somewhere", "--config.epochs=many")
    assert "--config.epochs=many" in capsys.readouterr().err
