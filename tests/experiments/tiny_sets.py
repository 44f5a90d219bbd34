"""Small image sets, prepared by TensorFlow Datasets itself from scikit-learn's digits, without TensorFlow."""

import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from sklearn import datasets


def png(pixels):
    """The file of an image of shape (height, width, 1) or (height, width, 3)."""
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(buffer, "PNG")
    return buffer.getvalue()


def digits(channels=1, count=600):
    """Images (count, 16, 16, channels), uint8, and labels."""
    pixels, labels = datasets.load_digits(return_X_y=True)
    images = np.kron(pixels.reshape(-1, 8, 8)[:count] * 15, np.ones((2, 2))).astype(np.uint8)
    return np.repeat(images[..., None], channels, axis=-1), labels[:count]


class _Builder(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    SHAPE = (16, 16, 1)

    def _info(self):
        features = {"image": tfds.features.Image(shape=self.SHAPE), "label": tfds.features.ClassLabel(num_classes=10)}
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(features), supervised_keys=("image", "label")
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(0, 500), "test": self._generate_examples(500, 600)}

    def _generate_examples(self, start, stop):
        images, labels = digits(self.SHAPE[-1])
        for i in range(start, stop):
            yield i, {"image": png(images[i]), "label": int(labels[i])}


class TinyDigits(_Builder):
    """Grey images of one size."""


class TinyColours(_Builder):
    """Images with three channels."""

    SHAPE = (16, 16, 3)


class TinySizes(_Builder):
    """Images that may have any size."""

    SHAPE = (None, None, 3)


class TinyUnlabelled(_Builder):
    """Images without labels."""

    def _info(self):
        features = tfds.features.FeaturesDict({"image": tfds.features.Image(shape=self.SHAPE)})
        return self.dataset_info_from_configs(features=features)

    def _generate_examples(self, start, stop):
        for i, example in super()._generate_examples(start, stop):
            yield i, {"image": example["image"]}


def prepare(data_dir):
    """Prepares all of them in a folder, which is then what ``config.data_dir`` wants."""
    for builder in (TinyDigits, TinyColours, TinySizes, TinyUnlabelled):
        builder(data_dir=str(data_dir), file_format="array_record").download_and_prepare()
