"""Messages on the page docs/faq.md are those that the library says."""

import re
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

import jaxsparse as js
from jaxsparse.post_training import prune_once

PAGE = Path(__file__).parents[2] / "docs" / "faq.md"
KEYS = jax.random.split(jax.random.key(0))
PARAMS = {
    "fc1": {"kernel": jax.random.normal(KEYS[0], (64, 32)), "bias": jnp.zeros(32)},
    "fc2": {"kernel": jax.random.normal(KEYS[1], (32, 8)), "bias": jnp.zeros(8)},
}
ODD = {**PARAMS, "fc2": {"kernel": PARAMS["fc2"]["kernel"][:30], "bias": jnp.zeros(8)}}


def fixed(sparsity=0.75):
    return js.mask_updates(js.magnitude_masks(PARAMS, sparsity))


def momentum():
    return js.sparse_momentum(0.9, 10)


def updated(*members, chain=js.chain, given=(PARAMS,)):
    tx = chain(*members)
    return tx.update(PARAMS, tx.init(PARAMS), *given)


def state(*members):
    return js.chain(*members).init(PARAMS)


def in_jit():
    return jax.jit(lambda p: js.check(js.chain(optax.sgd(0.1), fixed()).init(p), p))(PARAMS)


def dense_file():
    js.formats.save_dense("model.safetensors", PARAMS)
    return js.load_sparse("model.safetensors")


SAID = [
    lambda: updated(optax.sgd(0.1), momentum()),
    lambda: updated(optax.sgd(0.1, momentum=0.9), momentum(), chain=optax.chain),
    lambda: updated(optax.sgd(0.1), js.rigl(0.9, stop_at=10), chain=optax.chain),
    lambda: js.rigl(0.9),
    lambda: updated(momentum(), optax.sgd(0.1, momentum=0.9)),
    lambda: updated(optax.sgd(0.1), fixed(), given=()),
    lambda: js.get_masks(state(optax.sgd(0.1, momentum=0.9), momentum(), fixed()), PARAMS),
    lambda: js.get_masks(optax.adam(1e-3).init(PARAMS)),
    lambda: js.sparsify(PARAMS, state(optax.sgd(0.1), fixed())),
    lambda: js.get_masks(state(optax.sgd(0.1), fixed()), {"fc1": PARAMS["fc1"]}),
    lambda: js.magnitude_masks(PARAMS, 90),
    lambda: js.magnitude_masks(PARAMS, 0.5, prunable="conv*"),
    lambda: js.magnitude_masks(PARAMS, 0.5, prunable=lambda path, leaf: True),
    lambda: js.magnitude_masks(ODD, 0.5, structure=js.n_of_m(2, 4)),
    lambda: js.sr_ste(optax.adam(1e-3), 2, 4).init(ODD),
    lambda: js.magnitude_masks(PARAMS, 0.5, structure="channel"),
    lambda: js.mask_updates(PARAMS).init(PARAMS),
    lambda: prune_once(lambda p, x: x @ p["fc1"]["kernel"], PARAMS, jnp.ones((4, 64)), "wanda", 0.5),
    lambda: js.check(state(optax.sgd(0.1), fixed()), PARAMS),
    lambda: js.magnitude_masks(PARAMS, {"fc2/kernel": 0.999, "*": 0.5}),
    in_jit,
    dense_file,
]


@pytest.mark.slow
def test_the_messages_are_quoted_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    section = PAGE.read_text().partition("## Error messages")[2]
    quoted = re.findall(r"^`([^`]+)`\n: ", section, re.MULTILINE)
    found = []
    for call in SAID:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                call()
            except (ValueError, js.SparsityError, js.ArtifactError) as error:
                found.append(str(error))
            else:
                found += [str(warning.message) for warning in told][:1] or [f"nothing, by number {len(found)}"]
    assert quoted == found
