"""Images of one's own: arrays in an .npz file, folders of images by class, or what a function gives."""

import difflib
import functools
import hashlib
import io
import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from absl import logging
from PIL import Image

from experiments import data, folders, pictures
from experiments.command_line import imported, progress_bar
from experiments.data import Split
from experiments.options import OWN, choose

if TYPE_CHECKING:
    from experiments import streams

SPLITS = ("train", "validation", "test")
KEYS = tuple(f"{split}_{what}" for split in SPLITS for what in ("images", "labels"))
_GREY = ("1", "L", "LA")  # modes of Pillow


class _Images(NamedTuple):
    """Images as they are given, in an order of hashes.

    Attributes:
      splits: by name, "train" and maybe "test" and "validation".
      digests: of the train examples, by which they are in order.
      classes: their names.
      sha256: of all images with their labels, or of the files with their paths.
    """

    splits: dict[str, Split]
    digests: list[bytes]
    classes: Sequence[str]
    sha256: str


def load(
    kind: str,
    files: str | None,
    data_dir: str | None = None,
    *,
    image_size: int = 224,
    test: float | None = None,
    validation: float = 0.0,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    examples: int | None = None,
) -> data.Dataset:
    """Images of one's own as arrays.

    Examples are in an order of hashes, of the image or of a file's path in its split, so that the first ones are of all
    classes, and so are the last, which are those held out for validation. The order in which the images of an .npz or a
    function come makes no difference. Whether one of them is held out to test on follows from it alone, so that other
    images change nothing and equal ones are held out together. Those for validation are a share of the rest by number:
    other images may change which they are, and of equal ones some may be trained on.

    Args:
      kind: "npz", "folder" or "function".
      files: the path of an .npz with the arrays ``train_images``, ``train_labels`` and, if there are, ``test_images``,
        ``test_labels``, ``validation_images`` and ``validation_labels``: images are uint8, (n, height, width, channels)
        or (n, height, width), labels integers from 0, (n,). Or a folder, see :func:`experiments.folders.find`. Or
        "MODULE:FUNCTION", a function without arguments that gives a mapping with these arrays, or with "train", "test"
        and "validation": sources by number, such as those of Grain, of records (image, label) or {"image", "label"}.
      data_dir: a folder that the path is in, unless it is absolute.
      image_size: height and width to which the centre of each image in a folder is resized. They have one channel if
        all are grey, else three.
      test: the share that is held out to test on where there is no split for it, or for validation; None: a tenth.
      validation, mean, std, examples: as for :func:`experiments.data.load`.

    Raises:
      ValueError: for images and labels that are none, or do not fit together; the message names them.
      FileNotFoundError: if there is no such file.
    """
    data.check_amounts(validation, examples)
    data.check_moments(mean, std)
    choose(dict.fromkeys(OWN), kind, "config.data.name")
    if kind == "function":
        where, images = str(files), _from_function(_given(files, kind))
    else:
        path = _path(files, kind, data_dir)
        where = str(path)
        if kind == "npz":
            stat = _stat(path)
            images = _from_npz(path, stat.st_size, stat.st_mtime_ns)
        else:
            images = _from_folder(path, image_size, folders.find(path).stamp)
    splits = folders.with_test(
        images.splits, images.digests, where, test, validation, lambda both, part: Split(*(x[part] for x in both))
    )
    about = {"source": where, "sha256": images.sha256, "classes": len(images.classes)}
    options = {"validation": validation, "mean": mean, "std": std, "examples": examples}
    made = data.assembled(splits, len(images.classes), where, **options)
    if examples is None:
        _check_left({name: getattr(made, name).labels for name in SPLITS}, images.classes, where)
    return made._replace(about=about | _counts(made))


def open_set(
    files: str | None,
    data_dir: str | None = None,
    *,
    test: float | None = None,
    validation: float = 0.0,
    examples: int | None = None,
    classes: Sequence[str | int] | None = None,
) -> "streams.ImageSet":
    """Images in a folder by class, of any size, to be streamed: nothing is decoded yet.

    Args:
      files, data_dir, test: as for :func:`load`.
      validation, examples, classes: as for :func:`experiments.streams.open_set`.

    Raises:
      ValueError: as for :func:`load`, and if no image is left to train or to test on.
      FileNotFoundError: if there is no such folder.
    """
    from experiments import streams  # takes a while, and small sets do without

    data.check_amounts(validation, examples)
    path = _path(files, "folder", data_dir)
    found = folders.find(path)
    splits, names = folders.with_test(found.splits, found.digests, str(path), test, validation), found.classes
    if classes is not None:
        numbers = streams.numbers_of(classes, names, str(path))
        splits = {name: split.of_classes(numbers) for name, split in splits.items()}
        names = [names[number] for number in numbers]
    splits = {name: split[:examples] for name, split in splits.items()}
    train = splits["train"]
    hint = ": give more images, more classes, another share, config.data.test, or a split 'test'"
    streams.check_filled(train, splits["test"], classes, str(path), hint)
    kept = data.kept_of(len(train), validation, str(path))
    made = streams.ImageSet(train[:kept], splits.get("validation", train[kept:]), splits["test"], len(names))
    if examples is None:
        _check_left({name: getattr(made, name).labels for name in SPLITS}, names, str(path))
    about = {"source": str(path), "sha256": found.sha256, "classes": len(names)}
    return made._replace(about=about | _counts(made))


def _given(files: str | None, kind: str) -> str:
    if not files:
        what = {"npz": "the path of an .npz", "folder": "the path of a folder", "function": "MODULE:FUNCTION"}[kind]
        raise ValueError(f"config.data.name={kind!r} needs config.data.files, {what}")
    return files


def _path(files: str | None, kind: str, data_dir: str | None) -> Path:
    return Path(data_dir or "").expanduser() / Path(_given(files, kind)).expanduser()


def _stat(path: Path) -> os.stat_result:
    if not path.is_file():
        raise FileNotFoundError(f"config.data.files: there is no file {str(path)!r}")
    return path.stat()


def _counts(made: Any) -> dict[str, int]:
    return {f"{name}_images": data.count(getattr(made, name)) for name in SPLITS}


def _check_left(labels: Mapping[str, np.ndarray], classes: Sequence[str], where: str) -> None:
    """Raises a ValueError for a class with nothing left to train on, and warns of one that is not tested on."""
    missing = {
        name: [classes[i] for i in np.flatnonzero(np.bincount(labels[name], minlength=len(classes)) == 0)]
        for name in ("train", "test")
    }
    if missing["train"]:
        raise ValueError(
            f"{where}: of {_listed(missing['train'])} no image is left to train on, all are held out: give more images "
            "or smaller shares (config.data.test, config.data.validation)"
        )
    if missing["test"]:
        logging.warning("%s: of %s no image is held out to test on", where, _listed(missing["test"]))


def _listed(classes: Sequence[Any]) -> str:
    """ "class 3" or "classes 3, 5 and 7 others"."""
    few = classes if len(classes) <= 6 else classes[:5]
    shown = ", ".join(map(str, few)) + (f" and {len(classes) - 5} others" if len(few) < len(classes) else "")
    return f"class{'es' * (len(classes) > 1)} {shown}"


# --- Arrays -----------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)  # many runs in one process read the file once, if it has the same size and time
def _from_npz(path: Path, size: int, time: int) -> _Images:
    unreadable = (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error)
    try:
        with zipfile.ZipFile(path) as members:
            bytes_inside = sum(member.file_size for member in members.infolist())
    except unreadable as error:
        raise ValueError(f"{path} is no .npz: {error}") from error
    _check_memory(bytes_inside, str(path))
    try:
        with np.load(path, allow_pickle=False) as npz:
            arrays = {key: npz[key] for key in npz.files}
    except unreadable as error:
        raise ValueError(f"{path} cannot be read as an .npz of arrays: {error}") from error
    return _from_arrays(arrays, str(path))


@functools.lru_cache(maxsize=1)
def _from_function(name: str) -> _Images:
    """What the function gives, which is called once in a process."""
    given = imported(name, "config.data.files")()
    if not isinstance(given, Mapping):
        raise ValueError(f"{name} gives a mapping with {', '.join(KEYS)}, got {type(given).__name__}")
    if set(given) & set(SPLITS):
        _check_keys(given, SPLITS, name)
        given = {
            f"{split}_{what}": values
            for split, records in given.items()
            for what, values in zip(("images", "labels"), _read(records, f"{name} {split}"), strict=True)
        }
    return _from_arrays(given, name)


def _read(records: Any, where: str) -> tuple[np.ndarray, np.ndarray]:
    """The images and labels of a source of records."""
    if not (hasattr(records, "__len__") and hasattr(records, "__getitem__")) or not len(records):
        raise ValueError(f"{where} is a source of records by number that is not empty, got {type(records).__name__}")
    images, labels = None, []
    with progress_bar(len(records), f"reading {where}", unit="image", delay=1, leave=False) as bar:
        for i in range(len(records)):
            record = records[i]
            try:
                image, label = (record["image"], record["label"]) if isinstance(record, Mapping) else record
                image = np.asarray(image)
            except (KeyError, TypeError, ValueError):
                raise ValueError(f"{where}: record {i} is not (image, label) or {{'image', 'label'}}") from None
            if images is None:
                _check_memory(len(records) * image.nbytes, where)
                images = np.empty((len(records), *image.shape), image.dtype)
            if image.shape != images.shape[1:] or image.dtype != images.dtype:
                raise ValueError(
                    f"{where}: image {i} is {image.dtype} of shape {image.shape}, the first {images.dtype} of shape "
                    f"{images.shape[1:]}"
                )
            images[i] = image
            labels.append(label)
            bar.update()
    return images, np.asarray(labels)


def _from_arrays(arrays: Mapping[str, Any], where: str) -> _Images:
    _check_keys(arrays, KEYS, where)
    splits, digests, sha256 = {}, {}, hashlib.sha256()
    for name in SPLITS:
        images, labels = (arrays.get(f"{name}_{what}") for what in ("images", "labels"))
        if images is None and labels is None:
            continue
        if images is None or labels is None:
            raise ValueError(f"{where} has only one of {name}_images and {name}_labels")
        splits[name] = _split(images, labels, f"{where}: {name}")
    if "train" not in splits:
        raise ValueError(f"{where} has no train_images and train_labels, but {', '.join(map(repr, arrays))}")
    shape, classes = splits["train"].images.shape[1:], np.unique(splits["train"].labels)
    if missing := int(classes[-1]) + 1 - len(classes):
        first = int(np.argmax(classes != np.arange(len(classes))))
        raise ValueError(
            f"{where}: train_labels are from 0 to {classes[-1]}, but {missing} of these classes, the first of them "
            f"{first}, have no image"
        )
    for name, split in splits.items():
        if split.images.shape[1:] != shape:
            raise ValueError(f"{where}: {name}_images have shape {split.images.shape[1:]}, train_images {shape}")
        here = np.unique(split.labels)
        for one, other, lacks in ((classes, here, name), (here, classes, "train")):
            if odd := sorted(set(one.tolist()) - set(other.tolist())):
                raise ValueError(
                    f"{where}: the classes of train_labels and {name}_labels differ: {lacks} lacks {_listed(odd)}"
                )
        order, digests[name] = _order(split)
        splits[name] = Split(split.images[order], split.labels[order])
        sha256.update(f"{name} {split.images.shape}\0".encode())
        sha256.update(b"".join(digests[name]))
        sha256.update(splits[name].labels.tobytes())
    if "test" in digests and (same := len(set(digests["test"]) & set(digests["train"]))):
        logging.warning("%s: %d of the test images are among the train images", where, same)
    return _Images(splits, digests["train"], [str(number) for number in classes], sha256.hexdigest())


def _check_keys(given: Mapping[str, Any], keys: Sequence[str], where: str) -> None:
    for key in given:
        if key not in keys:
            near = difflib.get_close_matches(str(key), keys, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise ValueError(f"{where} has {key!r}{hint} It may have {', '.join(keys)}")


def _split(images: Any, labels: Any, where: str) -> Split:
    """Images and labels as they are held, after a look at both."""
    try:
        images, labels = np.asarray(images), np.asarray(labels)
    except ValueError as error:
        raise ValueError(f"{where}_images or {where}_labels is no array; do shapes differ? {error}") from None
    if images.dtype != np.uint8:
        raise ValueError(
            f"{where}_images are uint8, pixels from 0 to 255, got {images.dtype}: floats from 0 to 1 become them by "
            "np.rint(255 * images).astype(np.uint8), and config.data.mean and std normalise"
        )
    if images.ndim not in (3, 4) or not images.size:
        raise ValueError(f"{where}_images are (n, height, width, channels) or (n, height, width), got {images.shape}")
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"{where}_labels are {len(images)} integers, one for each image, got {labels.dtype} of shape {labels.shape}"
        )
    if labels.min() < 0 or labels.max() >= 2**31 - 1:
        raise ValueError(
            f"{where}_labels are from 0 to the number of classes - 1, got {labels.min()} to {labels.max()}"
        )
    return Split(images if images.ndim == 4 else images[..., None], labels.astype(np.int32))


def _order(split: Split) -> tuple[list[int], list[bytes]]:
    """The order of the images by their hashes, whatever it was before, and the hashes in it."""
    digests = [hashlib.sha256(image.tobytes()).digest() for image in split.images]
    order = sorted(range(len(digests)), key=lambda i: (digests[i], split.labels[i]))
    return order, [digests[i] for i in order]


def _check_memory(size: int, where: str, otherwise: str = "") -> None:
    if size > data.physical_memory() / 2:
        raise ValueError(f"{where} takes {size / 2**30:.0f} GiB, more than half of this machine's memory{otherwise}")


# --- Folders ----------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)  # many runs in one process decode the images once, if no file has another size or time
def _from_folder(folder: Path, size: int, stamp: str) -> _Images:
    if size < 1:
        raise ValueError(f"config.data.image_size is at least 1, got {size}")
    found = folders.find(folder)
    count = sum(map(len, found.splits.values()))
    smaller = "; give a smaller config.data.image_size, or config.data.streamed"
    _check_memory(count * size * size * 3, f"{folder}, {count:,} images of {size} x {size} pixels", smaller)
    splits, sha256, grey = {}, hashlib.sha256(), True
    with (
        ThreadPoolExecutor(os.cpu_count()) as threads,
        progress_bar(count, f"reading {folder}", unit="image", delay=1, leave=False) as bar,
    ):
        for name, files in found.splits.items():
            images = np.empty((len(files), size, size, 3), np.uint8)
            decoded = threads.map(_decode, map(files.path, range(len(files))), images)
            for path, (digest, is_grey) in zip(files.names, decoded, strict=True):
                sha256.update(f"{name}/{path}\0".encode())
                sha256.update(digest)
                grey &= is_grey
                bar.update()
            splits[name] = Split(images, files.labels)
    if grey:
        splits = {name: Split(images[..., :1].copy(), labels) for name, (images, labels) in splits.items()}
    return _Images(splits, found.digests, found.classes, sha256.hexdigest())


def _decode(path: Path, out: np.ndarray) -> tuple[bytes, bool]:
    """Puts the centre of an image into ``out``; the hash of the file, and whether the image is grey."""
    try:
        file = path.read_bytes()
        with Image.open(io.BytesIO(file)) as image:
            grey = image.mode in _GREY
        pictures.crop(file, pictures.square_box, out)
    except Exception as error:  # Pillow raises nearly anything when it meets a broken file
        raise ValueError(f"{path} cannot be read as an image: {error}") from error
    return hashlib.sha256(file).digest(), grey
