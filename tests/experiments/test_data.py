import sys
import zlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import datasets

from configs import common
from experiments import data, own_data
from experiments.inputs import open_dataset
from tests.experiments import tiny_sets


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def test_digits_shapes_and_dtypes(digits):
    chex.assert_shape((digits.train.images, digits.test.images), [(1438, 8, 8, 1), (359, 8, 8, 1)])
    chex.assert_shape((digits.train.labels, digits.test.labels), [(1438,), (359,)])
    chex.assert_type((digits.train.images, digits.test.images), np.uint8)
    chex.assert_type((digits.train.labels, digits.test.labels), np.int32)
    assert digits.num_classes == 10
    assert len(digits.validation.labels) == 0


def test_digits_is_the_same_every_time(digits):
    # The split itself is pinned: results on another one would not compare.
    np.testing.assert_array_equal(digits.test.labels[:12], [4, 5, 6, 9, 4, 7, 8, 9, 9, 6, 9, 9])
    assert [zlib.crc32(split.images.tobytes()) for split in (digits.train, digits.test)] == [1198204864, 1454421997]


def test_digits_is_stratified(digits):
    train, test = np.bincount(digits.train.labels), np.bincount(digits.test.labels)
    np.testing.assert_allclose(test / (train + test), 0.2, atol=0.003)


def test_normalised_by_the_train_images(digits):
    images = data.normalise(digits.train.images, digits)
    chex.assert_type(images, np.float32)
    np.testing.assert_allclose([images.mean(), images.std()], [0, 1], atol=1e-5)


def test_none_on_the_command_line_takes_the_mean_of_the_train_images(digits):
    config = common.training()
    config.data.name = "digits"
    config.data.mean, config.data.std = (None,), (None,)  # as ``--config.data.mean=None`` is read
    np.testing.assert_array_equal(open_dataset(config).mean, digits.mean)


def test_digits_train_and_test_make_up_the_whole(digits):
    pixels, labels = datasets.load_digits(return_X_y=True)
    ours = [np.column_stack([split.images.reshape(-1, 64), split.labels]) for split in (digits.train, digits.test)]
    ours, theirs = np.concatenate(ours), np.column_stack([pixels, labels])
    np.testing.assert_array_equal(ours[np.lexsort(ours.T)], theirs[np.lexsort(theirs.T)])


def test_unknown_data_set_names_a_near_one():
    with pytest.raises(ValueError, match="unknown data set 'fashion_mnst'; did you mean 'fashion_mnist'?"):
        data.load("fashion_mnst")
    with pytest.raises(ValueError, match="Known are 'digits' and those of TensorFlow Datasets"):
        data.load("xyzzy")


def test_validation_takes_the_last_of_the_train_examples(digits):
    split = data.load("digits", validation=0.1)
    assert len(split.validation.labels) == 144
    joined = [np.concatenate(parts) for parts in zip(split.train, split.validation, strict=True)]
    chex.assert_trees_all_equal(data.Split(*joined), digits.train)
    chex.assert_trees_all_equal(split.test, digits.test)


def test_mean_and_std_may_be_given():
    split = data.load("digits", mean=(0.5,), std=0.25)
    np.testing.assert_allclose((split.mean, split.std), [[127.5], [63.75]])
    image = data.normalise(np.full((1, 2, 2, 1), 255, np.uint8), split)
    chex.assert_trees_all_close(image, np.full((1, 2, 2, 1), 2, np.float32))
    with pytest.raises(ValueError, match="config.data.mean has one number or one for each of 1 channels, got 3"):
        data.load("digits", mean=(0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"std": (0.0,)}, r"config.data.std is finite and above 0, got \(0.0,\)"),
        ({"std": -0.25}, "config.data.std is finite and above 0, got -0.25"),
        ({"std": (np.nan,)}, r"config.data.std is finite and above 0, got \(nan,\)"),
        ({"std": (None, 0.25)}, r"config.data.std is finite and above 0, got \(None, 0.25\)"),
        ({"mean": np.inf, "std": 0.25}, "config.data.mean is finite, got inf"),
    ],
)
def test_images_are_not_normalised_by_what_is_no_std(given, message):
    with pytest.raises(ValueError, match=message):
        data.load("digits", **given)
    with pytest.raises(ValueError, match=message):
        own_data.load("npz", "none.npz", **given)


@pytest.mark.parametrize("validation", [-0.1, 1.0, 0.9999])
def test_validation_out_of_range(validation):
    with pytest.raises(ValueError, match="config.data.validation"):
        data.load("digits", validation=validation)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    tiny_sets.prepare(folder)
    return str(folder)


@pytest.mark.parametrize(("name", "channels"), [("tiny_digits", 1), ("tiny_colours", 3)])
def test_image_set_of_tfds(data_dir, name, channels):
    loaded = data.load(name, data_dir)
    images, labels = tiny_sets.digits(channels)
    chex.assert_shape((loaded.train.images, loaded.test.images), [(500, 16, 16, channels), (100, 16, 16, channels)])
    # TFDS stores examples in an order of its own.
    for split, chosen in ((loaded.train, slice(500)), (loaded.test, slice(500, 600))):
        ours = np.column_stack([split.images.reshape(len(split.labels), -1), split.labels])
        theirs = np.column_stack([images[chosen].reshape(len(split.labels), -1), labels[chosen]])
        np.testing.assert_array_equal(ours[np.lexsort(ours.T)], theirs[np.lexsort(theirs.T)])
    np.testing.assert_allclose(loaded.mean, loaded.train.images.mean((0, 1, 2)), rtol=1e-6)
    assert loaded.num_classes == 10
    assert "tensorflow" not in sys.modules


def test_set_that_was_not_prepared_says_how_to(data_dir):
    with pytest.raises(FileNotFoundError, match="data set 'mnist' is not in .* as array_record. Say where") as error:
        data.load("mnist", data_dir)
    command = str(error.value).splitlines()[-1].strip()
    assert command.startswith('python -c "import tensorflow_datasets as tfds; tfds.builder(')
    compile(command.removeprefix('python -c "').removesuffix('"'), "command", "exec")
    assert f"data_dir='{data_dir}'" in command


@pytest.mark.parametrize(
    ("name", "message"),
    [("tiny_sizes", "needs images of one size with 8 bits a channel"), ("tiny_unlabelled", "with one label each")],
)
def test_set_of_another_kind(data_dir, name, message):
    with pytest.raises(ValueError, match=message):
        data.load(name, data_dir)


def test_set_that_is_larger_than_the_memory(data_dir, monkeypatch):
    monkeypatch.setattr(data, "physical_memory", lambda: 100_000)
    with pytest.raises(ValueError, match="'tiny_digits' takes .* GiB, more than half of this machine's memory"):
        data.load("tiny_digits", f"{data_dir}/.")  # not yet loaded from there


# --- Augmentation -----------------------------------------------------------------------------------------------------


def numbered_images(count=64):
    """Images whose pixels are all different, and none 0."""
    return 1 + jnp.arange(count * 6 * 5 * 3).reshape(count, 6, 5, 3)


@pytest.mark.parametrize("pad_mode", ["constant", "reflect"])
@pytest.mark.parametrize("flip", [False, True])
def test_every_augmented_image_is_a_crop_of_the_padded_one(pad_mode, flip):
    images, keys = numbered_images(), jax.random.split(jax.random.key(0), 64)
    augmented = np.asarray(data.augment(images, keys, pad=2, pad_mode=pad_mode, flip=flip))
    padded = np.pad(np.asarray(images), ((0, 0), (2, 2), (2, 2), (0, 0)), mode=pad_mode)
    found = set()
    for i, image in enumerate(augmented):
        crops = {
            (row, column, mirrored): padded[i, row : row + 6, column : column + 5][:, :: -1 if mirrored else 1]
            for row in range(5)
            for column in range(5)
            for mirrored in (False, True)
        }
        matches = [place for place, crop in crops.items() if np.array_equal(crop, image)]
        assert matches
        found.add(matches[0])
    assert len({place[:2] for place in found}) > 15  # of 25
    assert {mirrored for *_, mirrored in found} == ({False, True} if flip else {False})


def test_an_image_is_augmented_by_its_key_alone():
    images, keys = numbered_images(8), jax.random.split(jax.random.key(1), 8)
    options = {"pad": 2, "pad_mode": "constant", "flip": True}
    whole = data.augment(images, keys, **options)
    np.testing.assert_array_equal(data.augment(images[::-1], keys[::-1], **options), whole[::-1])
    np.testing.assert_array_equal(jax.jit(lambda *a: data.augment(*a, **options))(images, keys), whole)


def test_so_many_examples():
    dataset = data.load("digits", examples=100, validation=0.1)
    assert [len(split.labels) for split in (dataset.train, dataset.validation, dataset.test)] == [90, 10, 100]
