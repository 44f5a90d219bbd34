import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from chex import assert_trees_all_equal

import jaxsparse
from experiments import checksums
from experiments.checkpoints import Checkpoints
from tests.experiments import processes


def make_state(seed=0):
    params = {"kernel": jax.random.normal(jax.random.key(seed), (30, 40)), "bias": jnp.zeros(40, jnp.bfloat16)}
    tx = jaxsparse.chain(optax.sgd(0.1, momentum=0.9), jaxsparse.sparse_momentum(0.9, 10, key=seed))
    return {"params": params, "opt_state": tx.init(params), "model_state": {}, "key": jax.random.key(seed)}


@pytest.fixture
def checkpoints(tmp_path):
    made = Checkpoints(tmp_path / "checkpoints")
    for step in (10, 20, 30):
        made.save(step, make_state(step))
    made.wait()
    yield made
    made.close()


def damage(checkpoints, step):
    """Flips a bit in the middle of every file that is large enough to hold values."""
    for path in (checkpoints.folder / str(step) / "state").rglob("d/*"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(bytes(content))


def test_newest_two_are_kept_and_the_newest_is_restored(checkpoints):
    assert checkpoints.steps() == [20, 30]
    step, state = checkpoints.restore(like=make_state())
    assert step == 30
    assert_trees_all_equal(jax.tree.map(plain, state), jax.tree.map(plain, make_state(30)))
    assert jax.tree.structure(state) == jax.tree.structure(make_state())


def plain(leaf):
    return jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def test_nothing_to_restore(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.restore(like=make_state()) is None
    checkpoints.close()


def test_damaged_newest_falls_back_with_a_warning(checkpoints, caplog, monkeypatch):
    warnings = []
    monkeypatch.setattr("absl.logging.warning", lambda text, *args: warnings.append(text % args))
    damage(checkpoints, 30)
    step, state = checkpoints.restore(like=make_state())
    assert step == 20
    assert_trees_all_equal(state["params"], make_state(20)["params"])
    assert len(warnings) == 1
    assert "the checkpoint of step 30 is damaged" in warnings[0]
    assert (checkpoints.folder.parent / "damaged" / "30").is_dir()
    assert checkpoints.steps() == [20]
    checkpoints.save(30, make_state(30))  # the place is free again
    checkpoints.wait()
    assert checkpoints.restore(like=make_state())[0] == 30


def test_half_written_newest_is_not_seen(checkpoints):
    (checkpoints.folder / "40.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    again = Checkpoints(checkpoints.folder)
    assert again.restore(like=make_state())[0] == 30
    again.close()


def test_newest_with_a_file_missing_falls_back(checkpoints):
    for path in (checkpoints.folder / "30" / "state").rglob("manifest.ocdbt"):
        path.unlink()
    assert checkpoints.restore(like=make_state())[0] == 20


def test_values_that_are_not_those_saved_are_found(checkpoints, monkeypatch):
    real = checksums.parts

    def changed(state):
        state["params"]["bias"] = state["params"]["bias"].at[3].set(1e-30)
        return real(state)

    monkeypatch.setattr(checksums, "parts", changed)
    with pytest.raises(OSError, match="step 30: the values of params/bias are not those that were saved; step 20: the"):
        checkpoints.restore(like=make_state())


# Of two processes; on other devices than when it was saved.
PROGRAM = """
import sys
import jax, jax.numpy as jnp, numpy as np
from pathlib import Path
from typing import Any, NamedTuple
folder, coordinator, count, process, what = sys.argv[1:]
jax.distributed.initialize(coordinator, int(count), int(process))
from experiments.checkpoints import Checkpoints
from jaxsparse.parallel import FullySharded, any_process

class State(NamedTuple):
    params: Any
    model_state: Any

def made(step):
    return State({"kernel": np.random.default_rng(step).random((64, 512), np.float32)}, np.full(3, step, np.float32))

layout, checkpoints = FullySharded(), Checkpoints(folder)
if what == "save":
    for step in (1, 2):
        checkpoints.save(step, layout.collect(layout.place(made(step))), devices=layout.size)
        checkpoints.wait()
    any_process(False)
    if process == "0":  # damages what the other one reads
        for file in (Path(folder) / "2/state/ocdbt.process_1").rglob("d/*"):
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 1
            file.write_bytes(bytes(content))
    any_process(False)
else:
    shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, made(1)))
    step, state = checkpoints.restore(lambda about: layout.collected_shapes(shapes, about["devices"]))
    state = layout.restore(state)
    for placed, leaf in zip(jax.tree.leaves(layout.one_copy(state)), jax.tree.leaves(made(step)), strict=True):
        np.testing.assert_array_equal(placed, leaf)
    print("restored", step, "on", layout.size)
checkpoints.close()
any_process(False)
jax.distributed.shutdown()
"""


@pytest.mark.slow
def test_two_processes_fall_back_together_and_go_on_with_other_devices(tmp_path):
    def run(what, devices):
        command = ["-c", PROGRAM, str(tmp_path / "saved"), "<COORDINATOR>", "<PROCESSES>", "<PROCESS>", what]
        outputs, codes = processes.ends(processes.start(command, devices=devices), timeout=120)
        assert codes == [0, 0], outputs
        return outputs

    run("save", 2)
    for output in run("restore", 1):
        assert "the checkpoint of step 2 is damaged" in output
        assert "restored 1 on 2" in output
    assert (tmp_path / "damaged/2").is_dir()
    for output in run("restore", 2):
        assert "restored 1 on 4" in output


def test_all_damaged_is_an_error_and_nothing_is_moved(checkpoints):
    damage(checkpoints, 20)
    damage(checkpoints, 30)
    with pytest.raises(OSError, match="no checkpoint in .* can be restored: step 30: .*Delete the workdir"):
        checkpoints.restore(like=make_state())
    assert checkpoints.steps() == [20, 30]


def test_state_may_be_donated_at_once(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    state = {"w": jnp.arange(1_000_000.0)}
    checkpoints.save(1, state)
    jax.block_until_ready(jax.jit(lambda s: {"w": s["w"] * 0}, donate_argnums=0)(state))
    restored = checkpoints.restore(like={"w": jax.ShapeDtypeStruct((1_000_000,), jnp.float32)})
    np.testing.assert_array_equal(restored[1]["w"], np.arange(1_000_000.0))
    checkpoints.close()
