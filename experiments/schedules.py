"""Draw the sparsity schedules of the library: python -m experiments.schedules [OUT.png]

OUT.png is results/sparsity_schedules.png if it is not given.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import jaxsparse

STAGES = 50
SCHEDULES = {
    "sigmoid_sparsity(0.98, 50, scale=5)": jaxsparse.sigmoid_sparsity(0.98, STAGES, scale=5),
    "sigmoid_sparsity(0.98, 50, scale=12)": jaxsparse.sigmoid_sparsity(0.98, STAGES, scale=12),
    "... scale=12, normalised=True": jaxsparse.sigmoid_sparsity(0.98, STAGES, scale=12, normalised=True),
    "two_phase_sparsity, sigmoids to 0.6 and by 0.38": jaxsparse.two_phase_sparsity(
        jaxsparse.sigmoid_sparsity(0.6, 20, scale=2), jaxsparse.sigmoid_sparsity(0.38, 30, scale=2.5), boundary=20
    ),
    "cubic_sparsity(0.98, 48)": jaxsparse.cubic_sparsity(0.98, STAGES - 2),
    "linear_sparsity(0.98, 50)": jaxsparse.linear_sparsity(0.98, STAGES),
    "constant_sparsity(0.98)": jaxsparse.constant_sparsity(0.98),
}


def main(argv: Sequence[str]) -> None:
    """The command line."""
    if any(argument.startswith("-") for argument in argv) or len(argv) > 1:
        sys.exit(__doc__.strip())
    out = Path(argv[0] if argv else "results/sparsity_schedules.png")
    try:
        jaxsparse.inspect.plot_schedules(SCHEDULES, STAGES).savefig(out)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"see {out}")


if __name__ == "__main__":
    main(sys.argv[1:])
