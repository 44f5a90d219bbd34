"""Execute notebooks and write their outputs back.

  python -m notebooks.run [NAME ...]

A NAME is a notebook or the beginning of one's name ("01"); without any all are run. Each runs in a fresh kernel of this
interpreter, on the CPU. One that fails is left as it was. What differs from machine to machine is not written, so that
running a notebook again changes little in it.
"""

import os
import re
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import nbformat
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

FOLDER = Path(__file__).resolve().parent
FAILURES = (CellExecutionError, CellTimeoutError, DeadKernelError)
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
_TAG = re.compile(r"<[^>]*>")
_ADDRESS = re.compile(r"\b0x[0-9a-f]{6,}\b")
_FLOAT = re.compile(r"\d\.\d|\d%|\de[-+]?\d|\b(?:nan|inf)\b")
_NUMBER = re.compile(r"[-+]?\d[\d,_]*(?:\.\d*)?(?:e[-+]?\d+)?")


class Kernel(AsyncKernelManager):
    """Starts kernels of this interpreter, whatever kernels are installed.

    Args:
      folder: where the kernel has its files: on sockets in there, for no other can take these as it could take a port.
    """

    def __init__(self, folder: str):
        sockets = {} if sys.platform == "win32" else {"transport": "ipc", "ip": f"{folder}/socket"}
        super().__init__(connection_file=f"{folder}/kernel.json", **sockets)

    @property
    def kernel_spec(self) -> KernelSpec:
        """ipykernel in this interpreter."""
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=command, display_name="Python 3", language="python")


def notebooks(names: Sequence[str] = ()) -> list[Path]:
    """The notebooks that names stand for, all without any; raises a ValueError for a name that is of none."""
    paths = sorted(FOLDER.glob("*.ipynb"))
    unknown = [name for name in names if not any(path.name.startswith(Path(name).name) for path in paths)]
    if unknown:
        raise ValueError(f"no notebook is called {unknown[0]}; there are {', '.join(path.name for path in paths)}")
    return [path for path in paths if not names or any(path.name.startswith(Path(name).name) for name in names)]


def execute(path: Path, folder: Path, env: Mapping[str, str] = os.environ, timeout: int = 300) -> nbformat.NotebookNode:
    """Runs every cell of a notebook in a fresh kernel.

    Args:
      path: the notebook. It is not changed.
      folder: the working directory.
      env: the environment. ``JAX_PLATFORMS`` is cpu unless it is in there.
      timeout: how many seconds a cell may take.

    Returns:
      The notebook with its outputs, as :func:`clean` leaves it.

    Raises:
      CellExecutionError, CellTimeoutError, DeadKernelError: if a cell fails, takes too long, or ends the kernel.
    """
    notebook = nbformat.read(path, as_version=4)
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    with tempfile.TemporaryDirectory() as settings:  # not those of the user's IPython
        own = {"JAX_PLATFORMS": "cpu", **env, "IPYTHONDIR": settings, "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
        own.pop("MPLBACKEND", None)
        client = NotebookClient(notebook, Kernel(settings), timeout=timeout, record_timing=False)
        client.execute(env=own, cwd=str(folder), cleanup_kc=True)
    return clean(notebook)


def clean(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Takes out what differs from machine to machine and from run to run: kernel, timestamps, addresses, paths."""
    notebook = nbformat.from_dict(notebook)
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        tags = cell.metadata.get("tags")
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
    for cell in code_cells(notebook):
        merged: list = []
        for output in cell.outputs:
            if output.output_type == "stream" and merged and merged[-1].get("name") == output.name:
                merged[-1].text += output.text
                continue
            merged.append(output)
        cell.outputs = merged
        for output in cell.outputs:
            if output.output_type == "stream":
                output.text = _plain(output.text)
            elif "data" in output:
                output.metadata = nbformat.from_dict({})
                for kind, value in output.data.items():
                    if kind.startswith("text/") and isinstance(value, str):
                        output.data[kind] = _plain(value)
    return notebook


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """The cells with code in them."""
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def texts(cell: nbformat.NotebookNode) -> list[tuple[str, str]]:
    """What a cell shows, for comparison with another run: the kind of each output, and its text.

    A text without floating-point numbers is as it is. In one that has any, every number is replaced by 0: those of
    trained weights are not the same everywhere. Then neither are the widths of columns, so spaces and rules are
    shortened. Of HTML the text counts; of pages with scripts and of pictures nothing does, nor of cells with the tag
    "varies".
    """
    shown = []
    for output in cell.outputs:
        if output.output_type == "stream":
            kind, text = output.name, output.text
        else:
            data = output.get("data", {})
            kind, text = "+".join(sorted(data)), data.get("text/plain", "")
            if page := data.get("text/html"):
                text = "" if "<script" in page else _TAG.sub(" ", page)
        if _FLOAT.search(text):
            text = re.sub(r"[-=]{2,}", "--", re.sub(r"\s+", " ", _NUMBER.sub("0", text)))
        if "varies" in cell.metadata.get("tags", []):
            text = ""
        shown.append((kind, text.strip()))
    return shown


def _plain(text: str) -> str:
    folders = {
        Path.home(): "~",
        Path(tempfile.gettempdir()): "tmp",
        Path(sys.prefix): "python",
        FOLDER.parent: "jaxsparse",
    }
    for folder in sorted(folders, key=lambda folder: len(folder.parts), reverse=True):
        if len(folder.parts) > 1:
            text = re.sub(rf"(?<![\w.]){re.escape(str(folder))}(?=/)", folders[folder], text)
    return _ADDRESS.sub("0x", text)


def main(names: Sequence[str]) -> None:
    """Runs and writes the notebooks; raises SystemExit if one fails."""
    failed = []
    for path in notebooks(names):
        start = time.monotonic()
        print(f"{path.name} ...", end=" ", flush=True)
        try:
            done = execute(path, FOLDER)
        except FAILURES as error:
            print(f"failed\n{error}", flush=True)
            failed.append(path.name)
            continue
        new = path.with_suffix(".new")
        nbformat.write(done, new)
        os.replace(new, path)
        print(f"{time.monotonic() - start:.1f} s", flush=True)
    if failed:
        sys.exit(f"error: {len(failed)} failed: {', '.join(failed)}")


if __name__ == "__main__":
    if any(name.startswith("-") for name in sys.argv[1:]):
        sys.exit(__doc__.strip())
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"error: {error}")
