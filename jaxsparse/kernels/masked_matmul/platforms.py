"""An error for kernels that are compiled for the wrong platform.

It is raised when a program is lowered, not when it is traced, so that kernels can be compiled ahead of time for a
device that is not present.
"""

import jax
from jax.extend.core import Primitive
from jax.interpreters import mlir

__all__ = ["only_on"]

_REASONS = {
    "tpu": "it is a kernel for TPUs; elsewhere choose None, 'xla' or 'xla_blocks', or 'interpret' to test it",
    "cuda": "it is a kernel for NVIDIA GPUs (Hopper); elsewhere choose None, 'xla' or 'xla_blocks'",
}

_only_on = Primitive("jaxsparse_only_on")
_only_on.def_abstract_eval(lambda x, **_: x)


def only_on(platform: str, implementation: str, x: jax.Array, why: str | None = None) -> jax.Array:
    """Return ``x``, and raise a ValueError when compiled for any other platform, where the kernel cannot run.

    Args:
      platform: "tpu" or "cuda".
      implementation: the name that the user chose, for the message.
      x: an operand of the kernel.
      why: what the kernel is for and what to choose elsewhere, for the message; None: what holds for this product.
    """
    return _only_on.bind(x, platform=platform, implementation=implementation, why=why or _REASONS[platform])


def _refuse(ctx, x, *, platform, implementation, why):
    here = ", ".join(ctx.module_context.platforms)
    if here != platform:
        raise ValueError(f"implementation={implementation!r} cannot run on {here}: {why}")
    return [x]


mlir.register_lowering(_only_on, _refuse)
