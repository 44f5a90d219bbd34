"""Optax's own contract tests over our links and wrappers, at sparsity 0: there they must act as the dense optimizer.

  python -m tests.optax_contract [-k REGEX] [CHECKOUT]      (make test-optax [OPTAX=CHECKOUT])

The tests are those of ``optax/contrib/_common_test.py``, of the installed Optax or of a checkout of it; nothing of them
is kept here. Their table of optimizers is replaced by :data:`OPTIMIZERS`, with every leaf prunable, also vectors. What
is left out, and why, is printed at the end.
"""

import argparse
import collections
import functools
import importlib.util
import re
import sys
import unittest
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import parameterized

import jaxsparse
from jaxsparse.trees import by_path

COMMON = "optax/contrib/_common_test.py"
ALL = jaxsparse.Prunable(lambda path, leaf: True)
FLOAT32 = "reweighted_l1 takes float32 and float64 params: its thresholds are thousandths of the weights"


def with_params(make: Callable[[Any], optax.GradientTransformation]) -> optax.GradientTransformationExtraArgs:
    """A transformation that is made for params, which these tests do not tell beforehand."""
    known = []

    def made_for(params):
        if jax.tree.leaves(params):  # optax.tree.map_params also calls init with an empty tree
            known[:] = [optax.with_extra_args_support(make(params))]
        return known[0]

    def update(updates, state, params=None, **extra_args):
        return made_for(params).update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(lambda params: made_for(params).init(params), update)


def gated(wrapper: Callable, learning_rate: optax.ScalarOrSchedule, **options: Any) -> optax.GradientTransformation:
    """Adam within gates on every entry of the first axis, all of them open and without a penalty."""

    def make(params):
        groups = [jaxsparse.Group(f"leaf {i}", {path: 0}) for i, path in enumerate(by_path(params))]
        return wrapper(optax.adam(learning_rate), groups, penalty=jaxsparse.Penalty(0.0, "all"), **options)

    return with_params(make)


def keep_all(params: Any) -> Any:
    """Masks that keep every weight."""
    return jax.tree.map(lambda leaf: np.ones(leaf.shape, bool), params)


# The links stand behind Adam, alone as they are. Learning rates are annotated as Optax's are: its tests look at that.
def masked_adam(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    return optax.chain(optax.adam(learning_rate), with_params(lambda p: jaxsparse.mask_updates(keep_all(p))))


def sparse_momentum_adam(
    learning_rate: optax.ScalarOrSchedule, sparsity: float = 0.0, growth: str = "momentum"
) -> optax.GradientTransformation:
    link = jaxsparse.sparse_momentum(sparsity, update_every=10, growth=growth, prunable=ALL)
    return jaxsparse.chain(optax.adam(learning_rate), link)


def asni_adam(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    link = jaxsparse.asni(0.0, update_every=10, prunable=ALL)
    return jaxsparse.chain(optax.adam(learning_rate), link)


def reweighted_l1_adam(learning_rate: optax.ScalarOrSchedule, l1: float = 0.0) -> optax.GradientTransformation:
    link = jaxsparse.reweighted_l1(learning_rate, l1=l1, prunable=ALL)
    return optax.chain(optax.adam(learning_rate), link)


def rda(learning_rate: optax.ScalarOrSchedule, l1: float = 0.0) -> optax.GradientTransformation:
    return jaxsparse.rda(learning_rate, l1=l1, momentum_time=0.01, prunable=ALL)


def straight_through_adam(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    return jaxsparse.straight_through(optax.adam(learning_rate), 0.0, prunable=ALL)


def top_kast_adam(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    return jaxsparse.top_kast(optax.adam(learning_rate), 0.0, 0.0, decay=0.0, prunable=ALL)


def l0_adam(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    # So large that whatever is drawn opens the gates.
    return gated(jaxsparse.l0, learning_rate, log_alpha=30.0)


def dep_l0_adam(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    # Its gates start nearly open; frozen, which is their mean, they are open.
    return gated(jaxsparse.dep_l0, learning_rate, freeze_gates_at=0)


OPTIMIZERS: dict[str, tuple[Callable, dict[str, Any]]] = {
    "mask_updates": (masked_adam, {"learning_rate": 1e-2}),
    "sparse_momentum": (sparse_momentum_adam, {"learning_rate": 1e-2, "sparsity": 0.0}),
    "sparse_momentum, random": (sparse_momentum_adam, {"learning_rate": 1e-2, "growth": "random"}),
    "asni": (asni_adam, {"learning_rate": 1e-2}),
    "reweighted_l1": (reweighted_l1_adam, {"learning_rate": 1e-2, "l1": 0.0}),
    "rda": (rda, {"learning_rate": 1e-3, "l1": 0.0}),
    "straight_through": (straight_through_adam, {"learning_rate": 1e-2}),
    "top_kast": (top_kast_adam, {"learning_rate": 1e-2}),
    "l0": (l0_adam, {"learning_rate": 1e-2}),
    "dep_l0": (dep_l0_adam, {"learning_rate": 1e-2}),
}
ROWS = [
    {"opt_name": name, "opt_kwargs": options, "wrapper_name": None, "wrapper_kwargs": None}
    for name, (_, options) in OPTIMIZERS.items()
]


def factory(name: str) -> Callable:
    """What makes an optimizer; those that want float32 skip the tests of lower precision."""
    make, _ = OPTIMIZERS[name]
    if name not in ("reweighted_l1", "rda"):
        return make

    @functools.wraps(make)
    def checked(*args, **options):
        tx = make(*args, **options)

        def init(params):
            if any(jnp.finfo(leaf.dtype).bits < 32 for leaf in jax.tree.leaves(params)):
                raise unittest.SkipTest(FLOAT32)
            return tx.init(params)

        return optax.GradientTransformationExtraArgs(init, tx.update)

    return checked


def load(path: Path) -> ModuleType:
    """Optax's module of tests, with our optimizers in place of its own."""
    if not path.exists():
        raise FileNotFoundError(
            f"there is no {path}: this Optax ({optax.__version__}) comes without its tests. Take a checkout, git clone "
            f"--branch v{optax.__version__} https://github.com/google-deepmind/optax, and make test-optax OPTAX=optax"
        )
    product = parameterized.product

    def of_ours(*rows, **options):
        """The same decorator, over our rows where it is over Optax's."""
        return product(*(ROWS if "opt_name" in of_theirs[0] else of_theirs for of_theirs in rows), **options)

    spec = importlib.util.spec_from_file_location("optax_common_test", path)
    module = importlib.util.module_from_spec(spec)
    with mock.patch.object(parameterized, "product", of_ours):
        spec.loader.exec_module(module)
    module._get_opt_factory = factory
    return module


def compare_keys(compare: Callable) -> Callable:
    """Of typed PRNG keys, which are no numbers, the words that they are made of."""

    def words(leaf):
        return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf

    return lambda got, expected, **options: compare(*(jax.tree.map(words, x) for x in (got, expected)), **options)


def main(argv: Sequence[str] | None = None) -> unittest.TestResult:
    """The command line; what the tests gave."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.optax_contract", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", nargs="?", type=Path, help="of Optax; by default the tests of the installed one")
    parser.add_argument(
        "-k", dest="pattern", default="", metavar="REGEX", help="only tests in whose name this is found"
    )
    args = parser.parse_args(argv)
    root = args.checkout or Path(optax.__file__).parents[1]
    module = load(root / COMMON)
    loaded = unittest.defaultTestLoader.loadTestsFromTestCase(module.ContribTest)
    suite = unittest.TestSuite(test for test in loaded if re.search(args.pattern, str(test)))
    checks = module.test_utils
    with mock.patch.object(checks, "assert_trees_all_close", compare_keys(checks.assert_trees_all_close)):
        result = unittest.TextTestRunner(stream=sys.stdout).run(suite)
    failed = len(result.failures) + len(result.errors)
    print(f"\n{result.testsRun} of Optax's tests at sparsity 0, {len(result.skipped)} left out, {failed} failed.")
    for reason, count in collections.Counter(reason for _, reason in result.skipped).items():
        print(f"  left out: {count}, {reason}")
    print("  compared otherwise: typed PRNG keys in states by their data; Optax's comparison takes numbers alone")
    return result


if __name__ == "__main__":
    try:
        sys.exit(not main().wasSuccessful())
    except FileNotFoundError as error:
        sys.exit(f"error: {error}")
