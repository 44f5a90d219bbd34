r"""Sparse models on disk: small, checksummed files that can be read without this library.

:func:`save_sparse` writes params and masks to one file, and :func:`load_sparse` reads them back, bit for bit unless a
smaller dtype was requested. :func:`describe` lists the contents of a file, and so does
``python -m jaxsparse.artifacts FILE``. All need the package safetensors.

**The format, version 2.** A `safetensors <https://huggingface.co/docs/safetensors>`_ file whose metadata has

- ``format``: "jaxsparse"; ``version``: "2";
- ``model``: JSON with the keys ``tree`` and ``leaves``;
- ``sha256``: the first 16 hex digits of the SHA-256 of ``model``, as UTF-8, and the bytes of all tensors by name.

``tree`` is null for None, an object for a dict, ``["dict", [key, node], ...]`` for a dict with ints as keys,
``["list", node, ...]`` or ``["tuple", node, ...]``, and for a leaf its index in ``leaves``.

There is one tensor for each dtype, a vector that bears its name ("float32"): the parts of all leaves that have this
dtype, one after the other. The parts of a leaf are ``positions``, ``values``, ``signs`` and ``scale``, in this order;
all but ``values`` may be absent. Bits are packed into bytes (uint8), highest bit first, and the last byte is padded
with zeros. A leaf has

- ``shape``;
- ``dtype``, in memory, and ``stored``, of its values in the file: "float32" and the same where they are left out;
- ``positions``, the encoding of the survivors' positions in row-major order: "dense" (all of them; the mask is the
  scalar True; this may be left out); "mask" (one bit per weight); "gaps", a Golomb-Rice code of the number of pruned
  weights before each survivor; "fan_in", the same for each output by itself; or "n_of_m", both below;
- ``kept``, the number of weights that survive, and ``bytes``, how many the positions take, unless these are "dense";
- ``low_bits``, with the positions "gaps" and "fan_in". The r = ``low_bits`` lowest bits of all gaps come first, r bits
  per gap, padded to whole bytes. Then follows gap >> r of each gap in unary: that number of zeros, and a one;
- ``inputs``, with the positions "fan_in" alone: the first axis of the inputs and the one after their last; the other
  axes are those of the outputs. Every output keeps equally many weights, or none, as :func:`jaxsparse.srigl` leaves
  them. One bit per output comes first, set if it keeps any, padded to whole bytes. The gaps are those among the inputs
  of each output, output by output in row-major order, and the values are in this order too;
- ``n_of_m``, n and m, and ``axes``, an order of the leaf's axes, with the positions "n_of_m" alone: transposed to that
  order, which has the inputs last, every m consecutive weights keep at most n. Each of these groups has n values and n
  positions from 0 to m - 1, in increasing order, in as many bits as the number m - 1 takes. Here alone the lowest bit
  comes first, and is packed into the lowest bit of a byte: a byte has the positions of two groups of 2:4. So values and
  positions of a matrix are those of a compressed one of shape (outputs, inputs * n / m), in the order in which the
  sparse tensor cores of NVIDIA's GPUs take them. If ``kept`` is less than the number of values, some groups keep fewer
  than n, and have zeros at other positions as well. Then one bit per value follows the bytes of the positions, set if
  the weight survives;
- ``values``, the encoding of the survivors' values: "each", one number per survivor (this may be left out); "constant",
  one number for all; "two", a negative and a positive number, with a bit in ``signs`` for each survivor that is set if
  it is positive; or "scaled", int8 to be multiplied by the number ``scale`` in float32.

So a file can be read with NumPy and safetensors alone (and ml_dtypes, which adds bfloat16 to NumPy):

>>> import json, math
>>> import numpy as np
>>> from safetensors import safe_open
>>> def paths(node, path=()):  # {index of a leaf: its path}
...     if isinstance(node, int):
...         return {node: "/".join(path)}
...     if isinstance(node, list):
...         node = dict(node[1:] if node[0] == "dict" else enumerate(node[1:]))
...     return {i: name for key, child in (node or {}).items() for i, name in paths(child, (*path, str(key))).items()}
>>> def read(path):  # {path of a leaf: array}
...     with safe_open(path, "np") as file:
...         model, data = json.loads(file.metadata()["model"]), {dtype: file.get_tensor(dtype) for dtype in file.keys()}
...     def take(dtype, count):  # the next part
...         part, data[dtype] = data[dtype][:count], data[dtype][count:]
...         return part
...     names, arrays = paths(model["tree"]), {}
...     for i, leaf in enumerate(model["leaves"]):
...         leaf = {"dtype": "float32", "positions": "dense", "values": "each", "low_bits": 0} | leaf
...         size, dtype, r = math.prod(leaf["shape"]), leaf["dtype"], leaf["low_bits"]
...         kept, (n, m) = leaf.get("kept", size), leaf.get("n_of_m", (0, 1))
...         slots, where = size // m * n or kept, np.arange(size)
...         positions = take("uint8", leaf["bytes"]) if "bytes" in leaf else None
...         count = {"constant": 1, "two": 2}.get(leaf["values"], slots)
...         values = take("int8" if leaf["values"] == "scaled" else leaf.get("stored", dtype), count)
...         if leaf["values"] == "two":
...             values = values[np.unpackbits(take("uint8", -(-slots // 8)), count=slots)]
...         elif leaf["values"] == "scaled":
...             values = values * take("float32", 1)
...         if leaf["positions"] == "mask":
...             where = np.flatnonzero(np.unpackbits(positions, count=size))
...         elif leaf["positions"] in ("gaps", "fan_in"):
...             start, stop = leaf.get("inputs", (0, len(leaf["shape"])))
...             inputs, after = math.prod(leaf["shape"][start:stop]), math.prod(leaf["shape"][stop:])
...             begin = -(-size // inputs // 8) if leaf["positions"] == "fan_in" else 0
...             live = np.unpackbits(positions[:begin], count=size // inputs) if begin else np.ones(1)
...             live, bits = np.flatnonzero(live)[:, None], np.unpackbits(positions[begin:])
...             low = bits[: kept * r].reshape(kept, r) @ (1 << np.arange(r)[::-1])
...             ones = np.flatnonzero(bits[-(-kept * r // 8) * 8 :])
...             gaps = (np.diff(ones, prepend=-1) - 1 << r) + low
...             index = np.cumsum(gaps.reshape(live.size, -1) + 1, axis=1) - 1
...             where = ((live // after * inputs + index) * after + live % after).ravel()
...         elif leaf["positions"] == "n_of_m":
...             order = np.arange(size).reshape(leaf["shape"]).transpose(leaf["axes"]).ravel()
...             bits, width = np.unpackbits(positions, bitorder="little"), (m - 1).bit_length()
...             bits = bits[: slots * width].reshape(-1, width) @ (1 << np.arange(width))
...             where = order[np.arange(slots) // n * m + bits]
...         array = np.zeros(size, dtype)
...         array[where] = values
...         arrays[names[i]] = array.reshape(leaf["shape"])
...     return arrays
>>> import tempfile
>>> with tempfile.TemporaryDirectory() as folder:
...     save_sparse(f"{folder}/model", {"fc1": {"kernel": np.float32([[0, 2], [0, 0]]), "bias": np.float32([1, 1])}})
...     read(f"{folder}/model")
{'fc1/bias': array([1., 1.], dtype=float32), 'fc1/kernel': array([[0., 2.],
       [0., 0.]], dtype=float32)}
"""

from jaxsparse.artifacts.files import ArtifactError
from jaxsparse.artifacts.sparse import describe, load_sparse, save_sparse

__all__ = ["ArtifactError", "describe", "load_sparse", "save_sparse"]
