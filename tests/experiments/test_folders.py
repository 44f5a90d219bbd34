"""Folders of images by class: what is taken for a class, which files are read, and what is left to test on."""

import numpy as np
import pytest

from experiments import folders, own_data
from experiments.inputs import open_dataset
from experiments.options import check_config
from tests.experiments.test_train import smoke_config


def write(folder, *names):
    """Empty files, which are images by their names."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


def images(classes, count):
    """The paths of so many images of each class."""
    return [f"{name}/{i}.png" for name in classes for i in range(count)]


# --- Splits and classes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        ("Train", "Test"),
        ("training_set", "test_set"),
        ("training", "testing"),
        ("train-data", "valid"),
        ("Validation Set", "other"),
        ("trainset", "testset"),
    ],
)
def test_splits_of_other_names_are_no_classes(tmp_path, names):
    write(tmp_path, *images([f"{name}/{animal}" for name in names for animal in ("cat", "dog")], 2))
    with pytest.raises(ValueError, match="as a split may be called. The folders of splits are called 'train'") as error:
        folders.find(tmp_path)
    assert f"{tmp_path} has '{sorted(names)[0]}'" in str(error.value)
    assert "if they are classes, put all of them into a folder 'train'" in str(error.value)


@pytest.mark.parametrize("names", [("a", "b"), ("2023", "2024", "2025")])
def test_folders_with_the_same_classes_inside_are_no_classes(tmp_path, names):
    write(tmp_path, *images([f"{name}/{animal}" for name in names for animal in ("cat", "dog")], 2))
    with pytest.raises(ValueError, match="which all have 'cat', 'dog' inside, as splits have their classes") as error:
        folders.find(tmp_path)
    assert "if they are classes, put all of them into a folder 'train'" in str(error.value)


def test_folders_that_may_be_classes(tmp_path):
    write(tmp_path / "split", *images(("train/Test", "train/training", "train/val"), 1))  # in a split any name is one
    assert folders.find(tmp_path / "split").classes == ["Test", "training", "val"]
    write(tmp_path / "inside", *images([f"train/{name}/{of}" for name in "ab" for of in ("cat", "dog")], 1))
    assert folders.find(tmp_path / "inside").classes == ["a", "b"]
    write(tmp_path / "tiny", *images(("n01/images", "n02/images"), 1))
    assert folders.find(tmp_path / "tiny").classes == ["n01", "n02"]
    write(tmp_path / "others", *images(("cat/black", "cat/red", "dog/red", "testimony", "trains"), 1))
    assert folders.find(tmp_path / "others").classes == ["cat", "dog", "testimony", "trains"]


# --- Files ------------------------------------------------------------------------------------------------------------


def test_hidden_folders_of_a_class_are_left_out(tmp_path):
    write(tmp_path, "cat/0.png", "cat/inside/1.png", "cat/inside/.thumbnails/1.png", "dog/0.png", ".git/0.png")
    write(tmp_path, "cat/.ipynb_checkpoints/0-checkpoint.png", "cat/.cache/no_image.txt")
    assert sorted(folders.find(tmp_path).splits["train"].names) == ["cat/0.png", "cat/inside/1.png", "dog/0.png"]


def test_links_are_followed_but_not_around_in_a_circle(tmp_path):
    elsewhere = write(tmp_path / "elsewhere", "1.png", "deep/2.png")
    folder = write(tmp_path / "images", "cat/0.png", "dog/inside/0.png")
    (folder / "cat/more").symlink_to(elsewhere)
    (folder / "cat/again").symlink_to(elsewhere / "deep")
    (folder / "bird").symlink_to(elsewhere)
    for name, target in (("dog/self", folder / "dog"), ("dog/inside/up", folder), ("cat/over", elsewhere.parent)):
        (folder / name).symlink_to(target)
    (elsewhere / "deep/back").symlink_to(elsewhere)
    assert sorted(folders.find(folder).splits["train"].names) == [
        "bird/1.png", "bird/deep/2.png", "cat/0.png", "cat/again/2.png", "cat/again/back/1.png", "cat/more/1.png",
        "cat/more/deep/2.png", "dog/inside/0.png",
    ]  # fmt: skip


# --- What is streamed -------------------------------------------------------------------------------------------------

STREAMED = {"data.name": "folder", "data.streamed": True, "data.mean": (0.5,), "data.std": (0.25,)}


def test_a_folder_with_nothing_to_test_on_or_to_train_on(tmp_path):
    write(tmp_path, *images(("a",), 2), *images(("b",), 30))
    with pytest.raises(ValueError, match=r"has no image of config.data.classes=\('a',\) to test on: give more images"):
        own_data.open_set(str(tmp_path), classes=("a",))
    with pytest.raises(ValueError, match="has no image of config.data.classes=.* to test on"):
        open_dataset(smoke_config(**STREAMED, **{"data.files": str(tmp_path), "data.classes": (0,)}))
    assert len(own_data.open_set(str(tmp_path), classes=("b",)).test)
    with pytest.raises(ValueError, match=r"has no image of config.data.classes=\('a',\) to train on: give more images"):
        own_data.open_set(str(tmp_path), classes=("a",), test=0.9)


@pytest.mark.parametrize("none", [(None,), [None]])
def test_classes_that_are_none_may_come_from_the_command_line_or_from_a_run(tmp_path, none):
    write(tmp_path, *images(("a", "b"), 30))
    config = smoke_config(**STREAMED, **{"data.files": str(tmp_path)})
    with config.unlocked():
        config.data.classes = none
    assert open_dataset(config).num_classes == 2
    check_config(config, num_examples=1000)
    config.data.streamed = False
    check_config(config, num_examples=1000)
    config.data.classes = type(none)(["a"])
    with pytest.raises(ValueError, match="config.data.classes is for streamed images, config.data.streamed"):
        check_config(config, num_examples=1000)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.std": (0.0,)}, r"config.data.std is finite and above 0, got \(0.0,\)"),
        ({"data.std": (0.2, -0.2, 0.2)}, r"config.data.std is finite and above 0, got \(0.2, -0.2, 0.2\)"),
        ({"data.mean": (np.inf,)}, r"config.data.mean is finite, got \(inf,\)"),
    ],
)
def test_streamed_images_are_not_normalised_by_what_is_no_std(changes, message):
    with pytest.raises(ValueError, match=message):
        open_dataset(smoke_config(**STREAMED | changes))
