import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse
from tests.problems import make_params, make_step

# By hand, half of ten weights. By sign, of 8 4 2 1 the smaller two go, of -16 -8 -2 -1 those closer to 0, and the two
# that are 0. By magnitude five of ten go: 0, 0, 1, -1 and, of 2 and -2, the one with the higher index.
WEIGHTS = [8.0, 4.0, 2.0, 1.0, -16.0, -8.0, -2.0, -1.0, 0.0, 0.0] + [0.0] * 10
STAY = {"sign": [0, 1, 4, 5], "magnitude": [0, 1, 2, 4, 5]}


def exchanged(drop, gradient=1e-3):
    params = {"kernel": jnp.asarray(WEIGHTS)}
    tx = jaxsparse.chain(
        optax.sgd(1.0, momentum=0.9),
        jaxsparse.sparse_evolutionary(
            0.5, 1, masks={"kernel": jnp.arange(20) < 10}, drop_fraction=0.5, drop=drop, key=3
        ),
    )
    opt_state = tx.init(params)
    grads = {"kernel": jnp.where(params["kernel"] == 0, 0, gradient * jnp.sign(params["kernel"]))}
    for _ in range(2):  # masks change on step 1
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    return np.asarray(jaxsparse.get_masks(opt_state)["kernel"]), np.asarray(params["kernel"])


def test_by_hand():
    for drop, stay in STAY.items():
        mask, values = exchanged(drop)
        assert mask.sum() == 10
        assert mask[stay].all()
        regrown = np.setdiff1d(np.flatnonzero(mask[:10]), stay)  # at once, so that they keep their values
        assert set(np.flatnonzero(values)) == {*stay, *(i for i in regrown if WEIGHTS[i])}
        grown = np.setdiff1d(np.flatnonzero(mask), np.arange(10))  # 0 after the step that grows them
        assert len(grown) > 0
        np.testing.assert_array_equal(values[grown], 0)


@pytest.mark.slow
def test_growth_is_random_and_depends_on_the_key():
    params = make_params()
    ends = []
    for key in (0, 0, 1):
        tx = jaxsparse.chain(
            optax.sgd(0.1), jaxsparse.sparse_evolutionary(0.75, 2, masks=jaxsparse.random_masks(params, 0.75), key=key)
        )
        opt_state, step, trained = tx.init(params), make_step(tx), params
        for count in range(3):
            trained, opt_state = step(trained, opt_state, count)
        ends.append(jaxsparse.get_masks(opt_state))
    jax.tree.map(np.testing.assert_array_equal, ends[0], ends[1])
    assert (ends[0]["dense"]["kernel"] != ends[2]["dense"]["kernel"]).any()


def test_bad_options_are_named():
    for options, words in (
        ({"drop": "both"}, 'drop must be "sign" or "magnitude"'),
        ({"structure": "channel"}, 'drop="sign" tells positive weights from negative ones, and units have no sign'),
        ({"drop_fraction": -0.1}, "drop_fraction must be at least 0"),
        ({"sparsity": 2}, "sparsity is the fraction of zeros"),
    ):
        with pytest.raises(ValueError, match=words):
            jaxsparse.sparse_evolutionary(**{"sparsity": 0.9, "update_every": 10, **options})
    jaxsparse.sparse_evolutionary(0.9, 10, drop="magnitude", structure="channel")
