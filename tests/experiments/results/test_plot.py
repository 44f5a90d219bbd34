import math

from experiments.results import plot


def saved(figure, tmp_path):
    figure.savefig(tmp_path / "figure.png")
    return (tmp_path / "figure.png").stat().st_size > 1000


def test_errors_against_numbers_and_names(tmp_path):
    points = {1: (2.5, 0.1), 2: (2.0, math.nan), 20: (1.2, 0.0)}
    figure = plot.errors_against("weights kept (%)", {"ours": points}, {"dense": 1.3}, "a title")
    axes = figure.axes[0]
    assert axes.get_xscale() == "log"
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1", "2", "20"]
    assert saved(figure, tmp_path)
    near = plot.errors_against("weights kept (%)", {"ours": {1: (2, 0), 1.01: (2, 0), 8: (1, 0)}}, {}, "")
    assert [text.get_text() for text in near.axes[0].get_xticklabels()] == ["1", "8"]
    named = plot.errors_against("variant", {"ours": {"a": (1, 0.1), "b": (2, 0.1)}, "paper": {"b": (2, 0)}}, {}, "")
    assert [text.get_text() for text in named.axes[0].get_xticklabels()] == ["a", "b"]
    assert saved(named, tmp_path)


def test_nothing_was_run_yet(tmp_path):
    assert saved(plot.errors_against("x", {}, {}, "nothing was run"), tmp_path)
