"""The data sets, as arrays that fit in the device's memory."""

from typing import NamedTuple

import numpy as np
from sklearn import datasets


class Dataset(NamedTuple):
    """Images and labels, split into train and test.

    Attributes:
      train_images: (n, height, width, channels), float32; mean 0 and standard deviation 1 over all of them.
      train_labels: (n,), int32, from 0 to num_classes - 1.
      test_images: (m, height, width, channels), float32, shifted and scaled as the train images were.
      test_labels: (m,), int32.
      num_classes: int.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    num_classes: int


def load(name: str) -> Dataset:
    """The data set of that name.

    Args:
      name: "digits", the 1797 handwritten digits of 8 x 8 pixels that come with scikit-learn: nothing is downloaded.

    Returns:
      The same :class:`Dataset` on every call and machine.

    Raises:
      ValueError: if there is no such data set.

    Examples:
      >>> from experiments import data
      >>> digits = data.load("digits")
      >>> digits.train_images.shape, digits.test_images.shape, digits.num_classes
      ((1438, 8, 8, 1), (359, 8, 8, 1), 10)

    References:
      Alpaydin and Kaynak, *Optical Recognition of Handwritten Digits*, UCI Machine Learning Repository, 1998.
    """
    if name not in LOADERS:
        raise ValueError(f"unknown data set {name!r}; known are {', '.join(map(repr, LOADERS))}")
    return LOADERS[name]()


def _digits() -> Dataset:
    pixels, labels = datasets.load_digits(return_X_y=True)
    images = pixels.reshape(-1, 8, 8, 1).astype(np.float32)
    labels = labels.astype(np.int32)
    test = _stratified(labels, fraction=0.2)
    mean, std = images[~test].mean(), images[~test].std()
    images = (images - mean) / std
    return Dataset(images[~test], labels[~test], images[test], labels[test], num_classes=10)


def _stratified(labels: np.ndarray, fraction: float) -> np.ndarray:
    """A fixed random choice of that fraction of each class, as a bool array."""
    # RandomState, unlike default_rng, promises the same numbers from every version of NumPy.
    order = np.random.RandomState(0).permutation(len(labels))
    chosen = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = order[labels[order] == label]
        chosen[members[: round(fraction * len(members))]] = True
    return chosen


LOADERS = {"digits": _digits}
