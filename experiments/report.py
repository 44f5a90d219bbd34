"""Compare runs on one page: curves, tables, masks and what differs between their configurations.

  python -m experiments.report runs/digits_dense runs/digits_sparse              # writes report.html
  python -m experiments.report runs/mnist --out=mnist.html --title="MNIST, 5%"   # all runs in the folder
  python -m experiments.report --serve runs                                      # live, while they go on

The page is one file that loads nothing else, and follows the light or dark scheme of the browser. Differences in
accuracy are from the first run on the same data. Runs need not be finished. With --serve nothing is written: a server
for this machine alone has the page, which follows the runs and finds new ones until Ctrl-C.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from experiments.command_line import as_path
from experiments.results import live, page
from experiments.results.collect import find_runs, read_run, short_names

PORT = 8000


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workdirs", nargs="+", type=as_path, metavar="WORKDIR", help="folder of a run or of runs")
    parser.add_argument("--out", type=as_path, help="the file to write (report.html)")
    parser.add_argument("--serve", action="store_true", help="serve a live page instead of writing a file")
    parser.add_argument("--port", type=int, help=f"of the live page ({PORT}); 0 takes a free one")
    parser.add_argument("--title", default="Sparse training runs", help="of the page (%(default)s)")
    args = parser.parse_args(argv)
    if args.serve and args.out is not None:
        parser.error("--out has no effect with --serve, which writes no file")
    if not args.serve and args.port is not None:
        parser.error("--port has no effect without --serve")
    out = args.out or Path("report.html")
    try:
        if args.serve:
            return live.serve(args.workdirs, args.title, PORT if args.port is None else args.port)
        paths = find_runs(args.workdirs)
        bar = {"disable": not sys.stderr.isatty(), "leave": False}
        named = list(zip(paths, short_names(paths), strict=True))
        runs = [read_run(path, name) for path, name in tqdm(named, "reading", **bar)]
        text = page.report(runs, args.title, lambda runs: tqdm(runs, "drawing", **bar))
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{len(runs)} run{'s' * (len(runs) != 1)}; see {out}")


if __name__ == "__main__":
    main()
