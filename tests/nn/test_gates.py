import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsparse
from jaxsparse.nn import HardConcreteGate


@pytest.mark.slow
def test_every_example_has_its_own_gates_and_evaluation_has_none_drawn():
    gate, x = HardConcreteGate(log_alpha=0.3), jnp.ones((500, 2, 3, 8))
    variables = gate.init(jax.random.key(0), x)
    log_alpha = variables["params"]["log_alpha"]
    assert float(jnp.abs(log_alpha - 0.3).max()) < 0.05
    drawn = gate.apply(variables, x, rngs={"gates": jax.random.key(1)})
    assert drawn.shape == x.shape
    np.testing.assert_array_equal(drawn, jnp.broadcast_to(drawn[:, :1, :1], x.shape))  # one gate an image and channel
    open_share = np.asarray((drawn[:, 0, 0] > 0).mean())
    assert abs(open_share - float(jaxsparse.prob_open(0.3))) < 0.03
    np.testing.assert_allclose(gate.apply(variables, x)[0, 0, 0], jaxsparse.hard_concrete_mean(log_alpha), rtol=1e-6)
    together = HardConcreteGate(per_example=False).apply(variables, x, rngs={"gates": jax.random.key(1)})
    np.testing.assert_array_equal(together, jnp.broadcast_to(together[:1], x.shape))


def test_log_alpha_of_a_generator():
    x = jnp.ones((4, 8), jnp.bfloat16)
    y = HardConcreteGate().apply({}, x, jnp.full(8, -9.0))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, jnp.zeros_like(x))
    with pytest.raises(ValueError, match=r"needs x \(batch, ..., channels\), got shape \(8,\)"):
        HardConcreteGate().apply({}, x[0], jnp.ones(8))
    with pytest.raises(ValueError, match=r"needs log_alpha of shape \(8,\), got \(7,\)"):
        HardConcreteGate().apply({}, x, jnp.ones(7))
