"""Re-evaluation of a program without rules: not a bit differs from the function, whatever surrounds either."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxsparse.trace.evaluate import ITSELF, Evaluator
from jaxsparse.trace.program import live_eqns, opened, trace
from tests.problems import slow_except
from tests.trace.models import MODELS, rand

QUICK = ("mlp", "gpt linen scan+remat rms", "rnn linen")


def again(apply, evaluator=Evaluator):
    """The function, evaluated from its jaxpr."""

    def call(params, *args):
        traced = trace(apply, params, *args)
        return traced.rebuild(evaluator().run(traced.closed, traced.leaves))

    return call


def assert_same_bits(found, expected):
    found, expected = (jax.tree.flatten(tree) for tree in (found, expected))
    assert found[1] == expected[1]
    for a, b in zip(found[0], expected[0], strict=True):
        if eqx.is_array(b) and jnp.issubdtype(b.dtype, jax.dtypes.extended):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert np.asarray(a).dtype == np.asarray(b).dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def with_gradients(apply):
    """Outputs, loss and gradients, jitted."""

    @eqx.filter_jit
    def call(params, *args):
        floats, rest = eqx.partition(params, eqx.is_inexact_array)

        def loss(floats):
            out = apply(eqx.combine(floats, rest), *args)
            leaves = [leaf for leaf in jax.tree.leaves(out) if eqx.is_inexact_array(leaf)]
            return sum((leaf * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape)).sum() for leaf in leaves), out

        return jax.value_and_grad(loss, has_aux=True)(floats)

    return call


def described(jaxpr):
    """The steps of a program, with jitted functions in their place: two of the same description compute the same."""
    steps = []
    for eqn in live_eqns(opened(jaxpr)[0]):
        name, params = eqn.primitive.name, eqn.params
        if name == "jit":
            steps += described(params["jaxpr"])
        elif name == "cond":
            steps.append((name, *map(described, params["branches"])))
        elif name == "while":
            steps.append((name, described(params["cond_jaxpr"]), described(params["body_jaxpr"])))
        elif name in ("scan", "remat2", "checkpoint", "shard_map"):
            kept = {
                key: params.get(key) for key in ("length", "reverse", "unroll", "policy", "prevent_cse", "in_specs")
            }
            steps.append((name, str(kept), described(params["jaxpr"])))
        elif name in ("clamp", "convert_element_type") and not eqn.outvars[0].aval.shape:
            continue  # lax.switch clamps its index; constants are converted at once where jit has a step for it
        else:
            plain = {key: value for key, value in params.items() if not ("jaxpr" in key or callable(value))}
            shapes = [str(v.aval) for v in (*eqn.invars, *eqn.outvars)]
            steps.append((name, str(plain) if "custom" not in name else "", *shapes))
    return steps


@pytest.mark.parametrize("name", slow_except(("lenet", "gpt nnx mha", "gpt eqx scan vmap", "experts", *QUICK), MODELS))
def test_no_step_of_a_model_differs(name):
    apply, params, args = MODELS[name]()
    found, expected = (described(trace(f, params, *args).closed) for f in (again(apply), apply))
    assert len(expected) >= 3
    assert found == expected


@pytest.mark.parametrize("name", slow_except(QUICK, MODELS))
def test_no_bit_of_a_model_differs(name):
    apply, params, args = MODELS[name]()
    (_, found), found_gradients = with_gradients(again(apply))(params, *args)
    (_, expected), gradients = with_gradients(apply)(params, *args)
    assert_same_bits(found, expected)
    # Derivatives of a value that is used in several places are added up in another order, if some are jitted by JAX.
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradients))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * largest), found_gradients, gradients)


@pytest.mark.slow
def test_examples_and_params_may_be_mapped_over():
    apply, params, args = MODELS["gpt plain fused gqa rope scan"]()
    many = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params)
    for axes in ((0, None), (None, 0)):
        given = (many if axes[0] == 0 else params, args[0] if axes[1] is None else args[0][:, None])
        found, expected = (jax.jit(jax.vmap(f, axes))(*given) for f in (again(apply), apply))
        assert_same_bits(found, expected)


@jax.custom_vjp
def halved_gradient(x):
    return x * 1.0


halved_gradient.defvjp(lambda x: (x, None), lambda _, g: (g / 2,))


@jax.custom_jvp
def doubled_tangent(x):
    return x * 1.0


doubled_tangent.defjvp(lambda primals, tangents: (primals[0], 2 * tangents[0]))


def while_loop(p, x):
    return lax.while_loop(lambda c: (c[1] < 5.0) & (p["n"] > c[0]), lambda c: (c[0] + 1, c[1] + 1.5), (0, x.sum()))


PROGRAMS = {
    "cond": lambda p, x: lax.cond(x.sum() > 0, lambda w: x @ w, lambda w: x @ (w * 2), p["w"]),
    "switch": lambda p, x: lax.switch(p["n"], [lambda x: x, jnp.sin, jnp.cos], x @ p["w"]),
    "fori with a known number of rounds": lambda p, x: lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ p["w"]) * i, x),
    "scan from the end": lambda p, x: lax.scan(lambda c, y: (jnp.sin(c + y), c), x[0], x @ p["w"], reverse=True),
    "checkpoint with a policy": lambda p, x: jax.checkpoint(
        lambda x: jnp.tanh(x @ p["w"]) @ p["w"], policy=jax.checkpoint_policies.dots_saveable
    )(x),
    "custom_vjp": lambda p, x: halved_gradient(x @ p["w"]),
    "custom_jvp": lambda p, x: doubled_tangent(x @ p["w"]),
    "jit in jit": lambda p, x: jax.jit(lambda w: jax.jit(jnp.sin)(x @ w))(p["w"]),
    "lower precision": lambda p, x: (x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16)).astype(jnp.float32),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_control_flow_and_derivatives_are_rebuilt(name):
    params, x = {"w": rand(4, 4), "n": jnp.int32(2)}, rand(3, 4, seed=1)

    def apply(p, x):
        return PROGRAMS[name](p, x), p["w"].sum() * p["n"]

    found, expected = (with_gradients(f)(params, x) for f in (again(apply), apply))
    assert_same_bits(found, expected)
    assert any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(found[1]))
    assert_same_bits(again(apply)(params, x), apply(params, x))


def test_a_while_loop_is_rebuilt():
    params, x = {"n": jnp.int32(2)}, rand(3, 4, seed=1)
    assert_same_bits(jax.jit(again(while_loop))(params, x), jax.jit(while_loop)(params, x))
    assert int(while_loop(params, x)[0]) == 2
    tangents = [jax.jvp(lambda x, f=f: f(params, x)[1], (x,), (x,)) for f in (again(while_loop), while_loop)]
    assert_same_bits(*tangents)


def test_shard_map_is_rebuilt():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def apply(p, x):
        def inside(p, x):
            return lax.psum(jnp.tanh(x @ p).sum(0, keepdims=True), "data"), x @ p

        return jax.shard_map(inside, mesh=mesh, in_specs=(P(), P("data")), out_specs=(P(), P("data")))(p, x)

    params, x = rand(4, 8), rand(6, 4, seed=5)
    assert_same_bits(with_gradients(again(apply))(params, x), with_gradients(apply)(params, x))


def test_effects_happen_once_and_dead_code_is_left_out():
    seen, evaluated = [], []

    class Watching(Evaluator):
        def rule(self, eqn, args, context):
            evaluated.append(eqn.primitive.name)
            return ITSELF

    def apply(p, x):
        h = x @ p
        jnp.sin(h)
        jax.debug.callback(lambda s: seen.append(float(s)), h.sum())
        return h

    again(apply, Watching)(jnp.ones((4, 2)), jnp.ones((1, 4)))
    jax.effects_barrier()
    assert seen == [8.0]
    assert "sin" not in evaluated
    assert "dot_general" in evaluated


def test_effects_keep_their_order_in_loops_and_references_work():
    seen = []

    def apply(p, x):
        def body(c, _):
            jax.debug.callback(lambda s: seen.append(float(s)), c.sum(), ordered=True)
            return c @ p, None

        total = jax.new_ref(jnp.zeros((2, 3)))
        total[...] = lax.scan(body, x, length=2)[0]
        total[...] += x
        return total[...]

    params, x = jnp.ones((3, 3)), jnp.ones((2, 3))
    np.testing.assert_array_equal(jax.jit(again(apply))(params, x), 10 * x)
    jax.effects_barrier()
    assert seen == [6.0, 18.0]


class Boxed(Evaluator):
    """Params stay in boxes until something computes with them."""

    def rule(self, eqn, args, context):
        self.seen |= {(eqn.primitive.name, context) for arg in args if isinstance(arg, tuple)}
        return ITSELF

    def plain(self, value):
        return value[0] if isinstance(value, tuple) else value

    def inner(self, context, eqn, which=0):
        return (*context, (eqn.primitive.name, which))


def test_values_stay_pytrees_through_scan_branches_and_checkpoint():
    def apply(p, x):
        def layer(x, w):
            y = jax.checkpoint(lambda x, w: jnp.tanh(x @ w))(x, w)
            return lax.cond(x.sum() > 0, lambda x, w: x @ w, lambda x, w: x, y, w), None

        return lax.scan(layer, x, p)[0]

    params, x = rand(3, 4, 4), rand(2, 4, seed=1)
    traced, boxed = trace(apply, params, x), Boxed()
    boxed.seen = set()
    found = jax.jit(lambda w, x: boxed.run(traced.closed, [(w,), x], ()))(params, x)
    np.testing.assert_array_equal(found[0], jax.jit(apply)(params, x))
    products = {place for name, place in boxed.seen if name == "dot_general"}
    assert any("cond" in [name for name, _ in place] for place in products)
    assert any("cond" not in [name for name, _ in place] for place in products)
    assert all(place[0] == ("scan", 0) for place in products)
