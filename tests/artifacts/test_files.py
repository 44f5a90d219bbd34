import os

import numpy as np
import pytest
from flax.core import freeze

from jaxsparse.artifacts import files


def test_a_file_is_replaced_when_it_is_whole(tmp_path):
    path = tmp_path / "file"
    for content in (b"one", b"two"):
        with files.replacing(path) as file:
            file.write(content)
            assert not path.exists() or path.read_bytes() == b"one"
        assert path.read_bytes() == content


def test_a_file_that_was_not_finished_leaves_nothing(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"two")

    def stopped():
        with files.replacing(path) as file:
            file.write(b"three")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert path.read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["file"]


def test_files_have_the_usual_permissions(tmp_path):
    (tmp_path / "usual").write_bytes(b"")
    with files.replacing(tmp_path / "file") as file:
        file.write(b"")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_plain_trees():
    tree = files.plain_tree(freeze({"b": [np.float32(1)], "a": (None, {})}))
    assert (type(tree), type(tree["b"]), type(tree["a"])) == (dict, list, tuple)
    assert tree == {"b": [np.array(1, np.float32)], "a": (None, {})}
    assert isinstance(tree["b"][0], np.ndarray)
    assert files.plain_tree(np.arange(2, dtype=">i2")).dtype.isnative
