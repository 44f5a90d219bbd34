"""The terminal: misspelt config keys get a message instead of a traceback, libraries are quiet, bars show progress."""

import argparse
import difflib
import sys
from collections.abc import Iterator
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict
from tqdm import tqdm


def parse_flags(argv: list[str]) -> list[str]:
    """absl's parser of flags, for ``app.run(main, flags_parser=parse_flags)`` where there is a flag ``--config``.

    Ends the program with a message if the config file cannot be read, or does not have a key that is to be changed; the
    message then names the nearest key and all others. Unless ``--verbosity`` is given, only warnings are logged: at
    absl's own default JAX and matplotlib have much to say.

    Args:
      argv: the program's name and its arguments.

    Returns:
      What is left of them without the flags.
    """
    try:
        rest = app.parse_flags_with_usage(argv)
    except OSError as error:
        sys.exit(f"error: {error}")
    except (AttributeError, KeyError):  # what ml_collections raises for a key that is not there
        parser = argparse.ArgumentParser(allow_abbrev=False)
        parser.add_argument("--config")
        keys = list(_keys(flags.FLAGS["config"].parser.parse(parser.parse_known_args(argv)[0].config)))
        changed = [arg.removeprefix("--config.").partition("=")[0] for arg in argv if arg.startswith("--config.")]
        unknown = [key for key in changed if key not in keys]
        if not unknown:
            raise
        nearest = difflib.get_close_matches(unknown[0], keys, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        sys.exit(f"error: the config has no key {unknown[0]!r}{hint}\nIts keys are {', '.join(keys)}")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    return rest


def progress_bar(total: int, label: str | None = None, unit: str = "step", **options: Any) -> tqdm:
    """A bar with speed and time left; ``options`` are tqdm's."""
    # Without a terminal to draw on every refresh adds to the log: then only a few of them.
    interval = 0.1 if sys.stderr.isatty() else 30
    return tqdm(total=total, desc=label, unit=unit, mininterval=interval, dynamic_ncols=True, **options)


def _keys(config: ConfigDict, prefix: str = "") -> Iterator[str]:
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from _keys(value, f"{prefix}{key}.")
        else:
            yield prefix + key
