import functools
import pathlib
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxsparse
from jaxsparse import masks as module
from jaxsparse.prunable import prunable_leaves
from jaxsparse.structures import check_units, leaf_structures
from tests.problems import SPARSE, SPARSE_SIZE, make_params


def kept(masks):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): int(m.sum())
        for path, m in jax.tree_util.tree_flatten_with_path(masks)[0]
        if m.ndim
    }


@settings(max_examples=30)
@given(sparsity=st.floats(0, 0.999), allocation=st.sampled_from(["uniform", "erdos_renyi", "erdos_renyi_kernel"]))
def test_random_masks_have_exact_counts(sparsity, allocation):
    masks = jaxsparse.random_masks(make_params(), sparsity, allocation=allocation)
    assert sum(kept(masks).values()) == round((1 - sparsity) * SPARSE_SIZE)
    assert set(kept(masks)) == set(SPARSE)


def test_uniform_masks_are_within_one_of_their_share():
    masks = jaxsparse.random_masks(make_params(), 0.87)
    for count, size in zip(kept(masks).values(), (256, 144, 384), strict=True):
        assert abs(count - 0.13 * size) < 1


@pytest.mark.slow
def test_seeds_give_different_masks_traced_or_not():
    params = make_params()
    one, two = (jaxsparse.random_masks(params, 0.5, key=key) for key in (1, 2))
    assert (one["dense"]["kernel"] != two["dense"]["kernel"]).any()
    traced = jax.jit(lambda key: jaxsparse.random_masks(params, 0.5, key=key))
    for key in (1, jax.random.key(1), jax.random.PRNGKey(1)):
        np.testing.assert_array_equal(traced(key)["dense"]["kernel"], one["dense"]["kernel"])


def test_a_traced_sparsity():
    params = make_params()
    count = jax.jit(lambda s: jaxsparse.count(jaxsparse.random_masks(params, s)))
    assert [int(count(s)) for s in (0.0, 0.5, 0.75)] == [SPARSE_SIZE, SPARSE_SIZE // 2, SPARSE_SIZE // 4]


def test_magnitude_masks_keep_the_largest():
    params = make_params()
    masks = jaxsparse.magnitude_masks(params, 0.8)
    for path in SPARSE:
        layer, name = path.split("/")
        w, m = np.abs(params[layer][name]), np.asarray(masks[layer][name])
        assert w[m].min() >= w[~m].max()
    masks = jaxsparse.magnitude_masks(params, 0.8, allocation="global")
    every = [(np.abs(params[p.split("/")[0]]["kernel"]), np.asarray(masks[p.split("/")[0]]["kernel"])) for p in SPARSE]
    assert min(w[m].min() for w, m in every) >= max(w[~m].max() for w, m in every)
    assert sum(kept(masks).values()) == round(0.2 * SPARSE_SIZE)


@pytest.mark.slow
def test_units_are_kept_whole_and_counted_by_their_size():
    params = make_params()
    structure = {
        "dense/kernel": jaxsparse.block(4, 4),
        "attention/kernel": jaxsparse.block(2, 8),
        "conv/kernel": "kernel",
    }
    units = leaf_structures(structure, params, prunable_leaves(params))
    best = jaxsparse.magnitude_masks(params, 0.75, structure=structure)
    for masks in (jaxsparse.random_masks(params, 0.75, structure=structure), best):
        check_units(module.validate_masks(masks, params), units)
        # A quarter of the 24 blocks and of the other 16, and of the 16 kernels of 9.
        assert kept(masks) == {"dense/kernel": 6 * 16, "attention/kernel": 4 * 16, "conv/kernel": 4 * 9}
    masks = jaxsparse.random_masks(params, 0.75, allocation="erdos_renyi", structure=structure)
    check_units(module.validate_masks(masks, params), units)
    assert abs(sum(kept(masks).values()) - SPARSE_SIZE // 4) < 16
    assert kept(masks)["conv/kernel"] > 4 * 9  # the small layer stays denser
    scores = jaxsparse.block(4, 4).scores(params["dense"]["kernel"])
    live = jaxsparse.block(4, 4).units(best["dense"]["kernel"])
    assert int(live.sum()) == 6
    assert scores[live].min() >= scores[~live].max()


def test_the_largest_units_of_the_whole_network():
    params = make_params()
    structure = {"dense/kernel": jaxsparse.block(4, 4), "conv/kernel": "channel"}
    masks = jaxsparse.magnitude_masks(params, 0.6, allocation="global", structure=structure)
    check_units(module.validate_masks(masks, params), leaf_structures(structure, params, prunable_leaves(params)))
    budget = round(0.4 * SPARSE_SIZE)
    assert budget - 18 < sum(kept(masks).values()) <= budget
    live = jaxsparse.block(4, 4).units(masks["dense"]["kernel"])
    smallest = float(jaxsparse.block(4, 4).scores(params["dense"]["kernel"])[live].min())
    attention = np.abs(params["attention"]["kernel"])
    assert attention[~np.asarray(masks["attention"]["kernel"])].max() <= min(
        smallest, attention[np.asarray(masks["attention"]["kernel"])].min()
    )


def test_n_of_m_stays_whatever_the_sparsity():
    params = make_params()
    structure = {"dense/kernel": jaxsparse.n_of_m(2, 4)}
    sparsity = {"attention/kernel": 0.5, "conv/kernel": 0.5}
    for masks in (
        jaxsparse.random_masks(params, sparsity, structure=structure),
        jaxsparse.magnitude_masks(params, sparsity, structure=structure),
        jaxsparse.magnitude_masks(params, 0.5, structure=structure, allocation="global"),
    ):
        assert sum(kept(masks).values()) == 128 + 72 + 192
        assert bool(jaxsparse.n_of_m(2, 4).holds(masks["dense"]["kernel"]))
    with pytest.raises(ValueError, match="sparsity: 'dense/kernel' matches none of attention/kernel, conv/kernel"):
        jaxsparse.random_masks(params, {**sparsity, "dense/kernel": 0.5}, structure=structure)


def test_nonzero_masks_find_the_zeros():
    params = jaxsparse.apply_masks(make_params(), jaxsparse.random_masks(make_params(), 0.5))
    masks = jaxsparse.nonzero_masks(params)
    assert sum(kept(masks).values()) == SPARSE_SIZE // 2
    assert masks["temperature"].shape == ()


def test_apply_masks_clears_nan_and_keeps_dtypes():
    tree = {"w": jnp.array([[jnp.nan, 2.0]], jnp.bfloat16), "b": jnp.ones(3)}
    out = jaxsparse.apply_masks(tree, {"w": jnp.array([[False, True]]), "b": jnp.array(True)})
    assert out["w"].tolist() == [[0.0, 2.0]]
    assert out["w"].dtype == jnp.bfloat16
    assert out["b"] is tree["b"]


def test_the_two_lines_of_the_contract():
    params, masks = make_params(), jaxsparse.random_masks(make_params(), 0.5)
    product = jax.tree.map(jnp.multiply, params, masks)
    assert float(jnp.mean(product["dense"]["kernel"] != 0)) == 0.5
    densities = jax.tree.map(jnp.mean, masks)
    assert float(densities["dense"]["kernel"]) == 0.5
    assert float(densities["dense"]["bias"]) == 1.0


def test_count_and_density():
    masks = jaxsparse.random_masks(make_params(), 0.75)
    assert int(jaxsparse.count(masks)) == SPARSE_SIZE // 4
    assert float(jax.jit(jaxsparse.density)(masks)) == 0.25
    assert float(jaxsparse.density({"b": jnp.array(True)})) == 1.0


@pytest.mark.parametrize("scope", ["layer", pytest.param("global", marks=pytest.mark.slow)])
@pytest.mark.parametrize("structure", ["weight", {"conv/kernel": "channel", "dense/kernel": jaxsparse.n_of_m(1, 4)}])
def test_masks_of_magnitude_scores_are_magnitude_masks(structure, scope):
    params = make_params()
    scores = jaxsparse.saliency.magnitude(params)
    expected = jaxsparse.magnitude_masks(
        params, 0.7, allocation="global" if scope == "global" else "uniform", structure=structure
    )
    masks = jaxsparse.score_masks(params, scores, 0.7, scope=scope, structure=structure)
    jax.tree.map(np.testing.assert_array_equal, masks, expected)


def test_scores_rank_with_their_sign_and_units_by_their_mean():
    params = {"w": jnp.ones((4, 2)), "b": jnp.ones(2)}
    scores = {"w": jnp.array([[-9.0, 5.0], [2.0, 1.0], [3.0, -1.0], [4.0, 0.0]]), "b": None}
    masks = jaxsparse.score_masks(params, scores, 0.5)
    assert masks["w"].tolist() == [[False, True], [True, False], [True, False], [True, False]]
    assert masks["b"].shape == ()
    blocks = jaxsparse.score_masks(params, scores, 0.5, structure=jaxsparse.block(2, 1))
    assert blocks["w"].tolist() == [[False, True], [False, True], [True, False], [True, False]]


def test_scores_that_are_nan_rank_last():
    params = {"w": jnp.ones((2, 2))}
    scores = {"w": jnp.array([[jnp.nan, -2.0], [-jnp.inf, -1.0]])}
    assert jaxsparse.score_masks(params, scores, 0.25)["w"].tolist() == [[False, True], [True, True]]


@pytest.mark.slow
def test_masks_by_magnitude_are_those_of_jaxpruner():
    golden = np.load(pathlib.Path(__file__).parent / "golden" / "jaxpruner_masks.npz")
    weights = {name: jnp.asarray(golden[f"scores/{name}"]) for name in ("conv", "d1", "d2")}
    cases = [  # each leaf by itself, for its own count is rounded there
        ("unstructured_0.9", 0.9, ("conv", "d1", "d2"), "weight"),
        ("n2_m4_lastaxis", 0.5, ("conv", "d1"), jaxsparse.n_of_m(2, 4, axis="outputs")),
        ("block4x4_avg_0.75", 0.75, ("d1",), jaxsparse.block(4, 4)),
        ("channel_lastaxis_0.5", 0.5, ("conv", "d1", "d2"), "channel"),
    ]
    for kind, sparsity, names, structure in cases:
        for name in names:
            mask = jaxsparse.magnitude_masks({name: weights[name]}, sparsity, structure={name: structure})[name]
            np.testing.assert_array_equal(mask, golden[f"{kind}/{name}"], err_msg=f"{kind} of {name}")


@pytest.mark.parametrize("shape", [(12, 5), (3, 2, 2, 5)])
def test_per_output_every_output_keeps_equally_many(shape):
    scores = jax.random.normal(jax.random.key(0), shape)
    mask = jaxsparse.score_masks({"kernel": scores}, {"kernel": scores}, 0.75, per_output=True)["kernel"]
    best = np.sort(np.asarray(scores).reshape(12, 5), axis=0)[-3]
    np.testing.assert_array_equal(mask.reshape(12, 5), np.asarray(scores).reshape(12, 5) >= best)


def test_per_output_at_least_some_weights_stay():
    params = {"w": jax.random.normal(jax.random.key(0), (10, 8))}
    for at_least, of_output in ((1, 1), (9, 2)):
        mask = jaxsparse.score_masks(params, params, 0.99, per_output=True, at_least=at_least)["w"]
        assert (mask.sum(0) == of_output).all()
    with pytest.warns(UserWarning, match=r"no weight is left in w \(of 80 weights\)"):
        jaxsparse.score_masks(params, params, 0.99, per_output=True)


def test_per_output_of_heads_and_stacks():
    scores = jax.random.normal(jax.random.key(0), (3, 8, 2, 4))  # stacked layers, inputs, heads, outputs of a head
    params, layout = {"w": scores}, {"w": jaxsparse.Layout(inputs=(1,), outputs=(2, 3), stack=(0,))}
    mask = jaxsparse.score_masks(params, params, 0.5, per_output=True, layout=layout)["w"]
    assert (mask.sum(1) == 4).all()


@pytest.mark.slow
def test_per_output_what_has_no_inputs_is_ranked_as_a_whole():
    params = {"kernel": jnp.arange(24.0).reshape(2, 4, 3), "bias": jnp.arange(8.0).reshape(2, 4), "b": jnp.arange(4.0)}
    layout = {"bias": jaxsparse.Layout((), 1, stack=0), "b": jaxsparse.Layout((), 0)}
    everything = dict.fromkeys(params, True)
    masks = jaxsparse.score_masks(params, params, 0.5, per_output=True, prunable=everything, layout=layout)
    assert masks["bias"].tolist() == [[False, False, True, True]] * 2
    assert masks["b"].tolist() == [False, False, True, True]
    assert (masks["kernel"].sum(1) == 2).all()
    tx = jaxsparse.magnitude_pruning(0.5, scope="output", prunable=everything, layout=layout)
    _, state = tx.update(params, tx.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, jaxsparse.get_masks(state), masks)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scope": "network"}, r"scope must be one of \['layer', 'global'\], got 'network'"),
        ({"scope": "global", "allocation": "erdos_renyi"}, "which allocation='erdos_renyi' contradicts"),
        ({"scope": "global", "per_output": True}, "per_output ranks single weights within a layer"),
        ({"scores": {"fc": {"w": None}}}, r"scores of fc/w: expected shape \(4, 6\), got none"),
        ({"scores": {"fc": {"w": jnp.ones((6, 4))}}}, r"scores of fc/w: expected shape \(4, 6\), got shape \(6, 4\)"),
        ({"scores": {"fc": {}}}, r"scores of fc/w: expected shape \(4, 6\), got none"),
        ({"scores": {"fc": {"w": jnp.ones((4, 6), int)}}}, "scores of fc/w: expected floats, got int32"),
        (
            {"scores": {"fc": {"w": jnp.ones((4, 6)), "v": jnp.ones(1)}}},
            "scores must have .*, but has fc/v beyond them",
        ),
    ],
)
def test_bad_scores(options, message):
    params = {"fc": {"w": jnp.ones((4, 6))}}
    with pytest.raises(ValueError, match=message):
        jaxsparse.score_masks(params, **{"scores": params, "sparsity": 0.5, **options})


def test_unknown_allocation():
    with pytest.raises(ValueError, match=r"allocation must be one of \['uniform', .*\], got 'best'"):
        jaxsparse.random_masks(make_params(), 0.5, allocation="best")


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"w": np.ones((2, 3), bool)}, "masks must have the tree of the params, but has nothing for b"),
        ({"w": np.ones((2, 3), bool), "b": True, "c": True}, "but has c beyond them"),
        ({"w": np.ones((2, 3), np.float32), "b": True}, "masks of w: expected bool of shape"),
        ({"w": np.ones(3, bool), "b": True}, "masks of w: expected bool of shape"),
        ({"w": False, "b": True}, "masks of w: the scalar False would remove the whole leaf"),
    ],
)
def test_apply_masks_names_the_leaf_that_it_cannot_mask(masks, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        jaxsparse.apply_masks({"w": jnp.ones((2, 3)), "b": jnp.ones(3)}, masks)


@pytest.mark.parametrize("sparsity", ["0.9", {"fc": {"w": 0.5}}, None])
def test_sparsities_that_are_no_numbers(sparsity):
    params = {"fc": {"w": jnp.ones((2, 3))}}
    for use in (jaxsparse.random_masks, lambda params, sparsity: jaxsparse.sparse_momentum(sparsity, 10).init(params)):
        with pytest.raises(ValueError, match="sparsity"):
            use(params, sparsity)


@pytest.mark.slow
def test_no_layer_is_emptied_without_a_word_and_at_least_keeps_some():
    params = {"big": jax.random.normal(jax.random.key(0), (784, 300)), "out": jnp.full((10, 10), 1e-9)}
    global_masks = functools.partial(jaxsparse.magnitude_masks, allocation="global")
    for make in (jaxsparse.random_masks, jaxsparse.magnitude_masks, global_masks):
        with pytest.warns(UserWarning, match=r"no weight is left in out \(of 100 weights\).*at_least=1"):
            masks = make(params, 0.999)
        with warnings.catch_warnings(action="error"):
            some = make(params, 0.999, at_least=3)
        assert kept(some)["out"] == 3
        assert sum(kept(some).values()) == sum(kept(masks).values())
    with warnings.catch_warnings(action="error"):
        assert kept(jaxsparse.random_masks({"one": jnp.ones((1, 2)), **params}, 0.99, at_least=9))["one"] == 2
    few = jaxsparse.random_masks({"a": jnp.ones((30, 50)), "b": jnp.ones((30, 50))}, 0.999, at_least=100)
    assert kept(few) == {"a": 100, "b": 100}
    columns = jaxsparse.magnitude_masks(params, 0.99, structure={"*": "channel"}, at_least=2)
    assert int(columns["out"].any(0).sum()) == 2


def test_sparsities_and_structures_by_glob():
    params = make_params()
    masks = jaxsparse.random_masks(params, {"conv/*": 0.5, "*/kernel": 0.75})
    assert kept(masks) == {"attention/kernel": 64, "conv/kernel": 72, "dense/kernel": 96}
    masks = jaxsparse.random_masks(
        params, [("*", 0.5)], structure={"*e*/kernel": jaxsparse.n_of_m(1, 4), "*": "channel"}
    )
    assert kept(masks) == {"attention/kernel": 64, "conv/kernel": 72, "dense/kernel": 96}


def test_a_key_is_an_int_of_64_bits_or_a_key():
    for number in (7, -1, 2**31, 2**32 - 1, np.int64(7), np.uint32(2**32 - 1), np.array(3)):
        np.testing.assert_array_equal(
            jax.random.key_data(module.as_key(number)), jax.random.key_data(jax.random.key(int(number)))
        )
    for number in (2**32 + 7, np.int64(2**32 + 7), np.array(2**32 + 7)):  # JAX's own are those of 7
        assert jax.random.key_data(module.as_key(number)).tolist() == [1, 7]
        assert jax.jit(lambda n=number: jax.random.key_data(module.as_key(n)))().tolist() == [1, 7]
    key = jax.random.key(5)
    for same in (key, jax.random.key_data(key), 5, jnp.int32(5)):
        np.testing.assert_array_equal(jax.random.key_data(module.as_key(same)), jax.random.key_data(key))
    for wrong, told in [
        (2**63, "64 bits"),
        (0.5, "got 0.5"),
        (None, "got None"),
        (jax.random.split(key, 3), r"one PRNG key.*shape \(3,\)"),
    ]:
        with pytest.raises(ValueError, match=told):
            module.as_key(wrong)


def test_more_weights_than_int32_counts(monkeypatch):
    masks = {"a": jnp.arange(6).reshape(2, 3) < 4, "b": jnp.array(True)}
    many = {name: jax.ShapeDtypeStruct((1 << 16, 1 << 15), bool) for name in "ab"}
    with pytest.raises(ValueError, match="4294967296 weights cannot be counted in int32"):
        jax.eval_shape(jaxsparse.count, many)
    assert jax.eval_shape(jaxsparse.density, many).dtype == jnp.float32
    monkeypatch.setattr(module, "COUNTED", 6)
    assert jaxsparse.count(masks) == 4
    assert jaxsparse.count(masks).dtype == np.int64
    assert float(jaxsparse.density(masks)) == np.float32(4 / 6)


def test_leaves_of_zeros_are_named():
    params = {"up": jnp.ones((2, 2)), "down": jnp.zeros((2, 2))}
    with pytest.warns(UserWarning, match=r"no weight is left in down \(of 4 weights\): .* prunable= what only"):
        masks = jaxsparse.nonzero_masks(params)
    assert not masks["down"].any()


def test_a_layout_that_names_nothing_is_an_error():
    for layout in ({"typo": jaxsparse.Layout(0, 1)}, {"w": jaxsparse.Layout(0, 3)}):
        with pytest.raises(ValueError, match="layout"):
            jaxsparse.random_masks({"w": jnp.ones((4, 4))}, 0.5, prunable={"w": True}, layout=layout)
    with pytest.raises(ValueError, match=r"structure must be one of .*, got \['block', 2, 2\]"):
        jaxsparse.random_masks({"w": jnp.ones((4, 4))}, 0.5, structure=["block", 2, 2])
