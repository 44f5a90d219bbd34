import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsparse
from jaxsparse import inspect
from tests.inspect.test_plots import drawn, texts

QUERY = jnp.ones((6, 4, 3), bool).at[:, 1].set(False).at[0, 2, 0].set(False)
OUT = jnp.ones((4, 3, 6), bool).at[3].set(False)


def kept(table):
    return {layer.name: layer.kept.tolist() for layer in table.layers}


def test_heads_of_axes_of_their_own():
    table = inspect.heads({"attn": {"query": {"kernel": QUERY}, "out": {"kernel": OUT}}, "mlp": jnp.ones((3, 4), bool)})
    assert kept(table) == {"attn/out/kernel": [18, 18, 18, 0], "attn/query/kernel": [18, 0, 17, 18]}
    assert [layer.dead for layer in table.layers] == [[3], [1]]
    assert table.layers[1].density.tolist() == [1, 0, 17 / 18, 1]
    assert "attn/query/kernel 4 53 73.61% 1: 0.00% 0: 100.00% 1" in " ".join(str(table).split())


def test_layers_of_a_stack_are_apart():
    masks = {"blocks": {"attention": {"query": {"kernel": jnp.stack([QUERY, jnp.ones_like(QUERY)])}}}}
    layout = {"*": jaxsparse.Layout(1, (2, 3), stack=0)}
    path = "blocks/attention/query/kernel"
    assert kept(inspect.heads(masks, layout=layout)) == {f"{path} [0]": [18, 0, 17, 18], f"{path} [1]": [18] * 4}
    (row,) = jaxsparse.summary(masks, masks, layout=layout).layers
    assert (row.heads, row.dead_heads) == (8, 1)


@pytest.mark.parametrize("transposed", [False, True])
def test_heads_without_an_axis(transposed):
    query, out = QUERY.reshape(6, 12), OUT.reshape(12, 6)
    name = "weight" if transposed else "kernel"  # of Equinox and PyTorch, outputs first
    masks = {"q_proj": {name: query.T if transposed else query}, "o_proj": {name: out.T if transposed else out}}
    found = kept(inspect.heads(masks, heads={"*": 4}))
    assert found == {f"o_proj/{name}": [18, 18, 18, 0], f"q_proj/{name}": [18, 0, 17, 18]}
    grouped = kept(inspect.heads(masks, heads={"q_proj/*": 2}))
    assert grouped == {f"q_proj/{name}": [18, 35]}


def test_no_heads_are_an_error():
    masks = {"q_proj": jnp.ones((6, 12), bool)}
    with pytest.raises(ValueError, match=re.escape('among q_proj. Say how many heads leaves have by heads={"*/query')):
        inspect.heads(masks)
    for number in (5, 0, 2.0):
        with pytest.raises(ValueError, match=f"heads of q_proj: 12 outputs cannot be divided among {number} heads"):
            inspect.heads(masks, heads={"q_proj": number})
    with pytest.raises(ValueError, match="heads: .*k_proj"):
        inspect.heads(masks, heads={"k_proj": 4})
    with pytest.raises(ValueError, match="heads: no leaf has a mask"):
        inspect.heads({"q_proj": jnp.array(True)})


def test_summary_counts_dead_heads():
    masks = {"attn": {"query": QUERY, "out": OUT}, "mlp": jnp.ones((3, 4), bool)}
    params = jax.tree.map(lambda mask: mask.astype(jnp.float32), masks)
    table = jaxsparse.summary(masks, params)
    assert {row.path: (row.heads, row.dead_heads) for row in table.layers} == {
        "attn/out": (4, 1), "attn/query": (4, 1), "mlp": (None, None),
    }  # fmt: skip
    assert "dead heads" in str(table)
    assert "1 of 4" in str(table)
    assert "dead heads" not in str(jaxsparse.summary({"mlp": masks["mlp"]}, {"mlp": params["mlp"]}))


def test_heads_are_drawn_and_dead_ones_crossed_out():
    masks = {"attn": {"query": QUERY, "key": QUERY[:, :2], "out": OUT}}
    figure = inspect.plot_heads(masks)
    drawn(figure)
    (axes, _) = figure.axes
    shares = axes.images[0].get_array()
    np.testing.assert_allclose(shares.filled(np.nan)[2], [100, 0, 100 * 17 / 18, 100])
    assert np.isnan(shares.filled(np.nan)[0, 2:]).all()  # the leaf with two heads
    assert sorted(map(tuple, axes.lines[0].get_xydata().tolist())) == [(1, 0), (1, 2), (3, 1)]
    assert "3 dead of 10 heads" in texts(figure)
    whole = inspect.plot_heads({"attn": {"query": jnp.ones((6, 4, 3), bool)}})
    assert "dead" not in texts(whole)
