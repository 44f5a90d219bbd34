"""Print finished runs side by side.

  python -m experiments.compare WORKDIR WORKDIR ...

A folder with several runs in it, such as that of --seeds, stands for all of them. The last column is the difference
from the test accuracy of the first run on the same data, in points; of texts from its loss, in nats a token.
"""

import argparse
import sys
from collections.abc import Sequence

from experiments.command_line import as_path
from experiments.results.compare import finished_runs


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workdirs", nargs="+", type=as_path, metavar="WORKDIR", help="folder of a run or of runs")
    try:
        print(finished_runs(parser.parse_args(argv).workdirs).text())
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
