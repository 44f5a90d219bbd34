import io

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.style
import numpy as np
import optax
import pytest
from PIL import Image

import jaxsparse
from jaxsparse import inspect
from tests.problems import make_params

LINES = [
    {"step": 10, "epoch": 1, "train_loss": 2.0, "train_accuracy": 0.5, "layer_density": {"a": 0.1, "b": 0.1}},
    {
        "step": 20,
        "epoch": 2,
        "train_loss": 1.0,
        "train_accuracy": 1.0,
        "test_loss": 1.5,
        "test_accuracy": 0.8,
        "layer_density": {"a": 0.05, "b": 0.9},
        "flips": {"a": 30, "b": 0},
    },
]
HISTORY, NOTHING = inspect.History(tuple(LINES)), inspect.History(())


def drawn(figure):
    """The picture's pixels: it can be drawn, and is not of one colour."""
    file = io.BytesIO()
    figure.savefig(file)
    pixels = np.asarray(Image.open(file).convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 2
    return pixels


def lines_of(axes):
    return {line.get_label(): line.get_xydata().tolist() for line in axes.lines}


def texts(figure):
    return " ".join(text.get_text() for text in figure.findobj(matplotlib.text.Text))


def masks_of_a_network():
    tx = jaxsparse.chain(optax.sgd(0.1, momentum=0.9), jaxsparse.sparse_momentum(0.75, 10))
    return jaxsparse.get_masks(tx.init(make_params()), make_params())


@pytest.mark.slow
def test_masks_of_every_sparse_leaf():
    masks = masks_of_a_network()
    figure = inspect.plot_masks(masks)
    names = ["attention/kernel", "conv/kernel", "dense/kernel"]
    assert [axes.get_title().split("\n")[0] for axes in figure.axes] == names
    np.testing.assert_array_equal(figure.axes[2].images[0].get_array(), masks["dense"]["kernel"])
    drawn(figure)


def test_large_masks_are_drawn_by_the_density_of_tiles():
    masks = {"w": jnp.arange(100 * 30).reshape(100, 30) % 2 == 0}
    image = inspect.plot_masks(masks, max_side=10).axes[0].images[0].get_array()
    assert image.shape == (10, 10)
    assert abs(image.mean() - 0.5) < 1e-6


def test_masks_are_drawn_in_their_natural_order():
    masks = {f"conv{i}": jnp.ones((2, 2), bool) for i in (10, 2, 1)}
    names = ["conv1", "conv2", "conv10"]
    assert [axes.get_title().split("\n")[0] for axes in inspect.plot_masks(masks).axes] == names
    assert [label.get_text() for label in inspect.plot_densities(masks).axes[0].get_yticklabels()] == names


@pytest.mark.parametrize("plot", [inspect.plot_masks, inspect.plot_densities])
def test_a_network_without_masks(plot):
    with pytest.raises(ValueError, match=f"{plot.__name__}: no leaf has a mask, all are dense"):
        plot({"b": jnp.array(True)})


@pytest.mark.parametrize("plot", [inspect.plot_masks, inspect.plot_densities])
def test_masks_are_taken_from_an_optimizer_state_and_numbers_are_none(plot):
    tx = jaxsparse.chain(optax.sgd(0.1, momentum=0.9), jaxsparse.sparse_momentum(0.75, 10))
    np.testing.assert_array_equal(drawn(plot(tx.init(make_params()))), drawn(plot(masks_of_a_network())))
    with pytest.raises(ValueError, match="expected masks, or an optimizer state, got float32 for attention/bias"):
        plot(make_params())


def test_densities():
    masks = {"a": jnp.arange(100).reshape(10, 10) < 30, "b": jnp.arange(10) < 4, "bias": jnp.array(True)}
    figure = inspect.plot_densities(masks)
    assert [bar.get_width() for bar in figure.axes[0].patches] == pytest.approx([30, 40])
    assert figure.axes[0].get_xscale() == "linear"
    assert "30 of 100" in texts(figure)
    assert "all of them: 30.9%" in texts(figure)
    drawn(figure)
    wide = inspect.plot_densities({"a": masks["a"], "c": jnp.arange(1000) < 1, "none": jnp.zeros((2, 2), bool)})
    assert wide.axes[0].get_xscale() == "log"
    assert "0 of 4" in texts(wide)
    drawn(wide)
    drawn(inspect.plot_densities({"none": jnp.zeros((2, 2), bool)}))


def test_filters():
    mask = np.zeros((3, 3, 4, 5), bool)
    mask[1, 2, 0, :] = True
    mask[..., 2, 1] = True
    kernels, places = (axes.images[0].get_array() for axes in inspect.plot_filters(mask).axes[:2])
    np.testing.assert_array_equal(kernels, mask.sum((0, 1)))
    assert places[1, 2] == pytest.approx(100 * 6 / 20)
    assert places[0, 0] == pytest.approx(100 / 20)
    drawn(inspect.plot_filters(mask))
    with pytest.raises(ValueError, match=r"\(height, width, inputs, outputs\), none of them 0, got shape \(2, 2\)"):
        inspect.plot_filters(np.ones((2, 2), bool))


@pytest.mark.parametrize(
    "shape",
    [(12, 7), *(pytest.param(shape, marks=pytest.mark.slow) for shape in [(12, 1), (2, 3, 2, 5), (3, 3, 1, 200)])],
)
def test_receptive_fields_show_each_weight_once(shape):
    mask = np.random.RandomState(0).rand(*shape) < 0.3
    figure = inspect.plot_receptive_fields(mask, (3, 2, 2))
    units, pixels = (axes.images[0].get_array() for axes in figure.axes[:2])
    channels = 2 if mask.ndim == 2 else shape[2]
    shown = mask.reshape(-1, shape[-1])[:, :100]
    assert np.ma.masked_invalid(units).sum() * channels == pytest.approx(shown.sum())
    assert pixels.sum() * channels == pytest.approx(mask.sum())
    drawn(figure)


def test_receptive_fields_of_something_else():
    with pytest.raises(ValueError, match=r"expected a mask of 2 or 4 dimensions, none of them 0, got shape \(3,\)"):
        inspect.plot_receptive_fields(np.ones(3, bool))
    for image_shape in (None, (28, 28), (3, 3, 1)):
        with pytest.raises(ValueError, match=r"expected image_shape \(height, width, channels\) of 12 numbers"):
            inspect.plot_receptive_fields(np.ones((12, 2), bool), image_shape)


def test_weights_show_the_two_means_of_each_layer():
    params = {"fc1": np.array([[1.0, 3.0, -5.0, 7.0]]), "fc2": np.array([[2.0, 0.0]]), "bias": np.ones(3)}
    masks = {"fc1": np.array([[True, True, True, False]]), "fc2": np.array([[True, False]]), "bias": np.array(True)}
    figure = inspect.plot_weights(masks, params)
    assert [axes.get_title() for axes in figure.axes] == ["fc1, 3 of 4", "fc2, 1 of 2"]
    means = [[line.get_xdata()[0] for line in axes.lines] for axes in figure.axes]
    assert means == [[-5.0, 2.0], [2.0]]
    assert means[0] == [float(mean) for mean in jaxsparse.centroids(params, masks)["fc1"]]
    drawn(figure)
    with pytest.raises(ValueError, match="masks of fc1: expected bool"):
        inspect.plot_weights({**masks, "fc1": np.ones((2, 2), bool)}, params)


def test_history():
    figure = inspect.plot_history(HISTORY)
    losses, errors = figure.axes
    assert lines_of(losses) == {"train": [[1, 2], [2, 1]], "test": [[2, 1.5]]}
    assert lines_of(errors)["test"] == [[2, pytest.approx(20)]]
    drawn(figure)


@pytest.mark.slow
def test_histories_of_several_runs():
    figure = inspect.plot_history({"dense": HISTORY, "sparse": inspect.History(tuple(LINES[:1]))})
    assert list(lines_of(figure.axes[0])) == ["dense, train", "dense, test", "sparse, train"]
    colours = [line.get_color() for line in figure.axes[0].lines]
    assert colours[0] == colours[1] != colours[2]
    drawn(figure)


def test_layer_densities():
    figure = inspect.plot_layer_densities(HISTORY)
    densities, flips = figure.axes
    assert lines_of(densities) == {"a": [[1, 10], [2, 5]], "b": [[1, 10], [2, 90]]}
    assert lines_of(flips) == {"a": [[2, 30]], "b": [[2, 0]]}
    drawn(figure)


@pytest.mark.slow
@pytest.mark.parametrize("count", [18, 60])
def test_layer_densities_of_more_layers_than_colours(count):
    layers = {f"layer{i}": 0.5 for i in range(count)}
    figure = inspect.plot_layer_densities(inspect.History(({"step": 1, "epoch": 1, "layer_density": layers},)))
    assert len({(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines}) == count
    drawn(figure)


@pytest.mark.parametrize(("densities", "scale"), [((0.9, 1.0), "linear"), ((0.05, 1.0), "log"), ((0.0, 0.5), "linear")])
def test_layer_densities_are_logarithmic_over_a_wide_range(densities, scale):
    layers = dict(zip("ab", densities, strict=True))
    figure = inspect.plot_layer_densities(inspect.History(({"step": 1, "epoch": 1, "layer_density": layers},)))
    assert figure.axes[0].get_yscale() == scale


@pytest.mark.slow
def test_accuracy_against_kept():
    runs = {"ours": [(0.2, 0.97), (0.02, 0.95, 0.01)], "theirs": [(0.05, 0.9)], "none yet": []}
    figure = inspect.plot_accuracy_against_kept(runs, baselines={"dense": 0.98})
    axes = figure.axes[0]
    assert axes.get_xscale() == "log"
    assert [line.get_xydata().tolist() for line in axes.lines if line.get_label() == "dense"] == [[[0, 98], [1, 98]]]
    assert [axes.containers[0].lines[0].get_xydata().tolist()] == [[[2, 95], [20, 97]]]
    drawn(figure)
    drawn(inspect.plot_accuracy_against_kept({"all pruned": [(0.0, 0.1), (0.5, 0.9)]}))
    for point in ((2.0, 97.0), (0.1,), (0.1, float("nan"))):
        with pytest.raises(ValueError, match=r"ours: expected \(kept, accuracy\)"):
            inspect.plot_accuracy_against_kept({"ours": [point]})


def test_what_was_logged_is_drawn_without_the_rest():
    lines = ({"step": 1, "train_loss": 1.0, "validation_accuracy": 0.5}, {"step": 2, "test_accuracy": 0.75})
    losses, errors = inspect.plot_history(inspect.History(lines)).axes
    assert lines_of(errors) == {"validation": [[1, 50]], "test": [[2, 25]]}
    assert [text.get_text() for text in losses.get_legend().get_texts()] == ["train", "validation", "test"]
    losses, errors = inspect.plot_history(inspect.History(lines[1:])).axes
    assert [text.get_text() for text in losses.texts] == ["nothing logged yet"]
    assert not errors.texts
    assert [text.get_text() for text in errors.get_legend().get_texts()] == ["test"]


@pytest.mark.slow
def test_a_single_point_is_seen():
    figure = inspect.plot_layer_densities(inspect.History(tuple(LINES)))
    assert [line.get_marker() for line in figure.axes[1].lines] == ["o", "o"]
    _, flips = figure.axes
    pixels = drawn(figure)
    box = flips.get_window_extent()
    height = len(pixels)
    panel = pixels[height - int(box.y1) + 2 : height - int(box.y0) + 8, int(box.x0) - 8 : int(box.x1) + 8].astype(int)
    assert (np.ptp(panel, axis=-1) > 100).any()  # in colour


@pytest.mark.slow
def test_names_are_drawn_as_they_are(recwarn):
    odd = {"_stem$x_$y": 0.5, "fc": 0.4}
    history = inspect.History(({"step": 1, "train_loss": 1.0, "layer_density": odd, "flips": odd},))
    masks = {name: np.eye(3, dtype=bool) for name in odd}
    figures = [
        inspect.plot_layer_densities(history),
        inspect.plot_history(dict.fromkeys(odd, history)),
        inspect.plot_accuracy_against_kept({name: [(0.1, 0.9)] for name in odd}, baselines={"_d$e$": 0.9}),
        inspect.plot_masks(masks),
        inspect.plot_densities(masks),
        inspect.plot_weights(masks, {name: np.ones((3, 3)) for name in odd}),
        inspect.plot_schedules({name: lambda step: 0.1 for name in odd}, 3),
        inspect.plot_class_specialization({"_$a": {"_$b$": [0.5]}, "b": {"_$b$": [0.5]}}),
    ]
    for figure in figures:
        drawn(figure)
    legends = [[text.get_text().strip("\u200b") for text in figure.legends[0].get_texts()] for figure in figures[:3]]
    assert legends[0] == [r"_stem\$x_\$y", "fc"]
    assert legends[1] == [r"_stem\$x_\$y, train", "fc, train"]
    assert legends[2] == [r"_d\$e\$", r"_stem\$x_\$y", "fc"]
    assert not recwarn.list


@pytest.mark.slow
def test_empty_layers_and_weights_that_are_not_finite():
    masks = {"none": np.ones((5, 0), bool), "some": np.ones((2, 2), bool), "²": np.ones((0, 3), bool)}
    drawn(inspect.plot_masks(masks))
    drawn(inspect.plot_densities(masks))
    params = {"w": np.array([[1.0, np.inf, np.nan, -2.0]]), "v": np.full((1, 2), np.nan)}
    figure = inspect.plot_weights(jax.tree.map(lambda leaf: np.ones(leaf.shape, bool), params), params)
    assert [axes.get_title() for axes in figure.axes] == ["v, 2 of 2\n2 not finite", "w, 4 of 4\n2 not finite"]
    assert [line.get_xdata()[0] for line in figure.axes[1].lines] == [-2.0, 1.0]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "mean of the negative",
        "mean of the positive",
    ]
    drawn(figure)
    with pytest.raises(ValueError, match=r"expected a mask of 2 or 4 dimensions, none of them 0, got shape \(64, 0\)"):
        inspect.plot_receptive_fields(np.ones((64, 0), bool), (8, 8, 1))
    with pytest.raises(ValueError, match=r"none of them 0, got shape \(3, 3, 0, 4\)"):
        inspect.plot_filters(np.ones((3, 3, 0, 4), bool))


def test_weights_of_an_optimizer_state():
    params = make_params()
    tx = jaxsparse.chain(optax.sgd(0.1, momentum=0.9), jaxsparse.sparse_momentum(0.75, 10))
    state = tx.init(params)
    titles = [
        [axes.get_title() for axes in inspect.plot_weights(given, params).axes]
        for given in (state, jaxsparse.get_masks(state, params))
    ]
    assert titles[0] == titles[1]
    with pytest.raises(ValueError, match="there is no sparse link in this optimizer state"):
        inspect.plot_weights(optax.adam(0.1).init(params), params)


def test_schedules():
    figure = inspect.plot_schedules({"a": lambda t: 0.1 * t, "b": lambda t: 0.5}, steps=3)
    assert lines_of(figure.axes[0]) == {"a": [[0, 0], [1, 10], [2, 20]], "b": [[0, 50], [1, 50], [2, 50]]}
    drawn(figure)
    (line,) = inspect.plot_schedules({"long": lambda t: t / 10**6}, 10**6).axes[0].lines
    assert (line.get_xdata()[0], line.get_xdata()[-1], len(line.get_xdata())) == (0, 10**6 - 1, 500)


@pytest.mark.slow
def test_class_specialization_back_to_back():
    dense, sparse = {"conv": [0.5, 0.5, 0.9], "only": [0.1]}, {"conv": [0.2, 0.3]}
    figure = inspect.plot_class_specialization({"dense": dense, "sparse": sparse})
    (axes,) = figure.axes
    left, right = (sum(bar.get_width() for bar in bars) for bars in axes.containers)
    assert (left, right) == (-3, 2)
    assert [line.get_ydata()[0] for line in axes.lines[:2]] == pytest.approx([1.9 / 3, 0.25])
    drawn(figure)
    drawn(inspect.plot_class_specialization({"dense": {"conv": []}, "sparse": {"conv": []}}))
    with pytest.raises(ValueError, match=r"expected two networks by label, got \['dense'\]"):
        inspect.plot_class_specialization({"dense": dense})
    with pytest.raises(ValueError, match="no layer is in both: dense has only, sparse has conv"):
        inspect.plot_class_specialization({"dense": {"only": [0.1]}, "sparse": sparse})


@pytest.mark.slow
def test_nothing_to_draw_yet():
    assert "nothing logged yet" in texts(inspect.plot_history(NOTHING))
    assert "no densities logged" in texts(inspect.plot_layer_densities(NOTHING))
    empty = inspect.plot_weights({"w": np.zeros((2, 2), bool)}, {"w": np.zeros((2, 2))})
    assert "no layer with a mask keeps any weight" in texts(empty)
    for figure in (inspect.plot_history(NOTHING), inspect.plot_accuracy_against_kept({}), empty):
        drawn(figure)


def test_pictures_follow_the_style():
    masks = {"w": jnp.eye(4, dtype=bool)}
    with matplotlib.style.context("dark_background"):
        dark = drawn(inspect.plot_masks(masks))
    light = drawn(inspect.plot_masks(masks))
    assert light[0, 0].tolist() == [255] * 3
    assert dark[0, 0].tolist() == [0] * 3
    assert light.mean() > 128 > dark.mean()


def test_notebooks_show_pictures_by_themselves():
    assert inspect.plot_masks({"w": jnp.eye(4, dtype=bool)})._repr_png_().startswith(b"\x89PNG")


def test_arrays_of_numpy_and_jax_alike():
    masks = masks_of_a_network()
    as_numpy = jax.tree.map(np.asarray, masks)
    np.testing.assert_array_equal(drawn(inspect.plot_densities(masks)), drawn(inspect.plot_densities(as_numpy)))


@pytest.mark.slow
def test_a_run_without_flips_has_no_panel_for_them():
    line = {"step": 1, "epoch": 1, "layer_density": {"a": 0.5}}
    for flips, panels in (({}, 1), ({"flips": {"a": 3}}, 2)):
        figure = inspect.plot_layer_densities(inspect.History((line | flips,)))
        assert len(figure.axes) == panels
        drawn(figure)
