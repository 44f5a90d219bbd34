"""Text as one vector of tokens: bytes of files, or ids that a tokenizer made, with whole files held out."""

import dataclasses
import glob
import hashlib
import os
import platform
import sysconfig
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import data

BYTES = 256  # the number of tokens where they are bytes
# Of the standard library: what is no library, what was generated from tables or prose, and what is of one machine.
_NOT_LIBRARY = {
    *("site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "idle_test", "lib2to3"),
    *("turtledemo", "ensurepip", "encodings", "pydoc_data", "sitecustomize.py", "usercustomize.py"),
}
_OF_MACHINE = ("config-", "_sysconfigdata_")
_IDS = (".npy", ".bin")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Text:
    """A split of a text.

    Attributes:
      tokens: (n,), uint8, uint16 or int32.
      length: of a window, in tokens that are predicted.
      windows: how many windows are an epoch of the train text, or are evaluated of another one.
    """

    tokens: Any
    length: int = dataclasses.field(metadata={"static": True})
    windows: int = dataclasses.field(metadata={"static": True})

    def __len__(self) -> int:
        return self.windows

    @property
    def starts(self) -> np.ndarray:
        """Where the windows that are evaluated begin, which do not overlap: (windows,), int32, spread over the text."""
        every = -(-(len(self.tokens) - 1) // self.length)
        return (np.arange(self.windows) * every // max(self.windows, 1) * self.length).astype(np.int32)


class TextDataset(NamedTuple):
    """A text to train on and texts held out.

    Attributes:
      train: the text to train on.
      validation: text held out from that of training; there may be none.
      test: the text to test on.
      num_classes: how many different tokens there may be.
      about: the source, its number of files and bytes, a sha256 of paths and contents, and the tokens of each split.
    """

    train: Text
    validation: Text
    test: Text
    num_classes: int
    about: dict[str, Any]


def load(
    files: str | None = None,
    *,
    length: int,
    vocab_size: int | None = None,
    validation: float = 0.0,
    test: float = 0.05,
    test_files: str | None = None,
    epoch_tokens: int | None = None,
    eval_windows: int | None = None,
    examples: int | None = None,
) -> TextDataset:
    """The text in files, of which some are held out.

    A file is held out whole, by a hash of its path (within the folder, or within what the files' paths have in common):
    the same files on every machine, however many others there are. A link to a file is a file too, where it is. The
    files of a split follow one another in the order of their paths, with nothing in between.

    Args:
      files: a file, a folder with all that is in it, or a pattern such as "books/**/*.txt"; None takes the source of
        Python's standard library, which every machine has, without its tests, IDLE, tables of character sets and what
        was made for the machine.
      length: of a window, int >= 1.
      vocab_size: None takes the files' bytes as tokens. A number is for files of ids below it that a tokenizer made:
        .npy, one-dimensional and of any integer dtype, or .bin, uint16 without a header.
      validation, test: the share of the files that is held out, in [0, 1).
      test_files: the text to test on, like ``files``, instead of a share of these.
      epoch_tokens: how many tokens make an epoch; None takes as many as the train text has.
      eval_windows: evaluate at most this many windows of a split, spread over it; None takes all of it.
      examples: keep at most this many windows from the start of each split; None keeps all.

    Raises:
      ValueError: for options out of range, ids that are none, and files of which none is left to train or to test on.
      FileNotFoundError: if there are no such files.

    Examples:
      >>> from experiments import text
      >>> library = text.load(length=128, validation=0.05)
      >>> library.num_classes, library.train.tokens.dtype
      (256, dtype('uint8'))
      >>> all(map(len, (library.train, library.validation, library.test)))
      True
    """
    data.check_amounts(validation, examples)
    if not (0 <= test < 1 and validation + test < 1):
        raise ValueError(
            f"config.data.test is in [0, 1), with config.data.validation less than 1, got {test} and {validation}"
        )
    for name, value in (("length", length), ("epoch_tokens", epoch_tokens), ("eval_windows", eval_windows)):
        if value is not None and value < 1:
            raise ValueError(f"config.data.{name} is at least 1, got {value}")
    if vocab_size is not None and not 2 <= vocab_size < 2**31:
        raise ValueError(f"config.data.vocab_size is from 2 to 2^31 - 1, got {vocab_size}")
    parts = _split(files, test_files, validation, test)
    size = sum(file.stat().st_size for of_split in parts.values() for file in of_split.values())
    if size > data.physical_memory() / 2:
        raise ValueError(f"config.data.files are {size / 2**30:.0f} GiB, more than half of this machine's memory")
    sha256 = hashlib.sha256()
    texts = {name: _joined(of_split, vocab_size, sha256) for name, of_split in parts.items()}
    if examples is not None:
        texts = {name: tokens[: examples * length + 1] for name, tokens in texts.items()}
    for name, least in (("train", length + 1), ("test", 2)):
        if not least <= len(texts[name]) < 2**31:
            raise ValueError(
                f"config.data.files: the {name} text has {len(texts[name])} tokens, and it takes at least {least} and "
                "less than 2^31"
            )
    about = {
        "source": f"standard library of Python {platform.python_version()}" if files is None else files,
        **({} if test_files is None else {"test_source": test_files}),
        "files": sum(map(len, parts.values())),
        "bytes": size,
        "sha256": sha256.hexdigest(),
        **{f"{name}_tokens": len(tokens) for name, tokens in texts.items()},
    }
    counts = {name: max(-(-(len(tokens) - 1) // length), 0) for name, tokens in texts.items()}
    counts = {name: min(number, eval_windows or number) for name, number in counts.items()}
    counts["train"] = (epoch_tokens or len(texts["train"])) // length
    splits = {name: Text(tokens, length, counts[name]) for name, tokens in texts.items()}
    return TextDataset(**splits, num_classes=vocab_size or BYTES, about=about)


def _split(files: str | None, test_files: str | None, validation: float, test: float) -> dict[str, dict[str, Path]]:
    """The files of each split by their path."""
    found = _library() if files is None else _found(files, "files")
    held_out = {} if test_files is None else _found(test_files, "test_files")
    if held_out:
        tested = {file.resolve() for file in held_out.values()}
        found, test = {name: file for name, file in found.items() if file.resolve() not in tested}, 0.0
    parts: dict[str, dict[str, Path]] = {"train": {}, "validation": {}, "test": dict(held_out)}
    for name, file in found.items():
        share = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32
        parts["test" if share < test else "validation" if share < test + validation else "train"][name] = file
    for name in ("train", *(["validation"] if validation else []), "test"):
        if not parts[name]:
            raise ValueError(
                f"config.data: of {len(found)} file{'s' * (len(found) != 1)} none is left for {name}. Files are held "
                "out whole: give more of them, another share, or config.data.test_files"
            )
    return parts


def windows(tokens: Any, key: jax.Array | int, number: int, length: int) -> jax.Array:
    """Windows of a text at random places, such as to calibrate with: int32, (number, length).

    Args:
      tokens: (n,), of any integer dtype.
      key: PRNG key, or an int as its seed.
      number: of windows, int >= 1. They may overlap.
      length: of each, at most n.

    Raises:
      ValueError: for a text that is shorter than a window.

    Examples:
      >>> import numpy as np
      >>> windows(np.arange(100, 200), key=0, number=2, length=3).shape
      (2, 3)
    """
    if not 1 <= length <= len(tokens):
        raise ValueError(f"length is from 1 to the {len(tokens)} tokens of the text, got {length}")
    key = jax.random.key(key) if isinstance(key, int) else key
    return at(tokens, jax.random.randint(key, (number,), 0, len(tokens) - length + 1), length)


def at(tokens: Any, starts: jax.Array, length: int) -> jax.Array:
    """The windows of a text that begin at these places: int32, (len(starts), length). The last token fills them up."""
    places = jnp.minimum(jnp.asarray(starts)[:, None] + jnp.arange(length)[None], len(tokens) - 1)
    return jnp.asarray(tokens)[places].astype(jnp.int32)


@cache
def _library() -> dict[str, Path]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    found = {
        path.relative_to(folder).as_posix(): path
        for path in folder.rglob("*.py")
        if not any(part in _NOT_LIBRARY or part.startswith(_OF_MACHINE) for part in path.relative_to(folder).parts)
    }
    if not found:
        raise FileNotFoundError(
            f"Python has the source of its standard library in {folder}, but there is none: give config.data.files"
        )
    return dict(sorted(found.items()))


def _found(files: str, key: str) -> dict[str, Path]:
    """The files by their path in the folder, or in the one that they have in common, in order."""
    path = Path(files).expanduser()
    if path.is_dir():
        found = {file.relative_to(path).as_posix(): file for file in path.rglob("*") if file.is_file()}
    else:
        paths = [path] if path.is_file() else [Path(file) for file in glob.glob(str(path), recursive=True)]
        # Of a link to a file the place counts, not where it leads: two of them may lead to one file.
        placed = {file.parent.resolve() / file.name: file for file in paths if file.is_file()}
        folder = os.path.commonpath([place.parent for place in placed]) if placed else ""
        found = {place.relative_to(folder).as_posix(): file for place, file in placed.items()}
    if not found:
        raise FileNotFoundError(f"config.data.{key} is a file, a folder or a pattern, and {files!r} matches no file")
    return dict(sorted(found.items()))


def _joined(files: dict[str, Path], vocab_size: int | None, sha256: Any) -> np.ndarray:
    parts: list[Any] = []
    for name, file in files.items():
        contents = file.read_bytes()
        sha256.update(f"{name}\0{len(contents)}\0".encode())
        sha256.update(contents)
        parts.append(_tokens(file, contents, vocab_size))
    return np.concatenate(parts) if parts else np.empty(0, _dtype(vocab_size))


def _dtype(vocab_size: int | None) -> Any:
    return np.uint8 if vocab_size is None or vocab_size <= 2**8 else np.uint16 if vocab_size <= 2**16 else np.int32


def _tokens(file: Path, contents: bytes, vocab_size: int | None) -> np.ndarray:
    if vocab_size is None:
        if file.suffix in _IDS:
            raise ValueError(f"{file} looks like ids of tokens: config.data.vocab_size says how many tokens there are")
        return np.frombuffer(contents, np.uint8)
    if file.suffix not in _IDS:
        raise ValueError(
            f"config.data.vocab_size is for files of ids, {' and '.join(_IDS)}; {file} is none: leave it out for bytes"
        )
    try:
        ids = np.load(file, allow_pickle=False) if file.suffix == ".npy" else np.frombuffer(contents, "<u2")
    except ValueError as error:
        raise ValueError(f"{file} holds no ids: {error}") from None
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"{file} has one axis of integers, got {ids.dtype} of shape {ids.shape}")
    if len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise ValueError(f"{file} has ids from {ids.min()} to {ids.max()}, but config.data.vocab_size is {vocab_size}")
    return ids.astype(_dtype(vocab_size))
