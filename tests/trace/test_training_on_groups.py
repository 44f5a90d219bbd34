"""Methods that close channels, on groups derived from models as they are."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse
from jaxsparse import trace
from tests.trace.closing import apart, closed
from tests.trace.models import MODELS

# The batch is small, and some gates close a whole layer.
pytestmark = pytest.mark.filterwarnings("ignore:0 of .* are left, so nothing passes through")


def loss_of(apply, args):
    def loss(params):
        out = apply(params, *args)
        return jnp.mean(jnp.square(out - jnp.cos(jnp.arange(out.size)).reshape(out.shape)))

    return loss


def trained(tx, apply, params, args, steps, change=lambda state: state):
    """Params and state after some steps on one batch, from a state that is changed."""
    loss, state = loss_of(apply, args), change(tx.init(params))

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    jaxsparse.check(state, params)
    return params, state


def check_closed(apply, args, groups, params, state):
    """Some channels are closed, and without all their slices the outputs are the same."""
    tested, is_open = jaxsparse.eval_params(state, params), jaxsparse.open_channels(state)
    assert set(is_open) == {group.name for group in groups}
    shut = {name: ~np.asarray(which) for name, which in is_open.items()}
    assert sum(which.sum() for which in shut.values()) > 0, {name: which.sum() for name, which in shut.items()}
    assert not all(which.all() for which in shut.values())
    cut = tested
    for group in groups:
        cut = closed(cut, group, group.removes, shut[group.name])
    assert apart(apply(cut, *args), apply(tested, *args)) < 1e-5


def equinox_mlp():
    model = eqx.nn.MLP(12, 5, 16, 2, key=jax.random.key(0))
    arrays, static = eqx.partition(model, eqx.is_inexact_array)
    x = jnp.asarray(np.random.default_rng(2).normal(size=(7, 12)), jnp.float32)
    return lambda p, x: jax.vmap(eqx.combine(p, static))(x), arrays, (x,)


TRAINED = {
    "mlp eqx": equinox_mlp,
    "gpt linen scan+remat rms": MODELS["gpt linen scan+remat rms"],
    "gpt nnx mha": MODELS["gpt nnx mha"],
    "gpt plain fused gqa rope scan": MODELS["gpt plain fused gqa rope scan"],
}
SOME = [
    "mlp eqx",
    pytest.param("gpt plain fused gqa rope scan", marks=pytest.mark.slow),
    pytest.param("gpt linen scan+remat rms", marks=pytest.mark.slow),
    pytest.param("gpt nnx mha", marks=pytest.mark.slow),
]


@pytest.mark.slow
@pytest.mark.parametrize("name", SOME)
def test_l0_takes_derived_groups(name):
    apply, params, args = TRAINED[name]()
    groups = trace.channel_groups(apply, params, *args)
    groups = groups.per_layer() if groups.layers else groups
    penalty = jaxsparse.Penalty(1e-2, "all")
    tx = jaxsparse.l0(optax.adam(1e-3), groups, penalty=penalty, gate_optimizer=optax.adam(0.2))

    def spread_out(state):
        return state._replace(log_alpha={name: jnp.linspace(4, -3, la.size) for name, la in state.log_alpha.items()})

    params, state = trained(tx, apply, params, args, 4, spread_out)
    check_closed(apply, args, groups, params, state)
    rows = jaxsparse.remaining(params, groups, jaxsparse.open_channels(state))
    assert 0 < rows.params < 1
    measured = jaxsparse.inspect.measure(state, params, groups=groups)
    assert 0 < float(measured.density) < 1


@pytest.mark.parametrize("name", SOME)
def test_dep_l0_takes_derived_groups(name):
    apply, params, args = TRAINED[name]()
    groups = trace.channel_groups(apply, params, *args)
    tx = jaxsparse.dep_l0(
        optax.adam(1e-3), groups, penalty=jaxsparse.Penalty(3e-2, "all"), gate_optimizer=optax.adam(0.3)
    )
    params, state = trained(tx, apply, params, args, 6)
    check_closed(apply, args, groups, params, state)


def test_the_first_penalty_of_louizos_counts_derived_kernels():
    apply, params, args = TRAINED["mlp eqx"]()
    groups = trace.channel_groups(apply, params, *args)
    penalty = jaxsparse.Penalty(1.0)
    logits = [jnp.full(group.size, 30.0) for group in groups]
    assert float(penalty.value(groups, params, logits)) == pytest.approx(16 * 12 + 16 * 16, rel=1e-4)


@pytest.mark.slow
def test_rda_closes_the_channels_of_derived_groups():
    apply, params, args = MODELS["mlp"]()
    groups = trace.channel_groups(apply, params, *args)
    units = groups.structures()
    assert {path: (s.layout.inputs, s.layout.outputs) for path, s in units.items()} == {
        "fc2/kernel": ((1,), (0,)),
        "fc3/kernel": ((1,), (0,)),
    }
    step_size, averaging = jaxsparse.rda_cosine(0.5, steps=30)
    tx = jaxsparse.rda(step_size, l1=8e-3, averaging=averaging, structure=units, prunable=["fc2/kernel", "fc3/kernel"])
    params, state = trained(tx, apply, params, args, 30)
    params = jaxsparse.eval_params(state, params)
    found = 0
    for group in groups:
        (which,) = group.multiplies
        shut = ~np.asarray(params[which.path.split("/")[0]]["kernel"]).any(1)
        found += shut.sum()
        cut = closed(params, group, group.removes, shut)
        assert apart(apply(cut, *args), apply(params, *args)) < 1e-5
    assert 0 < found < 32 + 24
