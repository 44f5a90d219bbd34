import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from chex import assert_trees_all_equal

import jaxsparse
from experiments.checkpoints import Checkpoints


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
    monkeypatch.setattr("experiments.checkpoints._digests", lambda state: ["another"])
    with pytest.raises(OSError, match="step 30: its values are not those that were saved; step 20: its values"):
        checkpoints.restore(like=make_state())


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
