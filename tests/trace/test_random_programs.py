"""Random small programs: what is called exact is exact, and nothing that is called removable changes an output."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from jaxsparse import trace
from tests.trace.closing import check_exact

WIDTHS = (4, 6, 8)
BATCH = 3


class Program:
    """A function of params that is written step by step, by numbers; each step adds to the values it has."""

    def __init__(self, steps):
        self.steps, self.params = steps, {}
        self.x = jnp.asarray(np.random.default_rng(0).normal(size=(BATCH, 5)), jnp.float32)
        jax.eval_shape(lambda: self(None, self.x))  # makes the params
        self.params = jax.tree.map(jnp.asarray, self.params)

    def leaf(self, given, name, *shape):
        if given is None:
            rng = np.random.default_rng(len(self.params))
            self.params[name] = (rng.normal(size=shape) / np.sqrt(shape[0]) + 0.1).astype(np.float32)
            return jnp.ones(shape)
        return given[name]

    def __call__(self, given, x):
        values = [x @ self.leaf(given, "in", 5, 8)]
        values.append(jnp.tanh(values[0] + self.leaf(given, "b", 8)[None]))
        for number, (kind, one, two) in enumerate(self.steps):
            a = values[-1 - one % len(values)]
            same = [v for v in values if v.shape == a.shape]
            b = same[two % len(same)]
            values.append(STEPS[kind % len(STEPS)](self, given, f"{number}", a, b, two))
        last = values[-1] @ self.leaf(given, "out", values[-1].shape[-1], 3)
        return last + values[len(values) // 2].sum(-1, keepdims=True)


def dense(p, given, name, a, b, n):
    return a @ p.leaf(given, f"{name}w", a.shape[-1], WIDTHS[n % 3]) + p.leaf(given, f"{name}b", WIDTHS[n % 3])[None]


def there_and_back(p, given, name, a, b, n):
    w = p.leaf(given, f"{name}tied", a.shape[-1], WIDTHS[n % 3])
    return jax.nn.relu(a @ w) @ w.T


def norm(p, given, name, a, b, n):
    return a * lax.rsqrt(jnp.mean(a * a, -1, keepdims=True) + 1e-3) * p.leaf(given, f"{name}s", a.shape[-1])[None]


def layer_norm(p, given, name, a, b, n):
    mean, square = a.mean(-1, keepdims=True), (a * a).mean(-1, keepdims=True)
    return (a - mean) * lax.rsqrt(square - mean * mean + 1e-2) * p.leaf(given, f"{name}s", a.shape[-1])[None]


def heads(p, given, name, a, b, n):
    shape = (BATCH, 2, a.shape[-1] // 2)
    scores = jnp.einsum("bhd,bgd->bhg", a.reshape(shape), b.reshape(shape))
    return jnp.einsum("bhg,bgd->bhd", jax.nn.softmax(scores), a.reshape(shape)).reshape(BATCH, -1)


def shuffled(p, given, name, a, b, n):
    return jnp.swapaxes(a.reshape(BATCH, 2, -1), 1, 2).reshape(BATCH, -1)


def gated_by_head(p, given, name, a, b, n):
    gate = jax.nn.sigmoid(a @ p.leaf(given, f"{name}g", a.shape[-1], 2))
    return (b.reshape(BATCH, 2, -1) * gate[:, :, None]).reshape(BATCH, -1)


def halves(p, given, name, a, b, n):
    first, second = jnp.split(a, 2, -1)
    return jnp.concatenate([second * 2, first], -1) if n % 2 else first * jax.nn.sigmoid(second)


def joined(p, given, name, a, b, n):
    return jnp.concatenate([a, b], -1)[:, : max(8, a.shape[-1])] if a.shape[-1] > 4 else jnp.concatenate([a, b], -1)


def looped(p, given, name, a, b, n):
    stack = p.leaf(given, f"{name}stack", 2, a.shape[-1], a.shape[-1])
    return lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), a, stack)[0]


def mlp_in_a_loop(p, given, name, a, b, n):
    up, down = p.leaf(given, f"{name}up", 2, a.shape[-1], 6), p.leaf(given, f"{name}down", 2, 6, a.shape[-1])
    return lax.scan(lambda x, w: (x + jax.nn.gelu(x @ w[0]) @ w[1], None), a, (up, down))[0]


def picked(p, given, name, a, b, n):
    order = np.random.default_rng(n).permutation(a.shape[-1])
    return a[:, order] if n % 2 else jnp.roll(a, 1, -1)


def padded(p, given, name, a, b, n):
    return jnp.pad(a, ((0, 0), (0, 2)), constant_values=n % 2)[:, : 6 if a.shape[-1] == 4 else None]


def on_two_rows(p, given, name, a, b, n):
    return jnp.where(jnp.arange(BATCH)[:, None] < 2, a, jnp.full((), n % 2, a.dtype))


STEPS = (
    dense,
    there_and_back,
    norm,
    layer_norm,
    heads,
    shuffled,
    gated_by_head,
    halves,
    joined,
    looped,
    mlp_in_a_loop,
    picked,
    padded,
    on_two_rows,
    lambda p, given, name, a, b, n: a + b,
    lambda p, given, name, a, b, n: a * b,
    lambda p, given, name, a, b, n: a * b.mean(-1, keepdims=True),
    lambda p, given, name, a, b, n: (jnp.tanh, jax.nn.sigmoid, jax.nn.gelu, jax.nn.relu, jnp.cos)[n % 5](a),
    lambda p, given, name, a, b, n: (jnp.cumsum, jnp.sort, jax.nn.softmax, jnp.flip)[n % 4](a, -1),
    lambda p, given, name, a, b, n: a / (1 + b * b),
    lambda p, given, name, a, b, n: jnp.tile(a, (1, 2))[:, : max(8, a.shape[-1])],
)
STEP = st.tuples(st.integers(0, len(STEPS) - 1), st.integers(0, 3), st.integers(0, 9))


@pytest.mark.filterwarnings("ignore:apply does not use these params")
@pytest.mark.parametrize("examples", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_what_is_called_exact_is_exact(examples):
    seen = {"groups": 0, "choices": 0}

    @settings(max_examples=examples)
    @given(st.lists(STEP, min_size=1, max_size=7))
    def check(steps):
        program = Program(steps)
        groups = trace.channel_groups(program, program.params, program.x)
        assert all(group.exact and group.size > 1 for group in groups)
        for every in (2, None):
            check_exact(program, program.params, (program.x,), groups, every)
        if groups.layers:
            check_exact(program, program.params, (program.x,), groups.per_layer(), 3)
        seen["groups"] += len(groups)
        seen["choices"] += sum(len(group.closed_by) for group in groups)

    check()
    assert seen["groups"] > examples, seen
    assert seen["choices"] > seen["groups"], seen
