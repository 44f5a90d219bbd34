"""Folders of images by class: which files there are, in an order and with a share held out by hashes of their paths.

Without JAX, which the worker processes of streamed images do without.
"""

import dataclasses
import hashlib
import operator
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

IMAGES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")  # how the names of the files end
_OF_SYSTEM = ("desktop.ini", "thumbs.db")  # what is left out, besides hidden files
_FOLDERS = {"train": "train", "test": "test", "val": "validation", "validation": "validation"}
_LIKE_A_SPLIT = re.compile("(train|training|test|testing|val|valid|validation)([ _-]?(set|data))?")
_SPLITS_ARE = (
    "The folders of splits are called 'train', 'test' and 'val' or 'validation': rename them so, or if they are "
    "classes, put all of them into a folder 'train'"
)


@dataclasses.dataclass(frozen=True)
class ImageFiles:
    """Files of images with labels, by number, as :class:`experiments.streams.Source` has them.

    Attributes:
      folder: of the split.
      names: the files' paths in it, which begin with the class.
      labels: (n,), int32.
    """

    folder: Path
    names: tuple[str, ...]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, number: int | slice) -> Any:
        if isinstance(number, slice):
            return dataclasses.replace(self, names=self.names[number], labels=self.labels[number])
        return self.path(number).read_bytes(), int(self.labels[number])

    def path(self, number: int) -> Path:
        """The path of a file."""
        return self.folder / self.names[number]

    def name_of(self, number: int) -> str:
        """The path of a file, for messages."""
        return str(self.path(number))

    def of_classes(self, numbers: Mapping[int, int]) -> "ImageFiles":
        """The files of some classes alone, with the labels that they get."""
        chosen = [i for i, label in enumerate(self.labels.tolist()) if label in numbers]
        labels = np.array([numbers[label] for label in self.labels[chosen].tolist()], np.int32)
        return dataclasses.replace(self, names=tuple(self.names[i] for i in chosen), labels=labels)


class Found(NamedTuple):
    """The files of a folder.

    Attributes:
      splits: by name, "train" and maybe "test" and "validation", as they are given.
      digests: of the train examples, by which they are in order.
      classes: their names; the labels are their numbers.
      stamp: changes with the name, the size or the time of any file.
      sha256: of all names and sizes.
    """

    splits: dict[str, ImageFiles]
    digests: list[bytes]
    classes: list[str]
    stamp: str
    sha256: str


def find(folder: Path) -> Found:
    """The images of ``FOLDER/train/CLASS/...`` with ``FOLDER/test``, ``val`` or both, or of ``FOLDER/CLASS/...`` alone.

    The classes' numbers are in the order of their names. The files of a split are in the order of the hashes of their
    paths in it, so that the first ones, or the last, are of all classes. Hidden files and folders are left out, links
    are followed.

    Raises:
      ValueError: for what is no image, a class without images, classes that differ from split to split, and classes
        that look like splits.
      FileNotFoundError: if there is no such folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"config.data.files={str(folder)!r} is not a folder")
    inside = _subfolders(folder)
    if splits := [name for name in inside if name in _FOLDERS]:
        if other := sorted(set(inside) - set(splits)):
            raise ValueError(f"{folder} has the splits {', '.join(splits)}, but {other[0]!r} is none of {[*_FOLDERS]}")
        if len({_FOLDERS[name] for name in splits}) < len(splits):
            raise ValueError(f"{folder} has both 'val' and 'validation', which are the same split")
        of_splits = {_FOLDERS[name]: inside[name] for name in splits}
    else:
        if like := [name for name in inside if _LIKE_A_SPLIT.fullmatch(name.casefold())]:
            raise ValueError(f"{folder} has {', '.join(map(repr, like))}, as a split may be called. {_SPLITS_ARE}")
        of_splits = {"train": folder}
    classes = {name: [*_subfolders(path)] for name, path in of_splits.items()}
    for name, of_split in classes.items():
        if not of_split:
            raise ValueError(f"{of_splits[name]} has no folder, and it takes one with images for each class")
        if odd := sorted(set(of_split) ^ set(classes.get("train", of_split))):
            where = of_splits[name] if odd[0] not in of_split else of_splits["train"]
            raise ValueError(f"the classes of {name} and train differ: {where} has no {odd[0]!r} ({len(odd)} differ)")
    names = next(iter(classes.values()))
    stamp, sizes, found = hashlib.sha256(), hashlib.sha256(), {}
    for name, path in sorted(of_splits.items()):
        files, stats = _files(path, names)
        for file, stat in zip(files.names, stats, strict=True):
            sizes.update(f"{name}/{file}\0{stat.st_size}\0".encode())
            stamp.update(f"{name}/{file}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
        found[name] = files
    if not splits:
        _refuse_splits(folder, names, found["train"].names)
    digests = [hashlib.sha256(name.encode()).digest() for name in found["train"].names] if "train" in found else []
    return Found(found, digests, names, stamp.hexdigest(), sizes.hexdigest())


def with_test(
    splits: Mapping[str, Any],
    digests: Sequence[bytes],
    where: str,
    test: float | None,
    validation: float,
    part_of: Callable[[Any, slice], Any] = operator.getitem,
) -> dict[str, Any]:
    """Splits with one to test on: that named so, else that for validation, else the first of the train examples.

    Args:
      splits: by name, of "train", "test", "validation".
      digests: of the train examples, in order: those are held out whose share of all possible ones is below ``test``.
      where: for messages.
      test: the share of the train examples; None takes a tenth, and is needed where a split is given.
      validation: the share that is held out later.
      part_of: takes a slice of a split.
    """
    splits = dict(splits)
    if "train" not in splits:
        raise ValueError(f"{where} has no split 'train', but {', '.join(map(repr, splits))}")
    if test is not None and not 0 < test < 1:
        raise ValueError(f"config.data.test is between 0 and 1, got {test}")
    given = next((name for name in ("test", "validation") if name in splits), None)
    if given is not None and test is not None:
        raise ValueError(f"config.data.test={test} has no effect: {where} has a split {given!r} to test on")
    if given == "validation":
        splits["test"] = splits.pop("validation")
    elif given is None:
        test = 0.1 if test is None else test
        count = sum(int.from_bytes(digest[:4], "big") / 2**32 < test for digest in digests)
        if count in (0, len(digests)):
            raise ValueError(
                f"{where} has {len(digests)} images, of which {count} are held out to test on: give more images, "
                "another share, config.data.test, or a split 'test'"
            )
        train = splits["train"]
        splits |= {"train": part_of(train, slice(count, None)), "test": part_of(train, slice(count))}
    if "validation" in splits and validation:
        raise ValueError(f"config.data.validation={validation}, but {where} has a split for validation of its own")
    return splits


def _subfolders(folder: Path) -> dict[str, Path]:
    found = {}
    for entry in os.scandir(folder):
        if entry.is_dir() and entry.name[0] != ".":
            found[entry.name] = Path(entry.path)
        elif Path(entry.name).suffix.lower() in IMAGES and entry.name[0] != ".":
            raise ValueError(f"{entry.path} is an image outside of the classes' folders")
    return dict(sorted(found.items()))


def _refuse_splits(folder: Path, classes: Sequence[str], files: Sequence[str]) -> None:
    """Raises a ValueError for classes that all have the same folders of images inside, as splits have their classes."""
    inside: dict[str, set[str]] = {name: set() for name in classes}
    for file in files:
        name, *between, _ = file.split("/")
        inside[name].update(between[:1])
    first = inside[classes[0]]
    # One folder in each, such as "images", is none of several classes that a split would have.
    if len(classes) > 1 and len(first) > 1 and all(folders == first for folders in inside.values()):
        raise ValueError(
            f"{folder} has {_some(classes)}, which all have {_some(sorted(first))} inside, as splits have their "
            f"classes. {_SPLITS_ARE}"
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _files(folder: Path, classes: Sequence[str]) -> tuple[ImageFiles, list[os.stat_result]]:
    """The images of a split, in the order of the hashes of their paths."""
    found = []
    for label, name in enumerate(classes):
        count = len(found)
        for path in _within(folder / name, {*map(str, (folder / name).resolve().parents)}):
            if path.suffix.lower() not in IMAGES:
                raise ValueError(f"{path} is among the images, whose names end in {', '.join(IMAGES)}")
            inside = path.relative_to(folder).as_posix()
            found.append((hashlib.sha256(inside.encode()).digest(), inside, label, path.stat()))
        if len(found) == count:
            raise ValueError(f"the class {name!r} is empty: {folder / name} has no images ({', '.join(IMAGES)})")
    found.sort(key=lambda file: file[:2])
    names, labels = tuple(file[1] for file in found), np.array([file[2] for file in found], np.int32)
    return ImageFiles(folder, names, labels), [file[3] for file in found]


def _within(folder: Path, above: set[str]) -> Iterator[Path]:
    """The files in a folder and in the folders inside, but for hidden ones and what the system puts there.

    Links are followed, but for those to one of the folders ``above``, by their real paths, which would have no end.
    """
    real = os.path.realpath(folder)
    if real in above:
        return
    for entry in os.scandir(folder):
        if entry.name[0] == "." or entry.name.lower() in _OF_SYSTEM:
            continue
        if entry.is_dir():
            yield from _within(Path(entry.path), above | {real})
        else:
            yield Path(entry.path)
