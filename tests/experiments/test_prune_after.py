"""Pruning finished runs after training, cutting them, and the page of the results."""

import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from ml_collections import ConfigDict

import jaxsparse
from experiments import cut, prune_after, train
from experiments.finished import open_finished
from experiments.options import check_config
from experiments.prune_after import Case, cases
from experiments.results import sweep, text_gpt
from experiments.workdir import read_json, write_json
from jaxsparse import structures
from jaxsparse.trace import Moments
from jaxsparse.trees import by_path
from tests.experiments import tiny_text
from tests.experiments.test_program import smoke_config

BIT = math.log(2)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """The folder of a dense run of a tiny GPT, and the folder of its text."""
    folder = tmp_path_factory.mktemp("dense")
    text = tiny_text.write(folder / "text")
    train.train(tiny_text.config(text, "dense", **{"model.num_layers": 2}), folder / "run", quiet=True)
    return folder / "run"


# --- Which rows -----------------------------------------------------------------------------------------------------


def test_owl_is_for_rules_that_look_at_data_and_for_no_n_of_m():
    found = cases(("magnitude", "wanda"), ("0.50", "0.5", "2:4"), ("uniform", "owl"))
    assert list(map(str, found)) == ["magnitude, 0.5", "magnitude, 2:4", "wanda, 0.5", "wanda, 2:4", "wanda + owl, 0.5"]
    assert found[1].options == {"sparsity": 0.5, "structure": jaxsparse.n_of_m(2, 4)}
    assert found[4].options == {"sparsity": 0.5, "allocation": "owl"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((["wandah"], ["0.5"], ["uniform"]), "rule must be one of .*'wanda'.*, got 'wandah'"),
        ((["wanda"], ["50"], ["uniform"]), "--sparsities takes fractions of zeros .* 2:4, got '50'"),
        ((["wanda"], ["4:2"], ["uniform"]), "--sparsities takes .*, got '4:2'"),
        ((["wanda"], ["half"], ["uniform"]), "--sparsities takes .*, got 'half'"),
        ((["wanda"], ["0.5"], ["owls"]), "--allocations takes uniform, .*owl, got owls"),
        ((["magnitude"], ["0.5"], ["owl"]), "nothing is left to prune"),
        ((["no_rules:mine"], ["0.5"], ["uniform"]), "--rules='no_rules:mine': there is no module 'no_rules'"),
        ((["experiments.wanda_rules:mine"], ["0.5"], ["uniform"]), "--rules=.*: the module has no such function"),
    ],
)
def test_rows_that_are_none(given, message):
    with pytest.raises(ValueError, match=message):
        cases(*given)


def test_runs_that_cannot_be_pruned(tmp_path, capsys):
    with pytest.raises(OSError, match="is not the folder of a run"):
        open_finished(tmp_path)
    config = json.loads(smoke_config().to_json())
    write_json(tmp_path / "config.json", config)
    with pytest.raises(ValueError, match="is sparse already, by sparse_momentum"):
        open_finished(tmp_path)
    write_json(tmp_path / "config.json", config | {"dense": True})
    with pytest.raises(OSError, match=r"is not finished: it has no result\.json"):
        open_finished(tmp_path)
    with pytest.raises(SystemExit, match="error: --run=.* is not finished"):
        prune_after.main(["--run", str(tmp_path), "--results", str(tmp_path)])
    with pytest.raises(SystemExit, match="error: --run=.* is not finished"):
        cut.main(["--run", str(tmp_path), "--results", str(tmp_path)])


def test_rules_of_ones_own():
    own = [f"experiments.wanda_rules:{name}" for name in ("wanda_of_matrix", "magnitude_of_outputs")]
    matrix, outputs = (prune_after.resolve(rule).prune for rule in own)
    assert [str(case) for case in cases(own, ("0.5",), ("uniform",))] == [
        "wanda_of_matrix, 0.5", "magnitude_of_outputs, 0.5"
    ]  # fmt: skip
    kernel = jnp.array([[3.0, 5.0, 0.1, 0.2], [4.0, 6.0, 0.3, 0.4]])
    moments = Moments.of_rows(jnp.array([[100.0, 0.0], [0.0, 1.0]]), (2,), (), gram=False)
    weight = structures.weight()
    assert matrix(kernel, moments, 0.5, weight)[1].tolist() == [[True, True, True, True], [False] * 4]
    assert outputs(kernel, moments, 0.5, weight)[1].tolist() == [[False] * 4, [True] * 4]
    pruned, mask = matrix(kernel, moments, 0.5, jaxsparse.n_of_m(1, 2))
    assert mask.tolist() == [[True] * 4, [False] * 4]
    assert pruned.tolist() == jnp.where(mask, kernel, 0).tolist()


# --- A part of an epoch, and weights to start from --------------------------------------------------------------------


def test_a_run_may_have_a_part_of_an_epoch():
    config = smoke_config()  # 44 steps an epoch
    config = type(config)(config.to_dict() | {"epochs": 0.5})
    check_config(config, num_examples=44 * 32)
    config.epochs = 0.01
    with pytest.raises(ValueError, match=r"config\.epochs is at least one step, 0\.0227, got 0\.01"):
        check_config(config, num_examples=44 * 32)


def test_in_turns_calls_each_once_a_round():
    called = []
    seconds = cut.in_turns({name: lambda name=name: called.append(name) for name in "ab"}, rounds=2)
    assert called == list("ababab")  # the first to compile
    assert all(value >= 0 for value in seconds.values())


# --- The whole way ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_pruned_runs_are_evaluated_as_the_trainer_does(dense, tmp_path, capsys):
    """The dense network has its loss, masks have their zeros, rows that are there are skipped."""
    file = tmp_path / "after.json"
    options = ["--run", str(dense), "--results", str(tmp_path), "--name", "after", "--windows", "12"]
    prune_after.main([*options, "--sparsities", "0.5", "--rules", "magnitude", "--allocations", "uniform"])
    first = read_json(file)
    assert first["dense"]["test_loss"] == pytest.approx(read_json(dense / "result.json")["test_loss"], rel=1e-6)
    more = ["--sparsities", "0.5,2:4", "--rules", "magnitude,wanda,sparsegpt", "--allocations", "uniform"]
    prune_after.main([*options, *more])
    found = read_json(file)
    assert found["rows"][0] == first["rows"][0]
    assert [row["rule"] for row in found["rows"]] == ["magnitude"] * 2 + ["wanda"] * 2 + ["sparsegpt"] * 2
    assert all(row["kept"] == pytest.approx(0.5, abs=0.05) for row in found["rows"])
    assert "6 rows, 1 of them there" in capsys.readouterr().out
    assert "| sparsegpt | " in (tmp_path / "after.md").read_text()
    with pytest.raises(SystemExit, match="has other results, of windows 12 there, 13 now: take another --name"):
        prune_after.main([*options[:-1], "13", *more])
    with pytest.raises(SystemExit, match="--windows is from 1 to the 48 train examples of an epoch, got 49"):
        prune_after.main([*options[:-1], "49", "--name", "other"])


@pytest.mark.slow
def test_a_row_is_what_prune_once_leaves_and_fine_tuning_keeps_its_zeros(dense, tmp_path, monkeypatch):
    run, case = open_finished(dense), Case("wanda", "uniform", "0.5")
    batches = run.calibration(20)
    assert [batch.shape for batch in batches] == [(8, 8), (8, 8), (4, 8)]
    found = prune_after.prune_after(run, [case], tmp_path / "a.json", windows=20, finetune_epochs=0.5, workdir=tmp_path)
    [row] = found["rows"]
    params, masks = prune_after.prune(run, case, batches)
    assert row["test_loss"] == pytest.approx(run.evaluated(params)["test_loss"], rel=1e-6)
    assert row["finetuned"]["steps"] == 3
    trained, its_masks = jaxsparse.load_sparse(tmp_path / "a" / "wanda_uniform_0.5" / "sparse.safetensors")
    jax.tree.map(np.testing.assert_array_equal, its_masks, masks)
    before = by_path(params)
    for path, mask in by_path(masks).items():
        if np.ndim(mask):
            assert path.startswith("block")
            assert not np.any(np.asarray(by_path(trained)[path])[~np.asarray(mask)])
            assert not np.array_equal(by_path(trained)[path], before[path])
    for epochs in (-1.0, 0.01):
        with pytest.raises(ValueError, match=r"config\.epochs is at least one step"):
            prune_after.prune_after(run, [case], tmp_path / "b.json", windows=20, finetune_epochs=epochs)
    assert not (tmp_path / "b.json").exists()
    (tmp_path / "a.json").unlink()
    with pytest.raises(ValueError, match=r"begun from another .*start\.safetensors: take another --workdir"):
        prune_after.prune_after(run, [case], tmp_path / "a.json", windows=8, finetune_epochs=0.5, workdir=tmp_path)
    default = prune_after.post_training.prune_once(run.apply, run.params, batches, "magnitude", 0.5)[1]
    kernels = {path for path, mask in by_path(default).items() if np.ndim(mask)}
    assert kernels == {path for path, mask in by_path(masks).items() if np.ndim(mask)}  # as without method.prunable

    def seen(config, *_, **__):
        raise LookupError(config.data_dir)

    monkeypatch.setattr(prune_after, "train_on", seen)
    elsewhere = run._replace(config=ConfigDict(run.config.to_dict() | {"data_dir": "elsewhere"}))
    with pytest.raises(LookupError, match="elsewhere"):  # the data are read where the run has them
        prune_after.finetune(elsewhere, params, masks, tmp_path / "seen", 0.5, 0.1)


@pytest.mark.slow
def test_cut_heal_and_measure(dense, tmp_path, capsys):
    options = ["--run", str(dense), "--results", str(tmp_path), "--workdir", str(tmp_path / "heal"), "--windows", "8"]
    options += ["--heads", "0.5", "--blocks", "1", "--rounds", "1", "--heal_epochs", "1.5", "--rate", "0.5"]
    cut.main(options)
    found = read_json(tmp_path / "cut.json")
    assert found["widths"] == {"num_layers": 1, "num_heads": 1, "num_kv_heads": 1, "head_dim": 4, "mlp_width": 16}
    # A block of 8 channels: attention 4 x 64, MLP 2 x 256; of it half each, and one of two blocks.
    assert found["kept"] == pytest.approx(0.25)
    assert (found["steps"], found["tokens"], found["dense_tokens"]) == (9, 9 * 64, 12 * 64)
    assert set(found["times_faster"]) == {"train_step", "generate"}
    assert found["healed"]["test_loss"] == read_json(tmp_path / "heal/result.json")["test_loss"]
    config = read_json(tmp_path / "heal/config.json")
    assert config["distill_from"] == str(dense)
    assert config["model"]["mlp_width"] == 16
    assert config["epochs"] == 1.5
    capsys.readouterr()
    cut.main(options)  # it has healed
    assert "finished before" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="a run was begun from another .*start.safetensors"):
        cut.main([*options, "--seed", "5", "--units", "0.25"])
    shutil.rmtree(tmp_path / "heal/checkpoints")
    with pytest.raises(SystemExit, match="heal is finished, but has no checkpoint with its weights any more"):
        cut.main(options)
    for more, message in (
        (["--rounds", "0"], "--rounds is at least 1"),
        (["--heal_epochs", "-1"], "at least one step"),
    ):
        with pytest.raises(SystemExit, match=message):
            cut.main([*options, *more])


@pytest.mark.slow
def test_what_is_cut_computes_what_slim_computes(dense):
    run = open_finished(dense)
    small, batches = cut.cut(run, units=0.5, heads=0.5, windows=16), run.calibration(16)
    assert small.blocks == ()
    assert (small.model.num_heads, small.model.mlp_width) == (1, 16)
    slim = cut.post_training.prune_channels(run.apply, run.params, batches, {"units": 0.5, "heads": 0.5})
    logits = slim.apply(slim.params, batches[0])
    np.testing.assert_allclose(small.model.apply({"params": small.params}, batches[0]), logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="nothing is to be cut"):
        cut.cut(run, 0, 0, windows=16)
    with pytest.raises(ValueError, match="--blocks is from 0 to less than the 2 of the model, got 2"):
        cut.cut(run, 0.5, 0, blocks=2, windows=16)


@pytest.mark.slow
def test_images_are_pruned_too_and_not_cut(tmp_path):
    train.train(smoke_config(dense=True, epochs=1), tmp_path / "run", quiet=True)
    run = open_finished(tmp_path / "run")
    found = prune_after.prune_after(run, cases(["wanda"], ["0.5"], ["uniform"]), tmp_path / "after.json", windows=40)
    assert 0 < found["rows"][0]["test_accuracy"] <= 1
    assert "test accuracy, %" in prune_after.as_markdown(found, "after", "command")
    with pytest.raises(ValueError, match="trained LeNet300100, and this cuts a GPT"):
        cut.cut(run, 0.5, 0.25)


@pytest.mark.slow
def test_a_run_starts_from_a_file_of_params(dense, tmp_path):
    params = open_finished(dense).params
    jaxsparse.save_sparse(tmp_path / "start.safetensors", params)
    text = read_json(dense / "config.json")["data"]["files"]
    changes = {"model.num_layers": 2, "start_from": str(tmp_path / "start.safetensors")}
    config = tiny_text.config(text, "dense", **changes)
    made = train.make_program(config, train.open_dataset(config))
    jax.tree.map(np.testing.assert_array_equal, made.init(3).params, params)
    sparse = tiny_text.config(text, "magnitude_pruning", **changes, **{"method.sparsity": 0.5})
    started = train.make_program(sparse, train.open_dataset(sparse)).init(0).params
    jax.tree.map(np.testing.assert_array_equal, started, params)
    config.model.width = 4
    with pytest.raises(ValueError, match=r"config\.start_from=.* does not fit config\.model: block_0/attention/key"):
        train.make_program(config, train.open_dataset(config)).init(0)
    for key in ("masks_from", "sparse_init"):
        both = tiny_text.config(text, "rigl", **changes, **{key: True if key == "sparse_init" else "x.safetensors"})
        with pytest.raises(ValueError, match="start_from"):
            train.make_program(both, train.open_dataset(both))


# --- The page ---------------------------------------------------------------------------------------------------------


def write_results(folder):
    """A sweep of two arms, rows of two rules and a smaller network."""
    rows = [("dense", "", None, 0, 1.5), ("rigl", "0.8", 0.8, 0, 1.6), ("rigl", "0.9", 0.9, 0, 1.7),
            ("rigl", "0.9", 0.9, 1, 1.74)]  # fmt: skip
    frame = sweep.as_frame([
        {"arm": arm, "value": value, "sparsity": sparsity, "seed": seed, "test_loss": loss,
         "kept": 100 if sparsity is None else 100 * (1 - sparsity), "seconds": 1.0, "failed": "", "config": ""}
        for arm, value, sparsity, seed, loss in rows
    ], sweep.LOSS)  # fmt: skip
    frame.to_csv(folder / text_gpt.SWEEP, index=False)
    after = [("magnitude", "0.5", 1.65), ("wanda", "0.5", 1.55), ("magnitude", "2:4", 1.7), ("wanda", "2:4", 1.71),
             ("magnitude", "0.7", 3.0)]  # fmt: skip
    rows = [
        {"rule": rule, "allocation": "uniform", "sparsity": sparsity, "kept": 0.3 if sparsity == "0.7" else 0.5,
         "test_bits_per_byte": loss / BIT, "seconds": 1.0}
        for rule, sparsity, loss in after
    ]  # fmt: skip
    rows[0]["finetuned"] = {"test_bits_per_byte": 1.52 / BIT}
    write_json(folder / text_gpt.AFTER, {"dense": {"test_bits_per_byte": 1.52 / BIT}, "rows": rows})
    write_json(folder / "text_gpt_cut.json", {
        "units": 0.5, "heads": 0.25, "blocks": [], "kept": 0.58, "tokens": 600, "dense_tokens": 6000,
        "dense": {"test_bits_per_byte": 1.5 / BIT}, "healed": {"test_bits_per_byte": 1.56 / BIT},
        "times_faster": {"train_step": 1.75, "generate": 1.5},
    })  # fmt: skip


def test_the_page_has_what_is_there_and_says_what_is_not(tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"has none of sweep_text_gpt\.csv, text_gpt_after\.json and"):
        text_gpt.main(["--results", str(tmp_path)])
    write_results(tmp_path)
    text_gpt.main(["--results", str(tmp_path)])
    found = text_gpt.read(tmp_path)
    assert found.dense == pytest.approx(1.5 / BIT)
    assert list(found.rows.how) == ["dense"] + ["from scratch"] * 2 + ["after training", "fine-tuned"] + [
        "after training"] * 4 + ["smaller"]  # fmt: skip
    cells = text_gpt.cells(found)
    assert list(cells["above dense"])[:5] == ["", "+6.7%", "+14.7%", "+8.6%", "+0.0%"]  # of what each was pruned from
    assert cells["bits a byte"][2] == f"{1.72 / BIT:.4f} ± {0.02 / BIT:.4f}"
    page = (tmp_path / "text_gpt.md").read_text()
    assert "At 2:4" not in page
    assert "After training at 2:4 magnitude is best" in page
    assert "not better than magnitude: wanda" in page
    assert "the loss is 4.0% above that of the dense network" in page
    assert "1.75 times as fast" in page
    missing = page[page.index("Not there yet: ") :]
    assert "dense (1 of 2 seeds)" in missing
    assert "rigl 0.9" not in missing
    assert "static 0.8, static 0.9" in missing
    assert "wanda + owl, 0.5" in missing
    assert "sparsegpt, 2:4" in missing
    assert "text_gpt_cut" not in missing
    assert all((tmp_path / f"text_gpt_{theme}.png").stat().st_size > 10_000 for theme in ("light", "dark"))
    assert "not there yet: dense" in capsys.readouterr().out


def test_the_picture_names_every_line_once_and_ends_where_it_says(tmp_path):
    write_results(tmp_path)
    figure = text_gpt.picture(text_gpt.read(tmp_path))
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(labels) == len(set(labels))
    assert "wanda, 2:4, after training" in labels
    assert labels[0] == "rigl, from scratch"
    assert labels[-1] == "dense"
    assert figure.axes[0].get_ylim()[1] < 1.5 * 1.5 / BIT < 3.0 / BIT


def test_results_of_no_bytes_are_refused(tmp_path):
    write_json(tmp_path / text_gpt.AFTER, {"dense": {"test_accuracy": 0.9}, "rows": []})
    with pytest.raises(ValueError, match="of no bytes"):
        text_gpt.read(tmp_path)
    assert isinstance(text_gpt.from_scratch(tmp_path / "none.csv")[0], list)
    assert pd.isna(text_gpt.Found(pd.DataFrame(columns=list(text_gpt.COLUMNS)), (), {}).dense)
