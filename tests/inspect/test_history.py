import json

import numpy as np
import pytest

from jaxsparse.inspect import History, read_history

LINES = [
    {"step": 10 * i, "epoch": i, "train_loss": 1 / i, "layer_density": {"fc10": 0.1, "fc2": i / 100}}
    for i in range(1, 41)
]
LINES[-1] |= {"test_accuracy": 0.5, "density": 0.25, "flips": {"fc2": 3}}


def written(tmp_path, text):
    (tmp_path / "metrics.jsonl").write_text(text)
    return tmp_path


def test_reads_the_folder_of_a_run_and_its_file(tmp_path):
    folder = written(tmp_path, "".join(json.dumps(line) + "\n" for line in LINES))
    assert read_history(folder) == read_history(str(folder / "metrics.jsonl")) == History(tuple(LINES))


def test_a_last_line_that_was_cut_off_is_left_out(tmp_path):
    text = "".join(json.dumps(line) + "\n" for line in LINES)
    assert read_history(written(tmp_path, text[:-20])).lines == tuple(LINES[:-1])
    assert read_history(written(tmp_path, "")).lines == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"step": 1, "epoch": 1}\nnonsense\n{"step": 2, "epoch": 1}\n', "line 2 is not JSON"),
        ('{"epoch": 1}\n', 'line 1: expected an object with a "step", got {"epoch": 1}'),
        ("[1, 2]\n", "line 1: expected an object"),
    ],
)
def test_files_of_something_else(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_history(written(tmp_path, text))


def test_a_folder_of_something_else(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is not the folder of a run: it has no metrics\.jsonl"):
        read_history(tmp_path)


def test_what_some_lines_lack_is_left_out():
    history = History(({"step": 1, "speed": {}}, {"step": 2, "speed": {"images/s": 3.0}}))
    assert [values.tolist() for values in history.series("speed/images/s")] == [[2], [3]]
    with pytest.raises(KeyError, match="speed/steps was not logged; speed has images/s"):
        history.series("speed/steps")


def test_series():
    history = History(tuple(LINES))
    epochs, losses = history.series("train_loss")
    np.testing.assert_array_equal(epochs, np.arange(1, 41))
    np.testing.assert_allclose(losses, 1 / np.arange(1, 41))
    assert [values.tolist() for values in history.series("test_accuracy")] == [[40], [0.5]]
    assert history.series("layer_density/fc2")[1][-1] == 0.4
    epochs, of_layer = history.layers("layer_density")
    assert list(of_layer) == ["fc2", "fc10"]
    assert len(epochs) == len(of_layer["fc10"]) == 40
    assert history.names == ("step", "epoch", "train_loss", "layer_density", "test_accuracy", "density", "flips")
    with pytest.raises(KeyError, match="validation_loss was not logged; the log has step, epoch"):
        history.series("validation_loss")
    with pytest.raises(KeyError, match="the log has no lines"):
        History(()).layers("flips")


def test_without_epochs_the_steps_stand_for_them():
    history = History(({"step": 5, "loss": 1.0}, {"step": 7, "loss": 0.5}))
    assert history.series("loss")[0].tolist() == [5, 7]
    assert history.table().rows == (("5", "5"), ("7", "7"))


def test_the_table_has_the_evaluated_lines_or_some_of_all():
    assert str(History(tuple(LINES))).splitlines()[2:] == ["   40   400      0.0250         50.00%   25.00%"]
    table = History(tuple(LINES[:-1])).table()
    assert table.header == ("epoch", "step", "train loss")
    assert len(table.rows) == 12
    assert [table.rows[0][0], table.rows[-1][0]] == ["1", "39"]
    assert str(History(())).splitlines() == ["epoch  step", "-----  ----"]


def test_numbers_and_layers_are_told_apart():
    history = History(tuple(LINES))
    with pytest.raises(KeyError, match="layer_density was logged by layer, as layer_density/fc10"):
        history.series("layer_density")
    for ask in (lambda: history.series("train_loss/fc2"), lambda: history.layers("train_loss")):
        with pytest.raises(KeyError, match="train_loss was logged as one number, not by layer"):
            ask()
