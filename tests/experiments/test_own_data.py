import dataclasses
import os
import sys
from pathlib import Path

import grain
import numpy as np
import pytest
from PIL import Image

from experiments import data, folders, own_data, pictures
from experiments.inputs import open_dataset
from experiments.options import refuse_idle
from experiments.results.collect import tested_on as data_of
from experiments.workdir import compared
from tests.experiments import tiny_sets
from tests.experiments.test_train import smoke_config


def arrays(count=200, test=50):
    """The arrays of an .npz: digits of 16 x 16 pixels."""
    images, labels = tiny_sets.digits(count=count + test)
    parts = {"train": slice(count), "test": slice(count, None)} if test else {"train": slice(None)}
    return {f"{name}_{what}": values[part] for name, part in parts.items()
            for what, values in (("images", images[..., 0]), ("labels", labels))}  # fmt: skip


def saved(path, **changes):
    np.savez(path, **arrays() | changes)
    return str(path)


def pairs(*splits):
    """The examples of splits, in an order of their own."""
    return sorted((image.tobytes(), int(label)) for split in splits for image, label in zip(*split, strict=True))


# --- Arrays -----------------------------------------------------------------------------------------------------------


def test_an_npz_with_both_splits(tmp_path):
    given = arrays()
    loaded = own_data.load("npz", "my.npz", str(saved(tmp_path / "my.npz") and tmp_path))
    assert loaded.train.images.shape == (200, 16, 16, 1)
    assert (loaded.train.images.dtype, loaded.train.labels.dtype) == (np.uint8, np.int32)
    for name in ("train", "test"):
        assert pairs(getattr(loaded, name)) == pairs((given[f"{name}_images"], given[f"{name}_labels"]))
    assert (loaded.num_classes, len(loaded.validation.labels)) == (10, 0)
    np.testing.assert_allclose(loaded.mean, given["train_images"].mean(), rtol=1e-6)
    np.testing.assert_allclose(loaded.std, given["train_images"].std(), rtol=1e-6)
    counts = {"train_images": 200, "validation_images": 0, "test_images": 50}
    assert loaded.about == {
        "source": str(tmp_path / "my.npz"),
        "classes": 10,
        **counts,
        "sha256": loaded.about["sha256"],
    }


def test_the_order_in_which_images_come_makes_no_difference(tmp_path):
    given, order = arrays(test=0), np.argsort(arrays(test=0)["train_labels"], kind="stable")
    np.savez(tmp_path / "one.npz", **given)
    np.savez_compressed(tmp_path / "other.npz", **{key: values[order] for key, values in given.items()})
    one, other = (
        own_data.load("npz", str(tmp_path / f"{name}.npz"), test=0.2, validation=0.2) for name in ("one", "other")
    )
    for name in ("train", "validation", "test"):
        for ours, theirs in zip(getattr(one, name), getattr(other, name), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert one.about["sha256"] == other.about["sha256"]
    # All that was given is there once, and what was sorted by class is not any more.
    assert pairs(one.train, one.validation, one.test) == pairs((given["train_images"], given["train_labels"]))
    assert len(one.validation.labels) == round(0.2 * (200 - len(one.test.labels)))
    assert 20 < len(one.test.labels) < 60
    assert len(set(own_data.load("npz", str(tmp_path / "other.npz"), examples=20).train.labels.tolist())) > 4


@pytest.mark.slow
def test_what_is_held_out_stays_held_out_when_images_are_added(tmp_path):
    held_out = []
    for count in (150, 200):
        np.savez(tmp_path / f"{count}.npz", **arrays(count, test=0))
        held_out.append(pairs(own_data.load("npz", str(tmp_path / f"{count}.npz"), test=0.2).test))
    assert set(held_out[0]) < set(held_out[1])


@pytest.mark.slow
def test_equal_images_are_held_out_together(tmp_path):
    given = {key: np.repeat(values, 3, axis=0) for key, values in arrays(100, test=0).items()}
    np.savez(tmp_path / "my.npz", **given)
    loaded = own_data.load("npz", str(tmp_path / "my.npz"), test=0.2)
    assert not {image for image, _ in pairs(loaded.train)} & {image for image, _ in pairs(loaded.test)}


@pytest.mark.slow
def test_test_images_that_are_train_images_are_told_of(tmp_path, caplog):
    given = arrays()
    given["test_images"] = np.concatenate([given["test_images"], given["train_images"][:7]])
    given["test_labels"] = np.concatenate([given["test_labels"], given["train_labels"][:7]])
    own_data.load("npz", saved(tmp_path / "my.npz", **given))
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [
        "7 of the test images are among the train images"
    ]


@pytest.mark.slow
def test_a_split_for_validation(tmp_path):
    given = arrays()
    given |= {f"validation_{what}": given[f"train_{what}"][100:] for what in ("images", "labels")}
    given |= {f"train_{what}": given[f"train_{what}"][:100] for what in ("images", "labels")}
    file = saved(tmp_path / "my.npz", **given)
    loaded = own_data.load("npz", file)
    assert [len(split.labels) for split in (loaded.train, loaded.validation, loaded.test)] == [100, 100, 50]
    with pytest.raises(ValueError, match="config.data.validation=0.1, but .*my.npz has a split for validation of its"):
        own_data.load("npz", file, validation=0.1)
    with pytest.raises(ValueError, match="config.data.test=0.1 has no effect: .*my.npz has a split 'test' to test on"):
        own_data.load("npz", file, test=0.1)
    del given["test_images"], given["test_labels"]
    np.savez(file, **given)
    loaded = own_data.load("npz", file)
    assert [len(split.labels) for split in (loaded.train, loaded.validation, loaded.test)] == [100, 0, 100]


IMAGES, LABELS = arrays()["train_images"], arrays()["train_labels"]


@pytest.mark.slow
def test_arrays_that_are_none(tmp_path):
    three = np.where(LABELS == 3, 4, LABELS)
    np.savez(
        tmp_path / "black.npz", train_images=0 * IMAGES, train_labels=LABELS, test_images=IMAGES, test_labels=LABELS
    )
    with pytest.raises(
        ValueError, match="channel 0 is the same in every pixel of .*black.npz's train images: config.data.std"
    ):
        own_data.load("npz", str(tmp_path / "black.npz"))
    for key, value, message in (
        ("train_images", IMAGES / np.float32(255), "train_images are uint8, pixels from 0 to 255, got float32: floats"),
        ("train_images", IMAGES.reshape(200, -1), r"are \(n, height, width, channels\) or .*, got \(200, 256\)"),
        ("train_labels", LABELS[1:], r"are 200 integers, one for each image, got int64 of shape \(199,\)"),
        ("train_labels", LABELS.astype(float), r"are 200 integers, .* got float64 of shape \(200,\)"),
        ("train_labels", LABELS - 1, "train_labels are from 0 to the number of classes - 1, got -1 to 8"),
        (
            "train_labels",
            LABELS + 9**9,
            "from 0 to 387420498, but 387420489 of these classes, the first of them 0, have",
        ),
        ("train_labels", three, "from 0 to 9, but 1 of these classes, the first of them 3, have no image"),
        ("test_labels", np.arange(50) % 11, "train_labels and test_labels differ: train lacks class 10"),
        ("test_labels", np.arange(50) % 3, "test_labels differ: test lacks classes 3, 4, 5, 6, 7 and 2 others"),
        ("test_images", IMAGES[:50, :8], r"test_images have shape \(8, 16, 1\), train_images \(16, 16, 1\)"),
        ("train_image", IMAGES, "has 'train_image'; did you mean 'train_images'. It may have train_images, "),
        ("train_labels", np.array([None] * 200), "cannot be read as an .npz of arrays: Object arrays"),
    ):
        with pytest.raises(ValueError, match=message):
            own_data.load("npz", saved(tmp_path / "my.npz", **{key: value}))


@pytest.mark.slow
def test_files_that_are_no_npz(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.data.files: there is no file '.*none.npz'"):
        own_data.load("npz", "none.npz", str(tmp_path))
    with pytest.raises(ValueError, match="config.data.name='npz' needs config.data.files, the path of an .npz"):
        own_data.load("npz", None)
    np.save(tmp_path / "my.npy", IMAGES)
    with pytest.raises(ValueError, match=r"my.npy is no .npz: File is not a zip file"):
        own_data.load("npz", str(tmp_path / "my.npy"))
    np.savez(tmp_path / "half.npz", train_images=IMAGES)
    with pytest.raises(ValueError, match="half.npz has only one of train_images and train_labels"):
        own_data.load("npz", str(tmp_path / "half.npz"))
    np.savez(tmp_path / "half.npz", test_images=IMAGES, test_labels=LABELS)
    with pytest.raises(ValueError, match="has no train_images and train_labels, but 'test_images', 'test_labels'"):
        own_data.load("npz", str(tmp_path / "half.npz"))


@pytest.mark.slow
def test_shares_that_leave_nothing(tmp_path, caplog):
    np.savez(tmp_path / "my.npz", train_images=IMAGES[:30], train_labels=np.arange(30) % 10)
    with pytest.raises(
        ValueError, match="has 30 images, of which 0 are held out to test on: give more images, another"
    ):
        own_data.load("npz", str(tmp_path / "my.npz"), test=1e-4)
    with pytest.raises(ValueError, match="config.data.test is between 0 and 1, got 1.5"):
        own_data.load("npz", str(tmp_path / "my.npz"), test=1.5)
    with pytest.raises(ValueError, match="of class.* no image is left to train on, all are held out: give more images"):
        own_data.load("npz", str(tmp_path / "my.npz"), test=0.1, validation=0.8)
    own_data.load("npz", str(tmp_path / "my.npz"))
    assert [message for message in caplog.messages if "no image is held out to test on" in message]


@pytest.mark.slow
def test_arrays_that_are_larger_than_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "physical_memory", lambda: 100_000)
    with pytest.raises(ValueError, match="my.npz takes .* GiB, more than half of this machine's memory"):
        own_data.load("npz", saved(tmp_path / "my.npz"))


# --- Functions --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Records:
    """A source by number, of dicts."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return {"image": self.images[i], "label": self.labels[i]}


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of the user's, whose functions may be set."""
    (tmp_path / "users_data.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "users_data", raising=False)
    own_data._from_function.cache_clear()
    import users_data

    yield users_data
    own_data._from_function.cache_clear()


@pytest.mark.slow
def test_what_a_function_gives(module, tmp_path):
    given = arrays()
    module.load = lambda: given
    module.records = lambda: {
        "train": grain.MapDataset.source(list(zip(given["train_images"], given["train_labels"], strict=True))),
        "test": Records(given["test_images"], given["test_labels"]),
    }
    from_file = own_data.load("npz", saved(tmp_path / "my.npz"))
    for name in ("load", "records"):
        found = own_data.load("function", f"users_data:{name}")
        assert found.about == from_file.about | {"source": f"users_data:{name}"}
        for ours, theirs in zip(found.train, from_file.train, strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
def test_functions_that_give_nothing_of_use(module):
    ragged = [IMAGES[0], IMAGES[1][:8]]
    module.number = 3
    module.nothing = lambda: None
    module.ragged = lambda: {"train_images": ragged, "train_labels": [0, 1]}
    module.unlike = lambda: {"train": list(zip(ragged, [0, 1], strict=True))}
    module.unlabelled = lambda: {"train": [{"image": IMAGES[0]}]}
    module.endless = lambda: {"train": iter(IMAGES)}
    module.misspelt = lambda: {"train": [], "tset": []}
    for name, message in {
        "users_data": "is not MODULE:FUNCTION, such as 'my_data:load'",
        "no_module_at_all:load": "there is no module 'no_module_at_all' in this folder or on PYTHONPATH",
        "users_data:none": "the module has no such function",
        "users_data:number": "the module has no such function",
        "users_data:nothing": "gives a mapping with train_images, train_labels, .*, got NoneType",
        "users_data:ragged": "train_images or users_data:ragged: train_labels is no array; do shapes differ?",
        "users_data:unlike": r"train: image 1 is uint8 of shape \(8, 16\), the first uint8 of shape \(16, 16\)",
        "users_data:unlabelled": r"train: record 0 is not \(image, label\) or {'image', 'label'}",
        "users_data:endless": "train is a source of records by number that is not empty, got ",
        "users_data:misspelt": "has 'tset'; did you mean 'test'. It may have train, validation, test",
    }.items():
        with pytest.raises(ValueError, match=message):
            own_data.load("function", name)


# --- Folders ----------------------------------------------------------------------------------------------------------


def write_folder(folder, channels=1, count=120, test=40, names=("train", "test")):
    """Digits as files, of 18 x 16 pixels, in folders by class; without a test split if ``names`` has one name only."""
    images, labels = tiny_sets.digits(channels, count + test)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        split = names[0] if i < count else names[-1]
        path = folder / split / f"digit_{label}" / f"{i}.{('png', 'jpg', 'JPEG')[i % 3]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.squeeze()).resize((18, 16)).save(path)
    return folder


@pytest.mark.slow
def test_a_folder_of_images_by_class(tmp_path):
    folder = write_folder(tmp_path / "images")
    (folder / "train/digit_3/.hidden").touch()
    (folder / "train/digit_3/Thumbs.db").touch()
    loaded = own_data.load("folder", str(folder), image_size=12)
    assert (loaded.train.images.shape, loaded.test.images.shape) == ((120, 12, 12, 1), (40, 12, 12, 1))
    assert loaded.num_classes == 10
    found = folders.find(folder).splits["train"]
    for number in (0, 1, 50):
        name = found.names[number]
        assert loaded.train.labels[number] == int(name[len("digit_")])
        image = Image.open(folder / "train" / name).crop((1, 0, 17, 16)).resize((12, 12), Image.Resampling.BILINEAR)
        assert np.abs(np.asarray(image).astype(int) - loaded.train.images[number, ..., 0]).max() <= 1
    # One colour among them, and all have three channels.
    Image.new("RGB", (20, 30), (200, 0, 0)).save(folder / "train/digit_0/red.png")
    red = own_data.load("folder", str(folder), image_size=12).train.images
    assert red.shape == (121, 12, 12, 3)
    assert np.all(red == (200, 0, 0), axis=-1).sum() == 144


@pytest.mark.slow
def test_a_share_of_a_folder_is_held_out_by_the_files_paths(tmp_path):
    folder = write_folder(tmp_path / "images", names=("",))
    whole = own_data.load("folder", str(folder), image_size=8, test=0.25, validation=0.1)
    held_out = {image for image, _ in pairs(whole.test)}
    assert len(whole.train.labels) + len(whole.validation.labels) + len(whole.test.labels) == 160
    assert 25 < len(whole.test.labels) < 55
    for path in sorted(folder.glob("*/*.png"))[::2]:  # with fewer files the others are held out as before
        path.unlink()
    fewer = own_data.load("folder", str(folder), image_size=8, test=0.25)
    assert {image for image, _ in pairs(fewer.test)} < held_out
    assert fewer.about["sha256"] != whole.about["sha256"]
    os.rename(folder, tmp_path / "moved")
    assert own_data.load("folder", "moved", str(tmp_path), image_size=8).about["sha256"] == fewer.about["sha256"]


@pytest.mark.slow
def test_folders_with_something_wrong(tmp_path):
    folder = write_folder(tmp_path / "images", count=60, test=30)
    (folder / "train/digit_0/notes.txt").touch()
    with pytest.raises(ValueError, match="notes.txt is among the images, whose names end in .bmp, .jpeg, .jpg, .png"):
        folders.find(folder)
    (folder / "train/digit_0/notes.txt").unlink()
    (folder / "test/digit_new").mkdir()
    with pytest.raises(ValueError, match=r"the classes of test and train differ: .*train has no 'digit_new' \(1 diff"):
        folders.find(folder)
    (folder / "train/digit_new").mkdir()
    with pytest.raises(ValueError, match="the class 'digit_new' is empty: .*digit_new has no images"):
        folders.find(folder)
    for split in ("train", "test"):
        (folder / split / "digit_new").rmdir()
    Image.new("L", (8, 8)).save(folder / "train/loose.jpg")
    with pytest.raises(ValueError, match="train/loose.jpg is an image outside of the classes' folders"):
        folders.find(folder)
    (folder / "train/loose.jpg").unlink()
    (folder / "other").mkdir()
    with pytest.raises(ValueError, match="has the splits test, train, but 'other' is none of"):
        folders.find(folder)
    (folder / "other").rename(folder / "val")
    with pytest.raises(ValueError, match="val has no folder, and it takes one with images for each class"):
        folders.find(folder)
    (folder / "val").rmdir()
    (folder / "train").rename(folder / "validation")
    with pytest.raises(ValueError, match="has no split 'train', but 'test', 'validation'"):
        own_data.load("folder", str(folder))
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        own_data.load("folder", str(folder / "none"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"no image", "bad.png cannot be read as an image: cannot identify"),
        (b"", "bad.png cannot be read as an image: "),
        (
            np.zeros((4, 4), np.uint16),
            "bad.png cannot be read as an image: it has more than 8 bits a channel, mode I;16",
        ),
    ],
)
def test_a_file_that_is_no_image_is_named(tmp_path, contents, message):
    folder = write_folder(tmp_path / "images", count=60, test=30)
    bad = folder / "train/digit_1/bad.png"
    if isinstance(contents, bytes):
        bad.write_bytes(contents)
    else:
        Image.fromarray(contents).save(bad)
    with pytest.raises(ValueError, match=message):
        own_data.load("folder", str(folder), image_size=8)


@pytest.mark.slow
def test_a_folder_that_is_larger_than_the_memory(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "images", count=60, test=30)
    monkeypatch.setattr(data, "physical_memory", lambda: 100_000)
    with pytest.raises(
        ValueError, match=r"90 images of 224 x 224 pixels takes .* GiB.*; give a smaller config.data.im"
    ):
        own_data.load("folder", str(folder))


def test_a_square_box_is_in_the_centre():
    assert pictures.square_box(10, 17) == (3, 0, 13, 10)
    assert pictures.square_box(17, 10) == (0, 3, 10, 13)


@pytest.mark.slow
def test_a_folder_as_it_is_streamed(tmp_path):
    folder = write_folder(tmp_path / "images", channels=3, names=("train", "val"))
    found = own_data.open_set(str(folder), validation=0.25)
    assert [len(split) for split in found[:3]] == [90, 30, 40]
    file, label = found.train[5]
    path = found.train.name_of(5)
    assert (file, f"digit_{label}") == (Path(path).read_bytes(), path.split("/")[-2])
    classes = own_data.open_set(str(folder), classes=("digit_7", 2), examples=12)
    assert classes.num_classes == 2
    assert len(classes.train) == 12
    names = {classes.train.name_of(i).split("/")[-2] for i in range(12) if classes.train.labels[i] == 0}
    assert names == {"digit_7"}
    with pytest.raises(ValueError, match="has no class 'digit_77'; did you mean 'digit_7'"):
        own_data.open_set(str(folder), classes=("digit_77",))


# --- Configurations ---------------------------------------------------------------------------------------------------


def test_keys_that_do_not_go_together():
    of_npz = {"data.name": "npz", "data.files": "my.npz"}
    with pytest.raises(
        ValueError, match="config.data.files has no effect for 'digits'; it is for text and npz, folder"
    ):
        open_dataset(smoke_config(**{"data.files": "my.npz"}))
    with pytest.raises(
        ValueError, match="config.data.streamed is for a folder and sets of TensorFlow Datasets, not for"
    ):
        open_dataset(smoke_config(**of_npz, **{"data.streamed": True}))
    with pytest.raises(ValueError, match="config.data.test has no effect without a text or images of one's own"):
        refuse_idle(smoke_config(), ["data.test"])
    with pytest.raises(
        ValueError, match="config.data.image_size has no effect without config.data.streamed, or images"
    ):
        refuse_idle(smoke_config(**of_npz), ["data.image_size"])
    with pytest.raises(ValueError, match="config.data.test_files has no effect without a text"):
        refuse_idle(smoke_config(**of_npz), ["data.test_files"])
    refuse_idle(smoke_config(**of_npz | {"data.name": "folder"}), ["data.files", "data.test", "data.image_size"])
    with pytest.raises(ValueError, match="config.data.name is one of 'npz', 'folder', 'function', got 'files'"):
        own_data.load("files", "my.npz")


def test_runs_from_before_these_keys_are_the_same_runs():
    of_digits = {"data": {"name": "digits", "files": None, "test": None}}
    assert compared(of_digits) == {"data.name": "digits"}
    assert "data.files" in compared({"data": {"name": "text", "files": None}})  # as it always had
    assert data_of({"data.name": "npz", "data.files": "my.npz", "data.test": 0.2}) == "npz, files my.npz, test 0.2"


def test_mean_and_std_that_are_none_may_come_from_the_command_line_or_from_a_run(tmp_path):
    np.savez(tmp_path / "my.npz", **arrays())
    config = smoke_config(**{"data.name": "npz", "data.files": str(tmp_path / "my.npz")})
    expected = open_dataset(config).mean
    for none in ((None,), [None]):
        with config.unlocked():
            config.data.mean = config.data.std = none
        np.testing.assert_array_equal(open_dataset(config).mean, expected)
