import io
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rich.console
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import jaxsparse
from jaxsparse import inspect, models
from jaxsparse.tables import Table
from jaxsparse.trace import multiply_adds
from tests.pages import Page
from tests.problems import make_params


def sparse_state(params=None):
    tx = jaxsparse.chain(optax.sgd(0.1, momentum=0.9), jaxsparse.sparse_momentum(0.75, 10))
    return tx.init(make_params() if params is None else params)


def rich_text(shown, width=200):
    console = rich.console.Console(file=io.StringIO(), width=width)
    console.print(shown)
    return console.file.getvalue()


def test_summary_counts_and_prints():
    params, state = make_params(), sparse_state()
    table = jaxsparse.summary(state, params)
    assert str(table) == str(jaxsparse.summary(jaxsparse.get_masks(state), params))
    assert {row.path: row.kept for row in table.layers if row.sparse} == {
        "attention/kernel": 64, "conv/kernel": 36, "dense/kernel": 96,
    }  # fmt: skip
    lines = str(table).splitlines()
    assert lines[0].split()[:5] == ["layer", "shape", "weights", "kept", "density"]
    assert "dense/kernel 16x24 384 96 25.00%" in " ".join(str(table).split())
    assert lines[-2].split()[-3:] == ["784", "196", "25.00%"]


def test_a_python_number_among_the_params_counts_as_one_dense_weight():
    params, masks = {"kernel": jnp.ones((2, 2)), "scale": 2.0}, {"kernel": jnp.eye(2, dtype=bool), "scale": True}
    rows = {row.path: row for row in jaxsparse.summary(masks, params).layers}
    assert (rows["scale"].shape, rows["scale"].kept, rows["scale"].mean_abs) == ((), 1, 2.0)
    assert rows["kernel"].kept == 2


def test_summary_of_shapes_counts_the_same_and_has_no_means():
    state = sparse_state()
    table, of_shapes = jaxsparse.summary(state, make_params()), jaxsparse.summary(state, jax.eval_shape(make_params))
    assert of_shapes.layers == tuple(row._replace(mean_abs=None) for row in table.layers)
    assert "mean |w|" in str(table)
    assert "mean |w|" not in str(of_shapes)


def test_means_and_dead_units():
    kernel = jnp.array([[1.0, -3.0, 9.0], [9.0, 9.0, 9.0]])
    mask = jnp.array([[True, True, False], [False, False, False]])
    (row,) = jaxsparse.summary({"w": mask}, {"w": kernel}).layers
    assert row[:9] == ("w", (2, 3), 6, 2, True, 2.0, 1, 1, None)
    conv = jnp.zeros((3, 3, 4, 5), bool).at[1, 1, 2, :4].set(True)
    (row,) = jaxsparse.summary({"w": conv}, {"w": jnp.ones(conv.shape, jnp.bfloat16)}).layers
    assert (row.mean_abs, row.dead_inputs, row.dead_outputs) == (1.0, 3, 1)
    (row,) = jaxsparse.summary({"gates": jnp.array([True, False, False])}, {"gates": jnp.ones(3)}).layers
    assert (row.dead_inputs, row.dead_outputs) == (None, 2)
    (row,) = jaxsparse.summary({"w": jnp.zeros((2, 3), bool)}, {"w": kernel}).layers
    assert (row.kept, row.mean_abs, row.dead_inputs, row.dead_outputs) == (0, None, 2, 3)


@given(st.integers(0, 2**32 - 1), st.sampled_from([(5,), (4, 6), (3, 2, 5), (2, 2, 3, 4)]))
def test_means_and_dead_units_by_loops(seed, shape):
    rng = np.random.default_rng(seed)
    weights, mask = rng.normal(size=shape).astype(np.float32), rng.random(shape) < 0.2
    (row,) = jaxsparse.summary({"w": mask}, {"w": weights}).layers
    layers = mask if len(shape) == 3 else mask[None]  # three axes are a stack of matrices
    outputs = [layer.reshape(-1, shape[-1]) for layer in layers]
    assert row.dead_outputs == sum(not any(layer[:, i]) for layer in outputs for i in range(shape[-1]))
    if len(shape) > 1:
        assert row.dead_inputs == sum(not layer[..., i, :].any() for layer in layers for i in range(shape[-2]))
    kept = [abs(w) for w, m in zip(weights.ravel(), mask.ravel(), strict=True) if m]
    assert row.mean_abs == (pytest.approx(sum(kept) / len(kept), rel=1e-5) if kept else None)


def test_macs_of_a_model():
    model, image = models.LeNet5Caffe(implementation="xla"), jnp.zeros((1, 28, 28, 1))
    params = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    counts = multiply_adds(lambda p, x: model.apply({"params": p}, x), params, image)
    masks = jax.tree.map(
        lambda p: jnp.ones((), bool) if p.ndim == 1 else jnp.arange(p.size).reshape(p.shape) % 2 == 0, params
    )
    table = jaxsparse.summary(masks, params, positions=counts.positions(batch=1))
    found = {row.path: (row.macs, row.weights * row.positions) for row in table.layers if row.macs}
    assert found["conv1/kernel"] == (576 * 250, 576 * 500)
    assert found["fc1/kernel"] == (200_000, 400_000)
    assert str(table).splitlines()[-1].endswith("1,146,500 (50.0%)")
    with pytest.raises(
        ValueError, match="positions name leaves that the params lack: conv9/kernel; there are conv1/bias"
    ):
        jaxsparse.summary(masks, params, positions={"conv9/kernel": 3})


def test_positions_name_the_leaves_of_nnx_without_their_wrapper():
    params = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param)
    table = jaxsparse.summary(jax.tree.map(lambda p: jnp.ones(p.shape, bool), params), params, positions={"kernel": 7})
    assert [row.macs for row in table.layers] == [None, 42]


def test_layers_are_listed_in_their_natural_order():
    params = {f"conv{i}": {"kernel": jnp.ones((2, 2))} for i in (10, 2, 1)}
    masks = jax.tree.map(lambda p: p > 0, params)
    names = ["conv1/kernel", "conv2/kernel", "conv10/kernel"]
    assert [row.path for row in jaxsparse.summary(masks, params).layers] == names
    assert [row.path for row in inspect.compare_masks(masks, masks).layers] == names


def test_summary_of_masks_that_do_not_fit():
    with pytest.raises(ValueError, match=r"masks of w: expected bool of shape \(2, 2\)"):
        jaxsparse.summary({"w": jnp.ones((3, 2), bool)}, {"w": jnp.ones((2, 2))})


@pytest.mark.parametrize("tree", ["another", "transposed", "vmapped"])
def test_states_that_do_not_fit_the_params(tree):
    params = {"kernel": jnp.ones((4, 6))}
    state = sparse_state(params)
    if tree == "vmapped":
        state = jax.tree.map(lambda x: jnp.stack([x, x]), state)
    else:
        params = {"kernel": jnp.ones({"another": (4, 8), "transposed": (6, 4)}[tree])}
    shapes = rf"has shape \({'2, ' * (tree == 'vmapped')}4, 6\), but the params have \({params['kernel'].shape[0]}, "
    for look in (jaxsparse.summary, inspect.show, inspect.plot_weights, jaxsparse.sparsify):
        with pytest.raises(ValueError, match=f"the mask of kernel in the optimizer state {shapes}"):
            look(state, params)


def test_a_dense_optimizer_state_is_no_masks():
    params = {"kernel": jnp.ones((4, 6))}
    for look in (jaxsparse.summary, inspect.show, inspect.plot_weights):
        with pytest.raises(ValueError, match="there is no sparse link in this optimizer state"):
            look(optax.adam(0.1).init(params), params)


def test_the_mean_of_many_weights():
    weights = np.full((3, 1_000_000), 0.1, np.float32)
    for mask in (np.array(True), np.ones(weights.shape, bool)):
        (row,) = jaxsparse.summary({"w": mask}, {"w": weights}).layers
        assert row.mean_abs == pytest.approx(0.1, rel=1e-6)


def test_columns_that_are_empty():
    table = Table(("a", "b", "c", "d"), (("", "", "1", ""), ("", "", "", "2")), (("", "9", "1", "2"),), left=(0, 2))
    assert table.without_empty_columns() == Table(("c", "d"), (("1", ""), ("", "2")), (("1", "2"),), left=(0,))
    assert table.without_empty_columns(keep=1).header == ("a", "c", "d")
    assert table.without_empty_columns(keep=1).left == (0, 1)


def test_all_three_forms_of_a_table_say_the_same():
    table = jaxsparse.summary({"[bold]<b>&": jnp.eye(2, 3, dtype=bool)}, {"[bold]<b>&": jnp.ones((2, 3))})
    cells = table.table()
    lines = [list(line) for line in (cells.header, *cells.rows, *cells.totals)]
    assert Page(table._repr_html_()).tables == [lines]
    assert repr(table) == str(table)
    for text in (str(table), rich_text(table)):
        found = [line.split() for line in text.splitlines() if line.strip(" -")]
        assert found == [" ".join(line).split() for line in lines]


def test_an_empty_table_is_a_header():
    assert str(jaxsparse.summary({}, {})).splitlines()[-1].split() == ["all", "0", "0", "-"]
    comparison = inspect.compare_masks({"b": jnp.array(True)}, {"b": jnp.array(True)})
    assert comparison.layers == ()
    assert (comparison.total.flips, comparison.total.jaccard) == (0, 1.0)
    assert "Jaccard" in str(comparison)
    assert Table(("a",), ()).text() == "a\n-"


def test_compare_masks():
    first = {"a": jnp.array([[True, True], [False, False]]), "b": jnp.array(True), "c": jnp.array(True)}
    second = {"a": jnp.array([[True, False], [True, True]]), "b": jnp.array([True, False]), "c": jnp.array(True)}
    a, b = inspect.compare_masks(first, second).layers
    assert (*a, a.flips, a.jaccard) == ("a", 4, 2, 3, 1, 3, 0.25)
    assert (*b, b.flips, b.jaccard) == ("b", 2, 2, 1, 1, 1, 0.5)
    total = inspect.compare_masks(first, second).total
    assert (*total, total.flips) == ("all", 6, 4, 4, 2, 4)


@given(st.integers(0, 2**32 - 1), st.floats(0, 1), st.floats(0, 1))
def test_comparison_is_of_sets(seed, p, q):
    rng = np.random.default_rng(seed)
    first, second = rng.random((7, 9)) < p, rng.random((7, 9)) < q
    (row,) = inspect.compare_masks({"w": first}, {"w": second}).layers
    a, b = (set(np.flatnonzero(mask)) for mask in (first, second))
    assert (row.first, row.second, row.both, row.flips) == (len(a), len(b), len(a & b), len(a ^ b))
    assert row.jaccard == (len(a & b) / len(a | b) if a | b else 1.0)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (
            {"w": jnp.ones((2, 2), bool), "v": jnp.array(True)},
            "old and new are masks of different trees: only one has v",
        ),
        ({"w": jnp.ones((2, 3), bool)}, r"masks of w: old has shape \(2, 2\), new \(2, 3\)"),
        ({"w": jnp.ones((2, 2))}, "the new masks, w: expected bool, got float32"),
    ],
)
def test_masks_that_cannot_be_compared(second, message):
    with pytest.raises(ValueError, match=message):
        inspect.compare_masks({"w": jnp.ones((2, 2), bool)}, second, names=("old", "new"))


def test_show_greys_out_what_is_pruned():
    params, state = make_params(), sparse_state()
    shown = inspect.show(state, params)
    page, without = (tree._repr_html_(compressed=False) for tree in (shown, inspect.show(params)))
    assert "attention" in page
    arrays = sum(leaf.ndim > 0 for leaf in jax.tree.leaves(params))
    assert page.count("Rendering array...") == without.count("Rendering array...") == arrays
    pruned = [re.findall(r'"validMaskBase64": ?"([^"]*)"', text.replace("\\", "")) for text in (page, without)]
    assert len(pruned[0]) == len(pruned[1]) == arrays
    sparse = sum(mask.ndim > 0 for mask in jax.tree.leaves(jaxsparse.get_masks(state, params)))
    assert sum(a != b for a, b in zip(*pruned, strict=True)) == sparse
    assert "<treescope-container" in shown._repr_html_()
    assert "attention" in repr(shown)
    with pytest.raises(ValueError, match="masks"):
        inspect.show({"w": jnp.ones(3, bool)}, params)


def test_leaves_that_are_no_real_numbers():
    params = {"w": jnp.ones((2, 2)), "key": jax.random.split(jax.random.key(0), 3), "z": jnp.full((2,), 3 + 4j)}
    masks = {"w": np.eye(2, dtype=bool), "key": np.array(True), "z": np.array(True)}
    rows = {row.path: row for row in jaxsparse.summary(masks, params).layers}
    assert (rows["key"].weights, rows["key"].mean_abs, rows["z"].mean_abs) == (3, None, 5.0)
    empty = {"e": jnp.zeros((0, 5)), **params}, {"e": np.ones((0, 5), bool), **masks}
    assert "<treescope-container" in inspect.show(*empty[::-1])._repr_html_()
    inspect.plot_weights(masks, params)
    activity = inspect.class_activity({"z": jnp.full((1, 2), 3 + 4j)}, jnp.array([0]), num_classes=1)
    assert activity["z"].tolist() == [[5.0], [5.0]]
