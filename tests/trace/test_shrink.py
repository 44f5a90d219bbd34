import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from jaxsparse import trace
from jaxsparse.trace.shrink import Shrunk
from jaxsparse.trace.slim import kept_entries
from jaxsparse.trace.states import cut_params
from tests.trace.linen_models import rand
from tests.trace.slimming import gate_masks, masked, outputs_and_gradients, relative, some_closed
from tests.trace.test_random_programs import STEP, Program

PARAMS = {"w": rand(6, 12), "v": rand(12, 5)}
X = rand(4, 6, seed=3)
CLOSED = np.isin(np.arange(12), [0, 3, 4, 7, 11])


@jax.custom_jvp
def soft(x):
    return jnp.maximum(x, 0) + 0.1 * x


@soft.defjvp
def _(primals, tangents):
    return soft(*primals), tangents[0] * jax.nn.sigmoid(primals[0] * 3)


@jax.custom_jvp
def leaky(x, slope):
    return jnp.maximum(x, slope * x)


@leaky.defjvp
def _(primals, tangents):
    x, slope = primals
    return leaky(x, slope), jnp.where(x > 0, 1.0, slope) * tangents[0] + jnp.minimum(x, 0) * tangents[1]


def leaky_by_a_number(x):
    return leaky(x, 0.3)


@jax.custom_vjp
def straight_through(x):
    return jnp.round(x * 4) / 4


straight_through.defvjp(lambda x: (straight_through(x), None), lambda _, g: (2 * g,))


@jax.custom_vjp
def scaled_rounding(x):  # each row is rounded by its own scale, which the derivative takes as constant
    scale = jnp.abs(x).max(0, keepdims=True) / 7
    return jnp.round(x / scale) * scale


scaled_rounding.defvjp(lambda x: (scaled_rounding(x), x), lambda x, g: (jnp.where(jnp.abs(x) > 1, 0, 3 * g),))


@jax.custom_vjp
def times_number(x, n):
    return x * n


times_number.defvjp(lambda x, n: (x * n, n), lambda n, g: (5 * g, None))


def between(f):
    """Groups and results of (f of the hidden units), masked and slim."""

    def apply(params, x):
        return f(x @ params["w"]) @ params["v"]

    groups = trace.channel_groups(apply, PARAMS, X)
    assert groups, groups.frozen
    closed = {group.name: CLOSED[: group.size] for group in groups}
    shut = masked(PARAMS, gate_masks(PARAMS, groups, closed))
    small = trace.slim(apply, shut, closed, X, groups=groups)
    assert small.params["v"].shape[0] <= 8
    out, grads = outputs_and_gradients(apply, shut, X)
    small_out, small_grads = outputs_and_gradients(small.apply, small.params, X)
    assert relative(small_out, out) < 2e-6
    assert relative(small_grads, cut_params(grads, kept_entries(groups, closed, small.apply.full))) < 2e-6
    return small


@pytest.mark.parametrize(
    "f", [soft, leaky_by_a_number, straight_through, scaled_rounding, jax.nn.relu], ids=lambda f: f.__name__
)
def test_custom_derivatives_are_kept_and_cut(f, monkeypatch):
    def refuse(*args):
        raise AssertionError("computed at full size")

    monkeypatch.setattr(Shrunk, "at_full_size", refuse)
    small = between(f)
    program = jax.jit(jax.grad(lambda params: small.apply(params, X).sum())).lower(small.params).as_text()
    assert "4x7xf32" in program
    assert "4x12xf32" not in program


def test_a_custom_derivative_with_integers_is_computed_at_full_size():
    between(lambda h: times_number(h, jnp.arange(12)[None] % 3))


@pytest.mark.parametrize(
    "f",
    [
        lambda h: jnp.pad(h, ((0, 0), (2, 1)))[:, 2:14],
        lambda h: jnp.concatenate([h[:, ::2], h[:, 1::2]], 1)[:, np.array([0, 6, 1, 7, 2, 8, 3, 9, 4, 10, 5, 11])],
        lambda h: jnp.concatenate(jnp.split(h, [3, 7], 1)[::-1], 1)[:, ::-1],
        lambda h: h.reshape(4, 3, 4).transpose(0, 2, 1).reshape(4, 12) * 1.5,
        lambda h: lax.cumsum(h, 0) + jnp.sort(h, 0) + lax.dynamic_slice(h, (0, 0), (1, 12)),
        lambda h: lax.dynamic_update_slice(h, h[:2] * 2, (1, 0)) + jnp.roll(h, 1, 0),
        lambda h: lax.reduce_window(h, 0.0, lax.add, (2, 1), (1, 1), "SAME"),
        lambda h: h * jnp.cos(jnp.arange(12.0))[None] + jax.random.normal(jax.random.key(0), h.shape),
        lambda h: lax.cond(X[0, 0] > 9, jnp.tanh, jnp.sin, lax.stop_gradient(h)) + h,
        lambda h: lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h) + i, h),
        lambda h: h[jnp.array([0, 2, 1, 3])] + h[jnp.argmax(X[:, 0])][None],
        lambda h: jax.checkpoint(jnp.tanh)(h) * jax.jit(jnp.cos)(h),
    ],
    ids=["pad", "slices", "split", "transpose", "rows", "updates", "window", "made", "cond", "loop", "gather", "remat"],
)
def test_primitives_at_smaller_shapes(f):
    between(f)


@pytest.mark.slow
def test_programs_of_shards():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.PartitionSpec("data")

    def apply(params, x):
        def shard(params, x):
            return lax.psum(jax.nn.relu(x @ params["w"]).sum(0, keepdims=True), "data") @ params["v"]

        whole = jax.sharding.PartitionSpec()
        return jax.shard_map(shard, mesh=mesh, in_specs=(whole, rows), out_specs=whole)(params, x)

    small = trace.slim(apply, PARAMS, {"w": CLOSED}, X)
    shut = {"w": PARAMS["w"], "v": jnp.where(CLOSED[:, None], 0, PARAMS["v"])}
    trace.same(lambda x: apply(shut, x), lambda x: small.apply(small.params, x), X, rtol=2e-6)


def test_what_nothing_is_cut_in_stays_a_call():
    def apply(params, x):
        return jax.jit(jnp.tanh)(x) @ params["w"] @ params["v"]

    small = trace.slim(apply, PARAMS, {"w": CLOSED}, X)
    assert "name=tanh" in str(jax.make_jaxpr(small.apply)(small.params, X))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:apply does not use these params")
def test_random_programs_without_a_third_of_their_channels():
    cut = []

    @settings(max_examples=60)
    @given(st.lists(STEP, min_size=1, max_size=7))
    def check(steps):
        program = Program(steps)
        groups = trace.channel_groups(program, program.params, program.x)
        closed = some_closed(groups)
        shut = masked(program.params, gate_masks(program.params, groups, closed))
        small = trace.slim(program, shut, closed, program.x, groups=groups)
        trace.same(lambda x: program(shut, x), lambda x: small.apply(small.params, x), program.x, rtol=1e-5)
        cut.append(len(small.apply.kept))

    check()
    assert sum(cut) > 60
