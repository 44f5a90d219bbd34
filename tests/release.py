"""Build the release in dist/ and try it: python tests/release.py, or make release.

What is in the wheel and in the source distribution, what twine says of them, whether all extras can be installed, and
whether every block of Python in the README runs in an environment that has the wheel alone.
"""

import re
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LARGE = {"interop"}  # 6 GB: make test-interop


def run(*command, cwd=ROOT):
    """What a command prints; it ends all if it fails."""
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def check_versions():
    """The version, which the changelog and the citation have too."""
    version = re.search(r'__version__ = "(.*)"', (ROOT / "jaxsparse" / "_version.py").read_text())[1]
    newest = re.search(r"^## (\d\S*) - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    for name, found in (("CHANGELOG.md", newest), ("CITATION.cff", cited)):
        if found is None or found[1] != version:
            sys.exit(f"{name} has the version {found and found[1]}, jaxsparse {version}")
    return version


def check_contents(wheel, source, version):
    """The wheel has the library, and the source distribution all committed files."""
    committed = set()
    for path in map(ROOT.joinpath, run("git", "ls-files").split()):
        files = path.rglob("*") if path.is_symlink() else [path]  # archives have copies
        committed |= {file.relative_to(ROOT).as_posix() for file in files if file.is_file()}
    library = {path for path in committed if path.startswith("jaxsparse/")}
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    with tarfile.open(source) as archive:
        files = {member.name.removeprefix(f"jaxsparse-{version}/") for member in archive if member.isfile()}
    made = {"PKG-INFO", "setup.cfg"} | {name for name in files if name.startswith("jaxsparse.egg-info/")}
    for path, has, expected in ((wheel, held, library), (source, files - made, committed)):
        if has != expected:
            sys.exit(f"{path.name} lacks {sorted(expected - has)}, and has beside it {sorted(has - expected)}")
        print(f"{path.name}: {len(has)} files, {path.stat().st_size / 1e6:.1f} MB")


def check_extras(python, wheel):
    """That pip finds all that an extra asks for."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"].keys()
    for extra in sorted(extras - LARGE):
        run(python, "-m", "pip", "install", "--quiet", "--dry-run", f"{wheel}[{extra}]")
    print(f"extras: {', '.join(sorted(extras - LARGE))} can be installed")


def main():
    """Print a line for everything that was found to be right."""
    version = check_versions()
    for old in (ROOT / "dist").glob("jaxsparse-*"):
        old.unlink()
    run(sys.executable, "-m", "build", "--outdir", "dist")
    (wheel,), (source,) = (list((ROOT / "dist").glob(f"jaxsparse-{version}{end}")) for end in ("-*.whl", ".tar.gz"))
    check_contents(wheel, source, version)
    run(sys.executable, "-m", "twine", "check", "--strict", wheel, source)
    print("twine check --strict: both passed")

    with tempfile.TemporaryDirectory() as folder:
        python = Path(folder) / "venv" / "bin" / "python"
        run(sys.executable, "-m", "venv", Path(folder) / "venv")
        check_extras(python, wheel)
        run(python, "-m", "pip", "install", "--quiet", wheel)
        found = run(python, "-c", "import jaxsparse; print(jaxsparse.__version__, jaxsparse.__file__)", cwd=folder)
        if not found.startswith(f"{version} {folder}"):
            sys.exit(f"{version} was installed into {folder}, but {found.strip()} was imported")
        run(python, "-m", "pip", "install", "--quiet", f"{wheel}[train]")
        blocks = BLOCK.findall((ROOT / "README.md").read_text())
        for number, block in enumerate(blocks, 1):
            said = run(python, "-c", block, cwd=folder).strip()
            print(f"block {number} of {len(blocks)} of the README: {said or 'runs'}")


if __name__ == "__main__":
    main()
