import chex
import numpy as np
import pytest
from sklearn import datasets

from experiments import data


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def test_digits_shapes_and_dtypes(digits):
    chex.assert_shape((digits.train_images, digits.test_images), [(1438, 8, 8, 1), (359, 8, 8, 1)])
    chex.assert_shape((digits.train_labels, digits.test_labels), [(1438,), (359,)])
    chex.assert_type((digits.train_images, digits.test_images), np.float32)
    chex.assert_type((digits.train_labels, digits.test_labels), np.int32)
    assert digits.num_classes == 10


def test_digits_is_the_same_every_time(digits):
    chex.assert_trees_all_equal(digits, data.load("digits"))
    # The split itself is pinned: results on another one would not compare.
    np.testing.assert_array_equal(digits.test_labels[:12], [4, 5, 6, 9, 4, 7, 8, 9, 9, 6, 9, 9])


def test_digits_is_stratified(digits):
    train, test = np.bincount(digits.train_labels), np.bincount(digits.test_labels)
    np.testing.assert_allclose(test / (train + test), 0.2, atol=0.003)


def test_digits_is_normalised_by_the_train_images(digits):
    np.testing.assert_allclose([digits.train_images.mean(), digits.train_images.std()], [0, 1], atol=1e-5)
    scale = np.unique(digits.train_images)
    assert len(scale) == 17  # pixel values 0 to 16
    np.testing.assert_array_equal(np.unique(digits.test_images), scale)


def test_digits_train_and_test_make_up_the_whole(digits):
    pixels, labels = datasets.load_digits(return_X_y=True)
    images = np.concatenate([digits.train_images, digits.test_images]).reshape(-1, 64)
    images = np.rint((images - images.min()) / (images.max() - images.min()) * 16)
    ours = np.column_stack([images, np.concatenate([digits.train_labels, digits.test_labels])])
    theirs = np.column_stack([pixels, labels])
    np.testing.assert_array_equal(ours[np.lexsort(ours.T)], theirs[np.lexsort(theirs.T)])


def test_unknown_data_set_names_the_known():
    with pytest.raises(ValueError, match="unknown data set 'cifar1'; known are 'digits'"):
        data.load("cifar1")
