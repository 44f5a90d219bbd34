"""A progress bar where there is a terminal to draw on, and lines in the log."""

import logging
from typing import Any

__all__ = ["Progress"]

logger = logging.getLogger("jaxsparse")


class Progress:
    """Counts matrices as they are pruned: with tqdm, where it is installed and there is a terminal, and in the log.

    Args:
      total: how many there are.
      label: what goes on.
    """

    def __init__(self, total: int, label: str):
        self.total, self.label, self.done = total, label, 0
        self._bar: Any = None
        try:
            from tqdm import tqdm
        except ImportError:
            return
        self._bar = tqdm(total=total, desc=label, unit="matrix", dynamic_ncols=True, disable=None)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def tick(self, what: str, matrices: int) -> None:
        """Counts matrices that are done."""
        self.done += matrices
        logger.debug("%s: %s, %d of %d matrices", self.label, what, self.done, self.total)
        if self._bar is not None:
            self._bar.update(matrices)
