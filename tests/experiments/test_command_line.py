import sys
from pathlib import Path

import pytest
from absl import flags

import jaxsparse
from experiments import build, command_line, compare, export, report, reproduce, stages, sweep, train

CONFIG = Path(__file__).parents[2] / "configs" / "digits_sparse_momentum.py"


def forget_changes():
    """The flags that changes of a config have defined."""
    flags.FLAGS.unparse_flags()
    for name in [name for name in flags.FLAGS if name.startswith("config.")]:
        delattr(flags.FLAGS, name)


@pytest.fixture
def parse(monkeypatch):
    def parse(*arguments):
        forget_changes()
        argv = ["train", *map(str, arguments)]
        monkeypatch.delitem(sys.modules, "config_config", raising=False)  # the file of the test before
        monkeypatch.setattr(sys, "argv", argv)  # where ml_collections looks for changes of the config
        return command_line.parse_flags(argv)

    yield parse
    forget_changes()


def test_changes_reach_the_config(parse):
    rest = parse(f"--config={CONFIG}", "--workdir=somewhere", "--config.method.growth=random", "--config.seed=3")
    config = train.FLAGS.config
    assert (config.method.growth, config.seed, config.epochs, train.FLAGS.workdir) == ("random", 3, 100, "somewhere")
    assert rest == ["train"]


@pytest.mark.parametrize("program", [stages, sweep])
def test_help_has_the_flags_that_come_from_the_trainer(program):
    flags_of_help = {flag.name for flag in flags.FLAGS.get_key_flags_for_module(program.__name__)}
    assert {"config", "workdir", "seeds", "only"} <= flags_of_help
    assert "coordinator" not in flags_of_help


def test_what_is_changed_is_not_made_small(parse):
    changes = {"data.batch_size": 16, "epochs": 7, "optimizer.learning_rate.transition_steps": 5, "log_every_steps": 3}
    parse(
        f"--config={CONFIG}",
        "--workdir=w",
        "--config.smoke",
        *(f"--config.{key}={value}" for key, value in changes.items()),
    )
    config = train.config_of_flags()
    assert (config.data.batch_size, config.epochs, config.log_every_steps) == (16, 7, 3)
    assert config.optimizer.learning_rate.transition_steps == 5
    assert (config.data.examples, config.eval_every_epochs) == (44 * 32, 2)


def test_what_takes_the_place_of_a_mapping_is_not_made_small(parse):
    given = '{"name": "adam", "learning_rate": 0.001}'
    parse(f"--config={CONFIG}", "--workdir=w", "--config.smoke", f"--config.optimizer={given}")
    config = train.config_of_flags()
    assert config.epochs == 4
    _, arguments = build.Calls(config, 44).call(config.optimizer, "config.optimizer")
    assert arguments == {"learning_rate": 0.001}


@pytest.mark.parametrize(
    ("flags_given", "message"),
    [
        (["--vmap_seeds"], "--vmap_seeds has no effect without --seeds"),
        (["--profile", "--seeds=0,1"], "--profile is for a single run, without --seeds"),
    ],
)
def test_flags_without_effect(parse, tmp_path, flags_given, message):
    parse(f"--config={CONFIG}", f"--workdir={tmp_path / 'w'}", *flags_given)
    with pytest.raises(SystemExit, match=f"error: {message}"):
        train.main(["train"])
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--config.epoch=3", "no key 'epoch'; did you mean 'epochs'?"),
        ("--config.method.grwth=random", "no key 'method.grwth'; did you mean 'method.growth'?"),
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
    assert "start, start_epochs, start_from, warmup_epochs, weight_decay" in stop.value.code


def test_parts_of_a_text_are_given_with_what_takes_its_place(parse):
    with pytest.raises(
        SystemExit, match=r"config\.method\.structure is 'weight', .* --config\.method\.structure='\{\"na"
    ):
        parse(f"--config={CONFIG}", "--workdir=w", "--config.method.structure.name=block")
    parse(f"--config={CONFIG}", "--workdir=w", '--config.method.structure={"name": "n_of_m", "n": 2, "m": 4}')
    structure = build.Calls(train.FLAGS.config, 44).value(train.FLAGS.config.method.structure, "")
    assert structure == jaxsparse.n_of_m(2, 4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("nowhere.py", r"--config: .*No such file or directory: 'nowhere\.py'$"),
        ("", "--config is empty; is a variable of the shell not set"),
        (CONFIG.parent, f"--config: .*Is a directory: '{CONFIG.parent}'$"),
        (CONFIG.with_name("common.py"), "--config: '.*common.py' has no function get_config$"),
        (f"{CONFIG}:rigl", "--config=.*:rigl: '.*' takes no argument$"),
        (f"{CONFIG.with_name('mnist_mlp.py')}:rows", "rows: this config comes with the units .*, got 'rows'$"),
    ],
)
@pytest.mark.parametrize("change", [(), ("--config.epochs=3",)])
def test_config_files_that_give_no_config(parse, config, message, change):
    with pytest.raises(SystemExit, match=message):
        parse(f"--config={config}", "--workdir=somewhere", *change)


@pytest.mark.parametrize("flag", ["workdir", "seeds", "coordinator", "config.data_dir"])
def test_an_empty_flag_is_an_unset_variable(parse, flag):
    with pytest.raises(SystemExit, match=f"error: --{flag} is empty; is a variable of the shell not set"):
        parse(f"--config={CONFIG}", "--workdir=somewhere", f"--{flag}=")


def test_an_empty_argument_is_an_unset_variable(capsys):
    for main, arguments in (
        (compare.main, [""]),
        (report.main, ["somewhere", "--out="]),
        (export.main, ["", "model"]),
        (reproduce.main, ["mnist_mlp", "--runs="]),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert "is empty; is a variable of the shell not set?" in capsys.readouterr().err


def test_value_of_the_wrong_type(parse, capsys):
    with pytest.raises(SystemExit):
        parse(f"--config={CONFIG}", "--workdir=somewhere", "--config.epochs=many")
    assert "--config.epochs=many" in capsys.readouterr().err
