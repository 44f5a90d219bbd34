"""A small ImageNet of JPEG files of many sizes, prepared by TensorFlow Datasets' own builder, without TensorFlow."""

import contextlib
import io
import os
import tarfile
from types import SimpleNamespace
from unittest import mock

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core.download import extractor
from tensorflow_datasets.datasets.imagenet2012 import imagenet2012_dataset_builder, imagenet_common

CLASSES = ("n01440764", "n02099601", "n03394916", "n07753592")  # tench, golden retriever, French horn, banana
COLOURS = ((40, 90, 200), (200, 60, 40), (60, 190, 70), (220, 210, 60))
KINDS = ("rgb", "rgb", "gray", "rgb", "cmyk", "rgb", "progressive", "444", "rgb", "png")


def picture(rng, height, width, colour=(128, 128, 128), detail=4.0):
    """Pixels (height, width, 3), uint8: smooth shapes, with some texture, around a colour."""
    coarse = rng.standard_normal((2 + height // 16, 2 + width // 16, 3)).astype(np.float32)
    smooth = [Image.fromarray(channel).resize((width, height), Image.Resampling.BICUBIC) for channel in coarse.T]
    texture = detail * rng.standard_normal((height, width, 1))
    return (np.asarray(colour) + 30 * np.stack(smooth, -1) + texture).clip(0, 255).astype(np.uint8)


def encoded(pixels, kind="rgb", quality=92):
    """The file of a picture: "rgb" is a JPEG with 4:2:0, the others are what else there is in ImageNet."""
    image = Image.fromarray(pixels).convert({"gray": "L", "cmyk": "CMYK"}.get(kind, "RGB"))
    buffer = io.BytesIO()
    if kind == "png":
        image.save(buffer, "PNG")
    else:
        subsampling = {} if kind in ("gray", "cmyk") else {"subsampling": "4:4:4" if kind == "444" else "4:2:0"}
        restarts = {"restart_marker_rows": 1} if kind == "restarts" else {}
        image.save(buffer, "JPEG", quality=quality, progressive=kind == "progressive", **subsampling, **restarts)
    return buffer.getvalue()


def truncated(file):
    """The first half of it."""
    return file[: len(file) // 2]


def files(number, count, seed=0):
    """So many files of a class of CLASSES."""
    rng = np.random.default_rng((seed, number))
    sizes = rng.integers(40, 120, (count, 2))
    return [encoded(picture(rng, *sizes[i], COLOURS[number]), KINDS[i % len(KINDS)]) for i in range(count)]


def prepare_imagenet(data_dir, *, train=15, validation=5, corrupt=0):
    """Prepares ``imagenet2012`` with the images of four of its classes, as someone would who has the two archives.

    Args:
      data_dir: the folder, which is then what ``config.data_dir`` wants.
      train, validation: images of each class, at most 40 of validation.
      corrupt: of the train images of the first class so many have lost their second half.

    Returns:
      {"train": {file name: (file, class)}, "validation": {file name: (file, class)}}.
    """
    manual = os.path.join(data_dir, "downloads", "manual")
    os.makedirs(manual, exist_ok=True)
    contents = {"train": {}, "validation": {}}
    with tarfile.open(os.path.join(manual, "ILSVRC2012_img_train.tar"), "w") as archive:
        for number, name in enumerate(CLASSES):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as of_class:
                for i, file in enumerate(files(number, train)):
                    file = truncated(file) if number == 0 and i < corrupt else file
                    _add(of_class, f"{name}_{i + 1}.JPEG", file)
                    contents["train"][f"{name}_{i + 1}.JPEG"] = file, name
            _add(archive, f"{name}.tar", inner.getvalue())
    # What class an image of validation has the builder knows from its place in the order of all names: folders, of
    # which it makes no examples, take the places of images of other classes.
    with open(tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt")) as labels:
        labels = labels.read().split()
    remaining = {name: files(number, validation, seed=1) for number, name in enumerate(CLASSES)}
    with tarfile.open(os.path.join(manual, "ILSVRC2012_img_val.tar"), "w") as archive:
        for i, label in enumerate(labels, 1):
            if not any(remaining.values()):
                break
            name = f"ILSVRC2012_val_{i:08}.JPEG"
            if remaining.get(label):
                contents["validation"][name] = remaining[label].pop(0), label
                _add(archive, name, contents["validation"][name][0])
            else:
                folder = tarfile.TarInfo(name)
                folder.type = tarfile.DIRTYPE
                archive.addfile(folder)
    # Of TensorFlow the builder only uses two functions on files, which Python has too.
    gfile = SimpleNamespace(io=SimpleNamespace(gfile=SimpleNamespace(exists=os.path.exists, GFile=open)))
    with contextlib.ExitStack() as patches:
        for module in (extractor, imagenet2012_dataset_builder, imagenet_common):
            patches.enter_context(mock.patch.object(module, "tf", gfile))
        builder = tfds.builder("imagenet2012", data_dir=str(data_dir), file_format="array_record")
        builder.download_and_prepare()
    return contents


def _add(archive, name, file):
    info = tarfile.TarInfo(name)
    info.size = len(file)
    archive.addfile(info, io.BytesIO(file))
