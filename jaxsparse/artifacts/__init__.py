r"""Sparse models on disk: small, checksummed files that can be read without this library.

:func:`save_sparse` writes params and masks to one file, and :func:`load_sparse` reads them back, bit for bit unless a
smaller dtype was requested. :func:`describe` lists the contents of a file, and so does
``python -m jaxsparse.artifacts FILE``. All need the package safetensors: ``pip install jaxsparse[artifacts]``.

**The format, version 1.** A `safetensors <https://huggingface.co/docs/safetensors>`_ file whose metadata has

- ``format``: "jaxsparse"; ``version``: "1"; ``sha256``: the first 16 hex digits of the SHA-256 of ``model``, as UTF-8;
- ``model``: JSON with the keys ``tree``, ``leaves`` and ``tensors``.

``tree`` is null for None, an object for a dict, ``["dict", [key, node], ...]`` for a dict with ints as keys,
``["list", node, ...]`` or ``["tuple", node, ...]``, and for a leaf its index in ``leaves``. ``tensors`` maps the name
of every tensor in the file to its ``[dtype, shape, sha256]``. Tensors are vectors, and those of leaf i are called
``"i/positions"``, ``"i/values"``, ``"i/signs"`` and ``"i/scale"``. Bits are packed into bytes, highest bit first, and
the last byte is padded with zeros. A leaf has ``name`` (its path), ``shape``, ``dtype`` (in memory; its values may be
stored in a smaller one), ``kept`` (the number of weights that survive), and

- ``positions``, the encoding of the survivors' positions in row-major order: "dense" (all of them; the mask is the
  scalar True); "mask" (one bit per weight); "gaps", a Golomb-Rice code of the number of pruned weights before each
  survivor; "fan_in", the same for each output by itself; or "n_of_m", both below. The r = ``low_bits`` lowest bits of
  all gaps come first, r bits per gap, padded to whole bytes. Then follows gap >> r of each gap in unary: that number of
  zeros, and a one. ``low_bits`` is 0 for the other encodings;
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
- ``values``, the encoding of the survivors' values: "each", one number per survivor; "constant", one number for all;
  "two", a negative and a positive number, with a bit in ``signs`` for each survivor that is set if it is positive; or
  "scaled", int8 to be multiplied by ``scale`` in float32.

So a file can be read with NumPy and safetensors alone (and ml_dtypes, which adds bfloat16 to NumPy):

>>> import json, math
>>> import numpy as np
>>> from safetensors import safe_open
>>> def read(path):  # {name: array}
...     file, arrays = safe_open(path, "np"), {}
...     for i, leaf in enumerate(json.loads(file.metadata()["model"])["leaves"]):
...         part = {key[len(f"{i}/"):]: file.get_tensor(key) for key in file.keys() if key.startswith(f"{i}/")}
...         size, kept, r, values = math.prod(leaf["shape"]), leaf["kept"], leaf["low_bits"], part["values"]
...         if leaf["values"] == "two":
...             values = values[np.unpackbits(part["signs"], count=kept)]
...         elif leaf["values"] == "scaled":
...             values = values * part["scale"]
...         where = np.arange(size)
...         if leaf["positions"] == "mask":
...             where = np.flatnonzero(np.unpackbits(part["positions"], count=size))
...         elif leaf["positions"] in ("gaps", "fan_in"):
...             start, stop = leaf.get("inputs", (0, len(leaf["shape"])))
...             inputs, after = math.prod(leaf["shape"][start:stop]), math.prod(leaf["shape"][stop:])
...             begin = -(-size // inputs // 8) if leaf["positions"] == "fan_in" else 0
...             live = np.unpackbits(part["positions"][:begin], count=size // inputs) if begin else np.ones(1)
...             live, bits = np.flatnonzero(live)[:, None], np.unpackbits(part["positions"][begin:])
...             low = bits[: kept * r].reshape(kept, r) @ (1 << np.arange(r)[::-1])
...             ones = np.flatnonzero(bits[-(-kept * r // 8) * 8 :])
...             gaps = (np.diff(ones, prepend=-1) - 1 << r) + low
...             index = np.cumsum(gaps.reshape(live.size, -1) + 1, axis=1) - 1
...             where = ((live // after * inputs + index) * after + live % after).ravel()
...         elif leaf["positions"] == "n_of_m":
...             (n, m), order = leaf["n_of_m"], np.arange(size).reshape(leaf["shape"]).transpose(leaf["axes"]).ravel()
...             bits, width = np.unpackbits(part["positions"], bitorder="little"), (m - 1).bit_length()
...             bits = bits[: size // m * n * width].reshape(-1, width) @ (1 << np.arange(width))
...             where = order[np.arange(bits.size) // n * m + bits]
...         array = np.zeros(size, leaf["dtype"])
...         array[where] = values
...         arrays[leaf["name"]] = array.reshape(leaf["shape"])
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
