"""List the contents of sparse model files: ``python -m jaxsparse.artifacts FILE ...``."""

import argparse
import sys
from collections.abc import Sequence

from jaxsparse.artifacts import ArtifactError, describe


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxsparse.artifacts", description="List the contents of files written by jaxsparse.save_sparse."
    )
    parser.add_argument("files", nargs="+", metavar="FILE")
    try:
        for i, file in enumerate(parser.parse_args(argv).files):
            print(f"{chr(10) if i else ''}{file}\n{describe(file)}")
    except (ArtifactError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
