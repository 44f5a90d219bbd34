"""Compare runs on one page: curves, tables, masks and what differs between their configurations.

  python -m experiments.report runs/digits_dense runs/digits_sparse              # writes report.html
  python -m experiments.report runs/mnist --out=mnist.html --title="MNIST, 5%"   # all runs in the folder

The page is one file that loads nothing else, and follows the light or dark scheme of the browser. Differences in
accuracy are from the first run on the same data. Runs need not be finished.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from experiments.command_line import as_path
from experiments.results import page
from experiments.results.collect import find_runs, read_run, short_names


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workdirs", nargs="+", type=as_path, metavar="WORKDIR", help="folder of a run or of runs")
    parser.add_argument("--out", type=as_path, default=Path("report.html"), help="the file to write (%(default)s)")
    parser.add_argument("--title", default="Sparse training runs", help="of the page (%(default)s)")
    args = parser.parse_args(argv)
    try:
        paths = find_runs(args.workdirs)
        bar = {"disable": not sys.stderr.isatty(), "leave": False}
        named = list(zip(paths, short_names(paths), strict=True))
        runs = [read_run(path, name) for path, name in tqdm(named, "reading", **bar)]
        text = page.report(runs, args.title, lambda runs: tqdm(runs, "drawing", **bar))
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text, encoding="utf-8")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{len(runs)} run{'s' * (len(runs) != 1)}; see {args.out}")


if __name__ == "__main__":
    main()
