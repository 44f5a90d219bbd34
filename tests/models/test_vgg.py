import jax
import jax.numpy as jnp
import pytest

from jaxsparse import models


@pytest.mark.parametrize(("variant", "hidden"), [("C", 15), ("like", 14), ("16_bn", 13), ("19_bn", 16)])
def test_features_are_those_of_every_hidden_layer(variant, hidden):
    features = tuple(range(2, hidden + 2))
    params = params_of(models.VGG(variant, features=features))
    layers = [f"conv{i}" for i in range(1, 20)] + [f"fc{i}" for i in range(1, 4)]
    outputs = tuple(params[name]["kernel"].shape[-1] for name in layers if name in params)
    assert outputs == (*features, 10)


@pytest.mark.parametrize("features", [(), (8,) * 13, (8,) * 16, (8,) * 14 + (0,)])
def test_features_that_do_not_fit(features):
    with pytest.raises(
        ValueError, match="features >= 1 for each of its 13 convolutions and 2 hidden dense layers, got"
    ):
        params_of(models.VGG("D", features=features))


def test_third_convolutions_of_c_are_one_by_one():
    params = params_of(models.VGG("C", width=1 / 32))
    ones = [i for i in range(1, 14) if params[f"conv{i}"]["kernel"].shape[:2] == (1, 1)]
    assert ones == [7, 10, 13]
    assert params["fc1"]["kernel"].shape == (2 * 2 * 16, 16)


@pytest.mark.parametrize("variant", ["D", "16_bn"])
@pytest.mark.parametrize("form", ["xla", "slices"])
def test_max_pools_are_of_the_form_asked_for(variant, form):
    model, images = models.VGG(variant, width=1 / 64, implementation=form), jnp.zeros((1, 32, 32, 3))
    jaxpr = str(jax.make_jaxpr(lambda key: model.init_with_output(key, images)[0])(jax.random.key(0)))
    assert ("reduce_window_max" in jaxpr) == (form == "xla")


def params_of(model):
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
