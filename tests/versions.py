"""Run the test suite with every supported Python that is installed, and with each minor version of JAX.

python tests/versions.py [PYTEST ARGUMENT ...]

Each has an environment of its own in .venv/versions, with the newest packages that fit, and a .log of what was printed.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENVIRONMENTS = ROOT / ".venv" / "versions"
# The newest JAX for Python 3.11 is 0.10; that for the others is 0.12.
VERSIONS = (("3.11", "jax"), ("3.12", "jax>=0.11,<0.12"), ("3.12", "jax"), ("3.13", "jax"))


def find_python(version):
    """The interpreter of a version, on the PATH or among those of pyenv; None if there is none that runs."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for python in (f"python{version}", *sorted(pyenv.glob(f"{version}.*/bin/python"), reverse=True)):
        asked = [python, "-c", "import sys; print(*sys.version_info[:2], sep='.')"]
        try:
            found = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError):  # pyenv's python3.12 runs only where pyenv was told that one
            continue
        if found.strip() == version:
            return python
    return None


def run(python, environment, jax, arguments):
    """Install and test; what to say of it, and whether all passed."""
    inside, log = environment / "bin" / "python", environment.with_name(f"{environment.name}.log")
    install = [inside, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--upgrade"]
    ask = "import platform, jax; print(f'Python {platform.python_version()}, JAX {jax.__version__}')"
    test = [inside, "-m", "pytest", "-n", "2", "--dist", "worksteal", "-p", "no:cacheprovider", "-rfE", *arguments]
    started = time.monotonic()
    with log.open("w") as output:
        for command in ([python, "-m", "venv", environment], [*install, "--editable", ".[test]", jax]):
            if subprocess.run(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, check=False).returncode:
                return f"cannot be installed, see {log}", False
        name = subprocess.run([inside, "-c", ask], capture_output=True, text=True, check=True).stdout.strip()
        code = subprocess.run(test, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, check=False).returncode
    lines = log.read_text().splitlines()
    failed = [f"\n  {line}" for line in lines if re.match("(FAILED|ERROR) ", line)]
    minutes = (time.monotonic() - started) / 60
    told = lines[-1].strip("= ").partition(" in ")[0] if lines else "nothing ran"
    return f"{name}: {told}, {minutes:.1f} minutes{''.join(failed)}", code == 0


def main(arguments):
    """One line for each version."""
    ENVIRONMENTS.mkdir(parents=True, exist_ok=True)
    passed = []
    for version, jax in VERSIONS:
        python = find_python(version)
        if python is None:
            print(f"Python {version}: not found", flush=True)
            continue
        name = version if jax == "jax" else f"{version}-{re.sub('[^a-z0-9.]+', '-', jax)}"
        told, all_passed = run(python, ENVIRONMENTS / name, jax, arguments)
        print(told, flush=True)
        passed.append(all_passed)
    return 0 if passed and all(passed) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
