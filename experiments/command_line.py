"""The terminal: misspelt config keys get a message instead of a traceback, libraries are quiet, bars show progress."""

import argparse
import difflib
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict
from tqdm import tqdm

EMPTY = "is empty; is a variable of the shell not set?"


def parse_flags(argv: list[str]) -> list[str]:
    """absl's parser of flags, for ``app.run(main, flags_parser=parse_flags)`` where there is a flag ``--config``.

    Ends the program with a message if the config file cannot be read or does not take its argument, if it lacks a key
    that is to be changed (the message then names the nearest key and all others), and if a flag is empty. Unless
    ``--verbosity`` is given, only warnings are logged: at absl's own default JAX and matplotlib have much to say.

    Args:
      argv: the program's name and its arguments.

    Returns:
      What is left of them without the flags.
    """
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--config")
    config = parser.parse_known_args(argv)[0].config
    keys = {} if config is None else dict(_items(read_config(config)))
    try:
        rest = app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError, TypeError):  # what ml_collections raises for a key that is not there
        changed = [arg.removeprefix("--config.").partition("=")[0] for arg in argv if arg.startswith("--config.")]
        unknown = [key for key in changed if key not in keys]
        if not unknown:
            raise
        if whole := [key for key, value in keys.items() if isinstance(value, str) and unknown[0].startswith(f"{key}.")]:
            sys.exit(
                f"error: config.{whole[0]} is {keys[whole[0]]!r}, which has no keys: give all that is to take its "
                f"""place, as in --config.{whole[0]}='{{"name": ...}}'"""
            )
        nearest = difflib.get_close_matches(unknown[0], keys, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        sys.exit(f"error: the config has no key {unknown[0]!r}{hint}\nIts keys are {', '.join(keys)}")
    for name in flags.FLAGS:
        if flags.FLAGS[name].present and flags.FLAGS[name].value in ("", []):
            sys.exit(f"error: --{name} {EMPTY}")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    return rest


def read_config(config: str) -> ConfigDict:
    """Reads the config of FILE or FILE:ARGUMENT; ends the program with a message if there is none."""
    file = config.partition(":")[0]
    if not file:
        sys.exit(f"error: --config {EMPTY}")
    try:
        Path(file).read_bytes()
        return flags.FLAGS["config"].parser.parse(config)
    except OSError as error:
        sys.exit(f"error: --config: {error}")
    except ValueError as error:  # with a traceback in its text
        sys.exit(f"error: --config={config}: {str(error).strip().splitlines()[-1].removeprefix('ValueError: ')}")
    except AttributeError as error:
        if "get_config" not in str(error):
            raise
        sys.exit(f"error: --config: {file!r} has no function get_config")
    except TypeError as error:
        if "get_config()" not in str(error):
            raise
        sys.exit(f"error: --config={config}: {file!r} {'takes no' if ':' in config else 'needs an'} argument")


def not_empty(text: str) -> str:
    """An argument of the command line that is not empty, for ``type=`` of argparse: unset variables are empty."""
    if not text:
        raise argparse.ArgumentTypeError(EMPTY)
    return text


def as_path(text: str) -> Path:
    """A path on the command line, which :func:`not_empty` has checked."""
    return Path(not_empty(text))


def imported(name: str, told: str) -> Callable[..., Any]:
    """The function MODULE:FUNCTION of a module in the current folder or on PYTHONPATH.

    Args:
      name: of the function, such as "my_data:load".
      told: what it was given as, for messages.

    Raises:
      ValueError: if there is no such module or function. What the module itself raises is raised.
    """
    module, _, function = name.partition(":")
    if not (module and function) or module.startswith((".", "/")):
        raise ValueError(f"{told}={name!r} is not MODULE:FUNCTION, such as 'my_data:load'")
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # of what the module imports
        raise ValueError(f"{told}={name!r}: there is no module {module!r} in this folder or on PYTHONPATH") from None
    if not callable(function := getattr(found, function, None)):
        raise ValueError(f"{told}={name!r}: the module has no such function")
    return function


def progress_bar(total: int, label: str | None = None, unit: str = "step", **options: Any) -> tqdm:
    """A bar with speed and time left; ``options`` are tqdm's."""
    # Without a terminal to draw on every refresh adds to the log: then only a few of them.
    interval = 0.1 if sys.stderr.isatty() else 30
    return tqdm(total=total, desc=label, unit=unit, mininterval=interval, dynamic_ncols=True, **options)


def _items(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from _items(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
