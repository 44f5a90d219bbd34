"""Tracing: what is an input, what is part of the program, places in the user's code, and errors for bad functions."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from jaxsparse.trace.program import live_eqns, opened, trace, used_inputs, where, within
from tests.trace.models import IMAGE, MODELS, LeNet, linen

PARAMS = {"w": jnp.ones((4, 3)), "b": jnp.zeros(3)}
X = jnp.ones((2, 4))


def test_inputs_are_arrays_and_the_rest_is_part_of_the_program():
    params = {"w": np.ones((4, 3)), "scale": 2.0, "f": jnp.tanh, "nothing": None}

    def apply(p, x, flag):
        return {"y": p["f"](x @ p["w"] * p["scale"]), "flag": flag, "name": "mlp"}

    traced = trace(apply, params, X, True)
    assert traced.paths == ["w", None]
    assert traced.out_paths == ["flag", "y"]
    assert [leaf.dtype for leaf in traced.leaves] == [jnp.float32, jnp.float32]
    flag = jnp.array(True)
    assert traced.rebuild([flag, X]) == {"flag": flag, "y": X, "name": "mlp"}


def test_shapes_are_enough():
    apply, params, args = MODELS["resnet"]()
    shapes = jax.eval_shape(lambda: (params, args))
    traced, of_shapes = trace(apply, params, *args), trace(apply, shapes[0], *shapes[1])
    assert str(traced.closed) == str(of_shapes.closed)
    assert of_shapes.leaves == jax.tree.leaves(shapes)


def places(apply, params, *args):
    found = []

    def look(jaxpr):
        for eqn in opened(jaxpr)[0].eqns:
            found.append((eqn.primitive.name, str(where(eqn, "here"))))
            for inner in (eqn.params.get(name) for name in ("jaxpr", "call_jaxpr")):
                if inner is not None:
                    with within(eqn):
                        look(inner)

    look(trace(apply, params, *args).closed)
    return found


def test_a_place_is_the_line_of_the_user():
    model = LeNet()
    apply, variables, args = linen(model, IMAGE)
    convolutions = [text for name, text in places(apply, variables, *args) if name == "conv_general_dilated"]
    assert len(convolutions) == 2
    for text in convolutions:
        assert text.startswith("here: conv_general_dilated at ")
        assert "linen_models.py:" in text
        assert "(LeNet.__call__) in LeNet/Conv_" in text or "(__call__) in LeNet/Conv_" in text

    def plain(p, x):
        return jax.jit(lambda x: x @ p["w"])(x) + p["b"][None]

    (product,) = [text for name, text in places(plain, PARAMS, X) if name == "dot_general"]
    line = plain.__code__.co_firstlineno + 1
    assert f"test_program.py:{line} (" in product


def test_a_place_in_a_jitted_function_of_a_library_is_the_line_of_each_call():
    def apply(p, x):
        first = jnp.sort(x @ p["w"])
        return jnp.sort(jnp.sin(first)) + p["b"][None]

    texts = [text for name, text in places(apply, PARAMS, X) if name == "sort"]
    lines = [apply.__code__.co_firstlineno + i for i in (1, 2)]
    assert [f"test_program.py:{line} (" in text for line, text in zip(lines, texts, strict=True)] == [True, True]


def test_dead_code_is_left_out():
    def apply(p, x):
        jnp.sin(x) @ p["w"]
        return x @ p["w"] + p["b"][None]

    traced = trace(apply, PARAMS, X)
    assert sum(eqn.primitive.name == "dot_general" for eqn in opened(traced.closed)[0].eqns) == 2
    assert sum(eqn.primitive.name == "dot_general" for eqn in live_eqns(opened(traced.closed)[0])) == 1


def test_use_is_seen_through_calls():
    def apply(p, x):
        return jax.jit(lambda p, x: jax.checkpoint(lambda p, x: x @ p["w"])(p, x))(p, x)

    with pytest.warns(UserWarning, match="apply does not use these params: b$"):
        traced = trace(apply, PARAMS, X)
    assert used_inputs(traced.closed) == [False, True, True]


def test_params_that_are_closed_over_are_an_error():
    with pytest.raises(ValueError, match=r"apply uses none of the params it is given \(b, w\): does it close over"):
        trace(lambda p, x: x @ PARAMS["w"], PARAMS, X)
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"apply uses none of the params it is given \(bias, kernel\)"):
        trace(lambda p, x: model(x), nnx.state(model, nnx.Param), X)


def test_the_warning_names_the_line_that_traces():
    from jaxsparse.trace import multiply_adds

    with pytest.warns(UserWarning, match="does not use these params: b") as told:
        multiply_adds(lambda p, x: x @ p["w"], PARAMS, X)
    assert told[0].filename == __file__


def branch(p, x):
    return x @ p["w"] if x.sum() > 0 else p["b"]


def index(p, x):
    return (x @ p["w"])[:, [int(p["b"].sum())]]


def shape(p, x):
    return jnp.zeros(jnp.count_nonzero(p["w"])) + x[0, 0] + p["b"].sum()


def select(p, x):
    return x[x > 0].sum() * p["w"] + p["b"][None]


def to_numpy(p, x):
    return np.asarray(p["w"]) @ x


@pytest.mark.parametrize("apply", [branch, index, shape, select, to_numpy], ids=lambda f: f.__name__)
def test_programs_that_depend_on_values_are_an_error_with_the_line(apply):
    line = apply.__code__.co_firstlineno + 1
    expected = rf"apply cannot be traced: .*test_program.py:{line} \({apply.__name__}\) asks for the values of an array"
    with pytest.raises(ValueError, match=expected) as caught:
        trace(apply, PARAMS, X)
    assert caught.value.__cause__ is not None


def test_state_of_nnx_that_is_closed_over_is_an_error_with_the_line():
    class Noisy(nnx.Module):
        def __init__(self, rngs):
            self.linear, self.drop = nnx.Linear(4, 3, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.drop(self.linear(x))

    graphdef, params, rest = nnx.split(Noisy(nnx.Rngs(0)), nnx.Param, ...)
    trace(lambda p, rest, x: nnx.merge(graphdef, p, rest)(x), params, rest, X)
    outer = nnx.merge(graphdef, params, rest)

    def apply(p, x):
        return outer.drop(x @ p["linear"]["kernel"][...])

    with pytest.raises(
        ValueError, match=r"apply changes state that it closes over, at .*test_program.py:\d+ \(apply\)"
    ):
        trace(apply, params, X)


def test_other_bad_input():
    with pytest.raises(ValueError, match="apply must be a function of"):
        trace(PARAMS, PARAMS, X)
    with pytest.raises(ValueError, match="the params must have arrays, got 'relu'"):
        trace(lambda p, x: x, {"f": "relu"}, X)
    with pytest.raises(TypeError, match="dot_general requires contracting dimensions"):  # the user's own errors stay
        trace(lambda p, x: x @ p["w"], PARAMS, X[:, :2])
    with pytest.raises(TypeError, match="unexpected keyword"):
        trace(lambda p, x: x @ p["w"], PARAMS, X, train=True)


def test_a_scan_of_a_flax_module_is_named_by_the_model():
    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            over = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": 2}
            return nn.scan(lambda layer, x, _: (layer(x), None), **over)(nn.Dense(4), x, None)[0]

    apply, variables, args = linen(Stack(), X)
    (scan,) = [text for name, text in places(apply, variables, *args) if name == "scan"]
    assert "test_program.py" in scan
    assert lax.scan.__name__ in scan
