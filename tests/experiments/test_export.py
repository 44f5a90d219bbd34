import json
import runpy
import shutil
import subprocess
import sys
from contextlib import ExitStack, closing
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxsparse
from experiments import data, export, options
from experiments.checkpoints import Checkpoints
from experiments.program import make_program
from experiments.workdir import open_runs
from jaxsparse.artifacts import formats

ROOT = Path(__file__).parents[2]
KEPT = 5_020  # a tenth of the 50,200 weights


def make_config(name="digits_sparse_momentum", **changes):
    config = options.small(runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]()).lock()
    config.update_from_flattened_dict({"epochs": 1, "data_dir": None, **changes})
    return config


def begun(workdir, config, seeds=None):
    """What a run leaves in its folder, or in the first of its seeds' folders, before its first step; and its state."""
    program = make_program(config, data.load(config.data.name, examples=64), side_by_side=seeds is not None)
    state = program.init(config.seed if seeds is None else np.asarray(seeds))
    with closing(Checkpoints(workdir / "checkpoints")) as checkpoints, ExitStack() as stack:
        checkpoints.save(0, state)
        open_runs(stack, config, workdir, seeds)
    return state


@pytest.fixture(scope="module")
def sparse_run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "sparse"
    state = begun(workdir, make_config())
    return workdir, state.params, jaxsparse.get_masks(state.opt_state, state.params)


def same(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def test_sparse(sparse_run, tmp_path, capsys):
    workdir, params, masks = sparse_run
    export.main([str(workdir), str(tmp_path / "model.safetensors")])
    same(jaxsparse.load_sparse(tmp_path / "model.safetensors"), (params, masks))
    out = capsys.readouterr().out
    assert "10.00%  gaps, float32" in out
    assert "dense: 202,440 bytes, " in out


def test_smaller_and_to_other_formats(sparse_run, tmp_path, capsys):
    workdir, _, masks = sparse_run
    export.main([str(workdir), str(tmp_path / "small"), "--dtype=bfloat16"])
    assert "gaps, bfloat16" in capsys.readouterr().out
    assert (tmp_path / "small").stat().st_size < 0.1 * 202_440
    loaded, loaded_masks = jaxsparse.load_sparse(tmp_path / "small")
    same(loaded_masks, masks)
    export.main([str(tmp_path / "small"), str(tmp_path / "model.npz")])
    same(formats.load_npz(tmp_path / "model.npz"), (loaded, loaded_masks))
    export.main([str(tmp_path / "small"), str(tmp_path / "dense"), "--to=dense"])
    same(formats.load_dense(tmp_path / "dense"), loaded)
    out = capsys.readouterr().out
    assert f"{KEPT:,}   10.00%" in out
    assert "bytes, 100." in out


@pytest.mark.slow
def test_dense_runs_and_gates(tmp_path, capsys):
    state = begun(tmp_path / "dense", make_config(dense=True))
    export.main([str(tmp_path / "dense"), str(tmp_path / "model")])
    params, masks = jaxsparse.load_sparse(tmp_path / "model")
    same(params, state.params)
    assert all(mask.shape == () for mask in jax.tree.leaves(masks))
    gates = {"data.name": "digits", "data.mean": None, "data.std": None}
    state = begun(tmp_path / "gates", make_config("mnist_l0", **gates))
    for out in ("model", "model.npz"):
        export.main([str(tmp_path / "gates"), str(tmp_path / out)])
        load = formats.load_npz if out.endswith(".npz") else jaxsparse.load_sparse
        same(load(tmp_path / out)[0], jaxsparse.eval_params(state.opt_state, state.params))


@pytest.mark.slow
def test_seeds_side_by_side(tmp_path):
    states = begun(tmp_path / "runs", make_config(), seeds=[3, 5])
    export.main([str(tmp_path / "runs" / "seed_5"), str(tmp_path / "model")])
    same(jaxsparse.load_sparse(tmp_path / "model")[0], jax.tree.map(lambda x: x[1], states.params))


def test_a_run_of_a_machine_with_another_number_of_devices(tmp_path):
    config = make_config(**{"parallel.layout": "data", "data.batch_size": 30})  # this one's cannot share such batches
    program = make_program(config, data.load("digits", examples=64), devices=jax.devices()[:5])
    state = program.init(0)
    collected = program.layout.collect(program.layout.place(state))
    with closing(Checkpoints(tmp_path / "run" / "checkpoints")) as checkpoints, ExitStack() as stack:
        checkpoints.save(0, collected, devices=5, stream=None, pruned=())
        open_runs(stack, config, tmp_path / "run", None)
    assert len(jax.devices()) == 8
    export.main([str(tmp_path / "run"), str(tmp_path / "model.safetensors")])
    params, _ = jaxsparse.load_sparse(tmp_path / "model.safetensors")
    same(params, jaxsparse.sparsify(state.opt_state, state.params))


def test_errors_in_one_line(sparse_run, tmp_path):
    workdir, *_ = sparse_run
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").write_bytes(b"bad")
    (tmp_path / "begun").mkdir()
    shutil.copy(workdir / "config.json", tmp_path / "begun")
    for args, message in (
        (["empty", "out"], "empty' is not the folder of a run: it has no config.json"),
        (["begun", "out"], "begun' has no checkpoint"),
        (["nowhere", "out"], "No such file.*nowhere"),
        (["bad", "out"], "bad: damaged, or not a safetensors file"),
        ([str(workdir), "nowhere/out"], "No such file"),
        ([str(workdir), "out.npz", "--dtype=float16"], "--dtype is for --to=sparse, and this is npz"),
    ):
        with pytest.raises(SystemExit, match=f"error: .*{message}"):
            export.main([str(tmp_path / args[0]), str(tmp_path / args[1]), *args[2:]])
    assert not (tmp_path / "out").exists()
    assert json.loads((workdir / "config.json").read_text())["epochs"] == 1


@pytest.mark.slow
def test_help():
    run = [sys.executable, "-m", "experiments.export", "--help"]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120, check=False, cwd=ROOT)
    assert done.returncode == 0
    assert "WORKDIR_OR_FILE" in done.stdout
