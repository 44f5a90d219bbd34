import numpy as np
import pytest

from experiments import plots

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


def saved(figure, tmp_path):
    figure.savefig(tmp_path / "figure.png")
    return (tmp_path / "figure.png").stat().st_size > 1000


def lines_of(axes):
    return {line.get_label(): line.get_xydata().tolist() for line in axes.lines}


def test_learning_curve(tmp_path):
    figure = plots.learning_curve(LINES)
    losses, errors = figure.axes
    assert lines_of(losses) == {"train": [[1, 2], [2, 1]], "test": [[2, 1.5]]}
    assert lines_of(errors)["test"] == [[2, pytest.approx(20)]]
    assert saved(figure, tmp_path)


def test_layer_densities(tmp_path):
    figure = plots.layer_densities(LINES)
    densities, flips = figure.axes
    assert lines_of(densities) == {"a": [[1, 10], [2, 5]], "b": [[1, 10], [2, 90]]}
    assert lines_of(flips) == {"a": [[2, 30]], "b": [[2, 0]]}
    assert saved(figure, tmp_path)


@pytest.mark.parametrize("count", [20, 60])
def test_layer_densities_of_more_layers_than_colours(tmp_path, count):
    layers = {f"layer{i}": 0.5 for i in range(count)}
    figure = plots.layer_densities([{"step": 1, "epoch": 1, "layer_density": layers}])
    styles = {(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines}
    assert len(styles) == count
    assert saved(figure, tmp_path)


@pytest.mark.parametrize(("densities", "scale"), [((0.9, 1.0), "linear"), ((0.05, 1.0), "log"), ((0.0, 0.5), "linear")])
def test_layer_densities_are_logarithmic_over_a_wide_range(densities, scale):
    layers = dict(zip("ab", densities, strict=True))
    figure = plots.layer_densities([{"step": 1, "epoch": 1, "layer_density": layers}])
    assert figure.axes[0].get_yscale() == scale


@pytest.mark.parametrize("shape", [(12, 7), (12, 1), (2, 3, 2, 5), (3, 3, 1, 200)])
def test_receptive_fields_show_each_weight_once(tmp_path, shape):
    mask = np.random.RandomState(0).rand(*shape) < 0.3
    figure = plots.receptive_fields(mask, (3, 2, 2))
    units, pixels = (axes.images[0].get_array() for axes in figure.axes[:2])
    channels = 2 if mask.ndim == 2 else shape[2]
    drawn = mask.reshape(-1, shape[-1])[:, :100]
    assert np.ma.masked_invalid(units).sum() * channels == pytest.approx(drawn.sum())
    assert pixels.sum() * channels == pytest.approx(mask.sum())
    assert saved(figure, tmp_path)


def test_errors_against_numbers_and_names(tmp_path):
    points = {1: (2.5, 0.1), 2: (2.0, None), 20: (1.2, 0.0)}
    figure = plots.errors_against("weights kept (%)", {"ours": points}, {"dense": 1.3}, "a title")
    axes = figure.axes[0]
    assert axes.get_xscale() == "log"
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1", "2", "20"]
    assert saved(figure, tmp_path)
    near = plots.errors_against("weights kept (%)", {"ours": {1: (2, 0), 1.01: (2, 0), 8: (1, 0)}}, {}, "")
    assert [text.get_text() for text in near.axes[0].get_xticklabels()] == ["1", "8"]
    named = plots.errors_against("variant", {"ours": {"a": (1, 0.1), "b": (2, 0.1)}, "paper": {"b": (2, 0)}}, {}, "")
    assert [text.get_text() for text in named.axes[0].get_xticklabels()] == ["a", "b"]
    assert saved(named, tmp_path)


def test_nothing_to_draw_yet(tmp_path):
    assert saved(plots.learning_curve([]), tmp_path)
    assert saved(plots.layer_densities([]), tmp_path)
    assert saved(plots.errors_against("x", {}, {}, "nothing was run"), tmp_path)


def test_weight_distributions_show_the_two_means_of_each_layer(tmp_path):
    params = {"fc1": np.array([[1.0, 3.0, -5.0, 7.0]]), "fc2": np.array([[2.0, 0.0]]), "bias": np.ones(3)}
    masks = {"fc1": np.array([[True, True, True, False]]), "fc2": np.array([[True, False]]), "bias": np.array(True)}
    figure = plots.weight_distributions(params, masks)
    assert [axes.get_title() for axes in figure.axes] == ["fc1, 3 of 4", "fc2, 1 of 2"]
    assert [[line.get_xdata()[0] for line in axes.lines] for axes in figure.axes] == [[-5.0, 2.0], [2.0]]
    assert saved(figure, tmp_path)


def test_sparsities(tmp_path):
    figure = plots.sparsities({"a": lambda t: 0.1 * t, "b": lambda t: 0.5}, stages=3)
    assert lines_of(figure.axes[0]) == {"a": [[0, 0], [1, 10], [2, 20]], "b": [[0, 50], [1, 50], [2, 50]]}
    assert saved(figure, tmp_path)
