import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jaxsparse
from jaxsparse import Layout
from jaxsparse.prunable import prunable_leaves
from jaxsparse.structures import block, channel, check_structure, check_units, kernel, leaf_structures, n_of_m, weight
from jaxsparse.trees import by_path
from tests.problems import make_params, slow_except

# --- Units ------------------------------------------------------------------------------------------------------------


def test_structures_are_checked():
    check_structure({"conv/kernel": "channel", "dense/kernel": block(4, 4)})
    with pytest.raises(
        ValueError, match=r"must be one of \['weight', 'kernel', 'channel'\] or made by jaxsparse.block.*, got 'blob'"
    ):
        check_structure("blob")
    with pytest.raises(ValueError, match="got 'block'"):  # which has sizes
        check_structure("block")
    with pytest.raises(ValueError, match=r"must be one of \['weight', 'kernel', 'channel'\], got n_of_m\(2, 4\)"):
        check_structure({"a": n_of_m(2, 4)}, known=("weight", "kernel", "channel"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: block(2.0, 4), r"block needs sizes that are ints, got block\(2.0, 4\)"),
        (lambda: n_of_m(2.0, 4), r"n_of_m needs sizes that are ints, got n_of_m\(2.0, 4\)"),
        (lambda: block(0, 4), r"block needs sizes of at least 1, got block\(0, 4\)"),
        (lambda: n_of_m(5, 4), r"n_of_m needs 1 <= n <= m, got n_of_m\(5, 4\)"),
        (lambda: n_of_m(0, 4), "n_of_m needs 1 <= n <= m"),
        (lambda: block(4, 4, score="max"), r"score must be one of \['mean', 'sum'\], got 'max'"),
        (lambda: channel(score="max"), "score must be one of"),
        (lambda: kernel(ragged="ignore"), r"ragged must be one of \['warn', 'error'\], got 'ignore'"),
    ],
)
def test_bad_numbers(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def by_loop(structure, leaf, reduce):
    """The definition: one unit after the other."""
    leaf = np.asarray(leaf)
    tile, shape = structure.tile(leaf.shape), structure.unit_shape(leaf.shape)
    out = [reduce(leaf[tuple(slice(i * t, (i + 1) * t) for i, t in zip(at, tile, strict=True))])
           for at in np.ndindex(shape)]  # fmt: skip
    return np.array(out).reshape(shape)


UNITS = [
    # structure, shape of the leaf, shape of its units, weights of a unit
    (block(4, 6), (16, 24), (4, 4), 24),
    (block(2, 4), (3, 3, 2, 8), (3, 3, 1, 2), 8),
    (block(16, 1), (16, 24), (1, 24), 16),
    (block(1, 1), (4, 6), (4, 6), 1),
    (kernel(), (3, 5, 2, 8), (1, 1, 2, 8), 15),
    (kernel(), (1, 1, 2, 8), (1, 1, 2, 8), 1),
    (kernel(), (5, 2, 8), (1, 2, 8), 5),
    (channel(), (3, 3, 2, 8), (1, 1, 1, 8), 18),
    (channel(), (16, 24), (1, 24), 16),
    (weight(), (3, 4), (3, 4), 1),
    (n_of_m(2, 4), (8, 3), (8, 3), 1),
]
QUICK = [UNITS[i] for i in (0, 10)]


@pytest.mark.parametrize(
    ("structure", "shape", "units"),
    [
        (channel(), (3, 3, 0, 8), (1, 1, 0, 8)),
        (channel(), (0, 8), (0, 8)),
        (kernel(), (0, 3, 2, 8), (0, 1, 2, 8)),
        (kernel(layout=Layout(-1, -2)), (0, 3, 2, 8), (0, 1, 8, 2)),
        (block(2, 4), (0, 8), (0, 2)),
    ],
)
def test_a_leaf_without_weights_has_no_units(structure, shape, units):
    leaf = jnp.ones(shape)
    assert structure.unit_shape(shape) == structure.scores(leaf).shape == structure.units(leaf > 0).shape == units
    assert structure.expand(structure.units(leaf > 0), leaf).shape == shape
    assert structure.holds(leaf > 0)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_leaf_without_weights_leaves_the_others_alone(scope):
    params = {"empty": jnp.ones((3, 3, 0, 8)), "conv": jnp.broadcast_to(jnp.arange(1.0, 9), (3, 3, 2, 8))}
    masks = jaxsparse.score_masks(params, params, 0.5, structure="channel", scope=scope)
    assert masks["empty"].shape == (3, 3, 0, 8)
    assert masks["conv"][0, 0, 0].tolist() == [False] * 4 + [True] * 4


@pytest.mark.parametrize(
    ("structure", "shape", "units", "size"), slow_except(QUICK, UNITS), ids=lambda x: str(x).replace(" ", "")
)
def test_units_are_what_a_loop_finds_and_expand_undoes_them(structure, shape, units, size):
    assert structure.fits(shape)
    assert structure.unit_shape(shape) == units
    assert structure.unit_size(shape) == size
    leaf = jax.random.normal(jax.random.key(0), shape)
    for score, reduce in (("mean", np.mean), ("sum", np.sum)):
        scores = jax.jit(type(structure)(**{**vars(structure), "score": score}).scores)(leaf)
        np.testing.assert_allclose(scores, by_loop(structure, np.abs(np.asarray(leaf)), reduce), rtol=1e-5)
    mask = jnp.zeros(shape, bool).at[(0,) * len(shape)].set(True).at[(-1,) * len(shape)].set(True)
    live = jax.jit(structure.units)(mask)
    assert live.dtype == bool
    np.testing.assert_array_equal(live, by_loop(structure, np.asarray(mask), np.any))
    assert int(live.sum()) == 2
    whole = jax.jit(structure.expand)(live, leaf)
    assert whole.shape == shape
    np.testing.assert_array_equal(by_loop(structure, np.asarray(whole), np.min), live)
    np.testing.assert_array_equal(by_loop(structure, np.asarray(whole), np.max), live)
    np.testing.assert_array_equal(structure.units(whole), live)
    # Under vmap, one lane is what it is alone.
    lanes = jax.vmap(lambda x: structure.expand(structure.scores(x), x))(jnp.stack([leaf, 2 * leaf]))
    np.testing.assert_allclose(lanes[1], 2 * structure.expand(structure.scores(leaf), leaf), rtol=1e-6)


def test_n_of_m_marks_the_largest_of_every_group():
    rule, scores = n_of_m(2, 4), jax.random.normal(jax.random.key(0), (3, 8, 5))
    mask = rule.top(scores, absolute=True)
    for i, g, j in np.ndindex(3, 2, 5):
        rows = slice(4 * g, 4 * g + 4)
        largest = np.sort(np.abs(scores[i, rows, j]))[2:]
        np.testing.assert_array_equal(np.sort(np.abs(scores[i, rows, j])[mask[i, rows, j]]), largest)
    assert (rule.counts(mask) == 2).all()
    assert bool(rule.holds(mask))
    assert not bool(rule.holds(mask.at[0, 0, 0].set(~mask[0, 0, 0])))
    # A number for each group, and only where allowed.
    wanted = jnp.arange(3 * 2 * 5).reshape(3, 2, 5) % 3
    some = rule.top(scores, wanted, where=~mask)
    np.testing.assert_array_equal(rule.counts(some), wanted)
    assert not (some & mask).any()


def test_not_finite_scores_are_seen():
    leaf = jnp.ones((2, 8)).at[0, 0].set(jnp.nan).at[1, 3].set(-jnp.inf)
    assert np.isnan(block(2, 2).scores(leaf)[0, 0])
    assert block(2, 2).scores(leaf)[0, 1:].tolist() == [np.inf, 1, 1]


@pytest.mark.parametrize(
    "use",
    [lambda x: block(8, 8).units(x), lambda x: block(8, 8).expand(x, x), lambda x: n_of_m(2, 8).counts(x),
     lambda x: n_of_m(2, 8).top(x * 1.0), lambda x: kernel().scores(x * 1.0)],
)  # fmt: skip
def test_an_array_that_does_not_fit_is_refused(use):
    with pytest.raises(ValueError, match=r"does not fit an array of shape \(4, 4\)"):
        use(jnp.ones((4, 4), bool))


def test_units_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"units of shape \(2, 2\) in an array of \(4, 4\), got \(4, 4\)"):
        block(2, 2).expand(jnp.ones((4, 4)), jnp.ones((4, 4)))


@pytest.mark.parametrize("spec", [("d", None), (None, "d")])
@pytest.mark.parametrize(
    "structure", slow_except([block(2, 3), n_of_m(1, 4)], [block(2, 3), block(4, 6), channel(), n_of_m(1, 4)])
)
def test_sharded_units_are_bit_equal(structure, spec):
    # Units within one device and across several: sums in fixed point do not depend on the order.
    leaf = jax.random.normal(jax.random.key(0), (16, 24))
    placed = jax.device_put(leaf, NamedSharding(jax.make_mesh((8,), ("d",)), PartitionSpec(*spec)))
    np.testing.assert_array_equal(jax.jit(structure.scores)(placed), structure.scores(leaf))

    def best(x):
        scores = structure.scores(x)
        whole = structure.top(scores) if isinstance(structure, n_of_m) else structure.expand(scores > 0.8, x)
        return whole & structure.expand(structure.units(whole), x)

    mask = jax.jit(best)(placed)
    assert mask.sharding.is_equivalent_to(placed.sharding, 2)
    np.testing.assert_array_equal(mask, best(leaf))
    assert 0 < int(mask.sum()) < mask.size


# --- Which leaf has which ---------------------------------------------------------------------------------------------


def found(structure, params=None):
    params = make_params() if params is None else params
    structures = by_path(leaf_structures(structure, params, prunable_leaves(params)))
    return {path: repr(unit) for path, unit in structures.items()}


def test_strings_stand_for_the_defaults_and_matrices_go_by_single_weights():
    params = make_params()
    weights = {"attention/kernel": "weight()", "dense/kernel": "weight()"}
    for name in ("kernel", "channel"):
        assert found(name, params) == {"conv/kernel": f"{name}()", **weights}
    assert found(channel(score="sum"), params)["conv/kernel"] == "channel(score='sum')"
    assert set(found("weight").values()) == {"weight()"}
    with pytest.warns(UserWarning, match=r"'channel' is for convolutions.* only dense/kernel of shape \(16, 24\)"):
        found("channel", {"dense": params["dense"]})


def test_a_mapping_names_leaves():
    structure = {"dense/kernel": "channel", "conv/kernel": block(2, 4), "*/kernel": n_of_m(2, 4)}
    with warnings.catch_warnings(action="error"):
        assert found(structure) == {
            "attention/kernel": "n_of_m(2, 4, layout=Layout(inputs=(0,), outputs=(1, 2), stack=()))",
            "conv/kernel": "block(2, 4)",
            "dense/kernel": "channel()",
        }
        assert found({"dense/kernel": n_of_m(1, 4)})["conv/kernel"] == "weight()"
    with pytest.raises(ValueError, match="structure: 'dense/kernle' matches none of attention/kernel, conv/kernel, "):
        found({"dense/kernle": block(1, 2)})
    with pytest.raises(ValueError, match="'dense/bias' matches none of"):  # which has no mask, so no structure
        found({"dense/bias": block(1, 2)})
    with pytest.raises(ValueError, match=r"'dense/\*' selects nothing, since '\*' before it took dense/kernel"):
        found({"*": "weight", "dense/*": block(1, 2)})


def test_leaves_that_do_not_fit_are_named_in_one_warning():
    with warnings.catch_warnings(record=True, action="always") as seen:
        structures = found(block(16, 3))
    assert structures == {"attention/kernel": "weight()", "conv/kernel": "weight()", "dense/kernel": "block(16, 3)"}
    assert len(seen) == 1
    assert all(leaf in str(seen[0].message) for leaf in ("attention/kernel of shape (16, 2, 8)", "conv/kernel"))
    assert seen[0].category is UserWarning


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        (
            block(4, 3, ragged="error"),
            r"attention/kernel of shape \(16, 2, 8\), .* conv/kernel of shape \(3, 3, 2, 8\)",
        ),
        (n_of_m(2, 4, ragged="error"), r"structure n_of_m\(2, 4, ragged='error'\) does not fit conv/kernel"),
        ({"dense/kernel": "kernel"}, r"structure 'kernel' does not fit dense/kernel of shape \(16, 24\)"),
    ],
)
def test_leaves_that_do_not_fit_are_an_error_if_asked(structure, message):
    with pytest.raises(ValueError, match=message):
        found(structure)
    with pytest.raises(ValueError, match=r"structure 'channel' does not fit odd of shape \(4, 5, 6\).*layout="):
        found("channel", {"odd": jnp.ones((4, 5, 6)), **make_params()})


def test_masks_that_cut_units_are_named():
    params = {name: leaf for name, leaf in make_params().items() if name in ("conv", "dense")}
    structures = leaf_structures({"conv/kernel": "channel", "dense/kernel": n_of_m(1, 4)}, params,
                                 prunable_leaves(params))  # fmt: skip
    conv = jnp.zeros((3, 3, 2, 8), bool).at[..., 3].set(True)
    dense = n_of_m(1, 4).top(params["dense"]["kernel"])
    state = {"bias": optax.MaskedNode()}
    masks = {"conv": {**state, "kernel": conv}, "dense": {**state, "kernel": dense}}
    check_units(masks, structures)
    masks["dense"]["kernel"] = dense.at[:, 3].set(False)
    with pytest.raises(ValueError, match=r"do not in dense/kernel of shape \(16, 24\) \(structure n_of_m\(1, 4\)\)"):
        check_units(masks, structures)
    masks["conv"]["kernel"] = conv.at[0, 0, 0, 0].set(True)
    with pytest.raises(ValueError, match="do not in conv/kernel .*, dense/kernel"):
        jax.jit(lambda: check_units(masks, structures))()
