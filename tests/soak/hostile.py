"""Files that are damaged, or made to do harm: each is refused in words, or read, in little memory."""

import json
import random
import shutil
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from jaxsparse.artifacts import ArtifactError, formats, load_sparse, save_sparse
from tests.artifacts import test_damaged, test_hugging_face

MEMORY = 64 * 2**20  # bytes that reading one of these small files may take
SECONDS = 20  # that reading one may take
VALUES = [
    None, True, -1, 0, 1, 3, 0.5, 1e30, float("nan"), float("inf"), 2**31, 2**63, 10**30, "", "x", "float32",
    "../../etc", [], [1], [[0]], {}, {"a": 1},
]  # fmt: skip


def refused(read: Callable[[], Any], allowed: tuple[type[Exception], ...]) -> bool:
    """Whether a file is refused, in words. That it is read is no fault, as some changes do no harm.

    Raises:
      RuntimeError: if it takes too much memory or time.
      Exception: any but the allowed ones.
    """
    tracemalloc.start()
    began = time.monotonic()
    try:
        read()
        return False
    except allowed as error:
        if len(str(error)) < 10:
            raise RuntimeError(f"a refusal that says nothing: {error!r}") from error
        return True
    finally:
        peak, seconds = tracemalloc.get_traced_memory()[1], time.monotonic() - began
        tracemalloc.stop()
        if peak > MEMORY or seconds > SECONDS:
            raise RuntimeError(f"reading took {peak:,} bytes and {seconds:.1f} s")


def _flipped(data: bytes, rng: random.Random, first: int, last: int) -> bytes:
    """Bytes with up to eight bits flipped in a range."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        at = rng.randrange(8 * first, 8 * last)
        changed[at // 8] ^= 1 << at % 8
    return bytes(changed)


def _moved(data: bytes, rng: random.Random) -> bytes:
    """Bytes that are cut, overwritten, put in, left out, doubled or added."""
    at, count = rng.randrange(len(data)), rng.randint(1, 64)
    return rng.choice([
        data[:at], data[:at] + rng.randbytes(count) + data[at + count :], data[:at] + rng.randbytes(count) + data[at:],
        data[:at] + data[at + count :], data[:at] + data[at : at + count] + data[at:], data + rng.randbytes(count),
    ])  # fmt: skip


def _header(data: bytes) -> int:
    """Where the header of a safetensors file ends."""
    return 8 + int.from_bytes(data[:8], "little")


class Artifacts:
    """Changes of a sparse file with every encoding in it."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.model = folder / "artifact", test_damaged.every_encoding()
        save_sparse(self.path, *self.model, structure=test_damaged.STRUCTURE)
        self.data = self.path.read_bytes()

    def trial(self, number: int) -> dict[str, bool]:
        """Whether one changed file is refused; one that is not has to hold what was saved, unless it was forged."""
        rng = random.Random(f"artifact {number}")
        end = _header(self.data)
        way = number % 4
        if way == 0:
            changed = _flipped(self.data, rng, 0, end)
        elif way == 1:
            changed = _flipped(self.data, rng, end, len(self.data))
        elif way == 2:
            changed = _moved(self.data, rng)
        else:  # with a checksum that is right
            self.path.write_bytes(test_damaged.forge(self.data, lambda *parts: self._forge(rng, *parts)))
            return {"refused": refused(lambda: load_sparse(self.path), (ArtifactError,))}
        self.path.write_bytes(changed)
        was_refused = refused(lambda: load_sparse(self.path), (ArtifactError,))
        if not was_refused:
            test_damaged.same_bits(load_sparse(self.path), self.model)
        return {"refused": was_refused}

    def _forge(self, rng: random.Random, model: dict, parts: dict, metadata: dict) -> str | None:
        leaf = rng.choice(model["leaves"])
        way = rng.randrange(5)
        if way == 0:
            leaf[rng.choice(sorted(leaf))] = rng.choice(VALUES)
        elif way == 1:
            key = rng.choice([key for key in sorted(leaf) if isinstance(leaf[key], int | list)] or ["shape"])
            old = leaf[key]
            if isinstance(old, list) and old:
                old[rng.randrange(len(old))] = rng.choice(VALUES)
            else:
                leaf[key] = rng.choice([old + 1, old - 1, old * 2, 2**40] if isinstance(old, int) else VALUES)
        elif way == 2:
            name = rng.choice(sorted(parts))
            array = parts[name]
            raw = bytearray(array.tobytes())
            if raw and array.dtype != bool:
                raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
                parts[name] = np.frombuffer(bytes(raw), array.dtype)
            else:
                parts[name] = np.append(array, np.ones(1, array.dtype))
        elif way == 3:
            model[rng.choice(sorted(model))] = rng.choice(VALUES)
        else:
            text = json.dumps(model)
            at = rng.randrange(len(text))
            return text[:at] + rng.choice('{}[],:"0-9eNtn') + text[at + rng.randrange(2) :]
        return None


class HuggingFace:
    """Changes of checkpoints that transformers has made."""

    NAMES = ("gpt2", "llama", "mistral", "qwen2")

    def __init__(self, folder: Path):
        self.folder = folder / "checkpoint"

    def trial(self, number: int) -> dict[str, bool]:
        """Whether one changed checkpoint is refused."""
        rng = random.Random(f"checkpoint {number}")
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(test_hugging_face.GOLDEN / rng.choice(self.NAMES), self.folder)
        for file in self.folder.iterdir():
            file.chmod(0o600)
        ways = (self._config, self._bytes, self._tensors, self._index)
        rng.choice(ways)(rng)
        return {"refused": refused(lambda: formats.from_hf(self.folder), (ArtifactError, FileNotFoundError))}

    def _config(self, rng: random.Random) -> None:
        path = self.folder / "config.json"
        config = json.loads(path.read_text())
        for _ in range(rng.randint(1, 3)):
            key = rng.choice(sorted(config))
            if rng.random() < 0.2:
                del config[key]
            else:
                config[key] = rng.choice(VALUES)
        text = json.dumps(config)
        path.write_text(text[: rng.randrange(len(text))] if rng.random() < 0.1 else text)

    def _bytes(self, rng: random.Random) -> None:
        path = rng.choice(sorted(self.folder.glob("*.safetensors")))
        data = path.read_bytes()
        path.write_bytes(_flipped(data, rng, 0, _header(data)) if rng.random() < 0.7 else _moved(data, rng))

    def _tensors(self, rng: random.Random) -> None:
        path = rng.choice(sorted(self.folder.glob("*.safetensors")))
        tensors = safetensors.numpy.load_file(path)
        name = rng.choice(sorted(tensors))
        tensor = tensors.pop(name)
        way = rng.randrange(6)
        if way == 1:
            tensors[name + ".more"] = tensor
        elif way == 2:
            tensors[name] = np.ascontiguousarray(tensor.T)
        elif way == 3:
            tensors[name] = tensor.astype(rng.choice([np.int8, np.int64, np.float16, np.float64, bool]))
        elif way == 4:
            tensors[name] = np.ascontiguousarray(tensor[:-1])
        elif way == 5:
            tensors[name] = tensor[None]
        safetensors.numpy.save_file(tensors, path, {"format": "pt"})

    def _index(self, rng: random.Random) -> None:
        path = self.folder / "model.safetensors.index.json"
        if path.exists():
            index = json.loads(path.read_text())
            if rng.random() < 0.3:
                index[rng.choice(sorted(index))] = rng.choice(VALUES)
            else:
                files = ["../other.safetensors", "/etc/passwd", "config.json", ".", *set(index["weight_map"].values())]
                where = rng.choice(sorted([*VALUES, *files], key=str))
                index["weight_map"][rng.choice(sorted(index["weight_map"]))] = where
            path.write_text(json.dumps(index))
        else:
            path.write_text(json.dumps({"weight_map": rng.choice(VALUES)}))
            if rng.random() < 0.5:
                (self.folder / "model.safetensors").unlink()
