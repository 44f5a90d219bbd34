# Each target sets up all it needs: a virtual environment in .venv, with Python 3.11 or newer and the package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONFIG := configs/digits_sparse_momentum.py
PART := 1/1

.PHONY: help train test test-all test-versions test-optax test-interop soak notebooks docs lint release clean

help:
	@echo "make train      train sparse momentum at 90% sparsity on digits, and a dense baseline, and compare"
	@echo "make test       run the test suite, but for its slow tests"
	@echo "make test-all   run the slow tests (PART=1/2: a half of them)"
	@echo "make test-versions  make test with every Python from 3.11 to 3.13 that is here, and with each JAX"
	@echo "make test-optax run Optax's own tests over our links (OPTAX=CHECKOUT: those of another Optax)"
	@echo "make test-interop  round trips with transformers and torch, which go into an environment of their own, 6 GB"
	@echo "make soak       try for hours to lose something: kill runs, fill the disk, read hostile files"
	@echo "make notebooks  execute the notebooks and write their outputs back"
	@echo "make docs       build the documentation, into build/docs/index.html"
	@echo "make lint       ruff, mypy, and a wheel that installs and imports"
	@echo "make release    build dist/, check it, and run the README's code with the wheel in an empty environment"
	@echo "make clean      remove the virtual environment and build leftovers (not runs/)"

train: $(VENV)/train.installed
	$(BIN)/python -m experiments.train --config=$(CONFIG) --workdir=runs/digits_dense --config.dense
	$(BIN)/python -m experiments.train --config=$(CONFIG) --workdir=runs/digits_sparse
	$(BIN)/python -m experiments.compare runs/digits_dense runs/digits_sparse

test: $(VENV)/test.installed $(VENV)/tpu.compiler
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations=10

test-all: $(VENV)/test.installed $(VENV)/tpu.compiler
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations=10 -m slow --part=$(PART)

test-versions:
	$(PYTHON) tests/versions.py

test-optax: $(VENV)/test.installed
	$(BIN)/python -m tests.optax_contract $(OPTAX)

test-interop: $(VENV)/interop.installed
	$(VENV)/interop/bin/python -m pytest tests/interop

# Goes on where it was ended.
soak: $(VENV)/test.installed
	$(BIN)/python -m tests.soak

notebooks: $(VENV)/notebooks.installed
	$(BIN)/python -m notebooks.run

docs: $(VENV)/docs.installed
	$(BIN)/python -m sphinx -W --keep-going -n -j auto -b html docs build/docs

lint: $(VENV)/dev.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	rm -rf build dist
	$(BIN)/python -m build --wheel --outdir dist
	$(PYTHON) -m venv --clear build/wheel
	build/wheel/bin/python -m pip install --quiet dist/*.whl
	cd build/wheel && bin/python -c "import jaxsparse; print('jaxsparse', jaxsparse.__version__, 'imports from its wheel')"

release: $(VENV)/release.installed
	$(BIN)/python tests/release.py

# Made anew when what it installs has changed.
$(VENV)/%.installed: pyproject.toml setup.py
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'jaxsparse needs Python 3.11 or newer, $(PYTHON) is ' + sys.version.split()[0] + '; try: make PYTHON=python3.12 ...')"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[$*]"
	touch $@

# torch and transformers want their own versions of what others use too.
$(VENV)/interop.installed: pyproject.toml setup.py
	test -x $(VENV)/interop/bin/python || $(PYTHON) -m venv $(VENV)/interop
	$(VENV)/interop/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[interop]"
	touch $@

# TPU kernels are compiled in the tests, which needs no TPU. Not into site-packages, where every JAX program would look
# for one. Where there is no libtpu (it is for Linux on x86-64) these tests are skipped.
$(VENV)/tpu.compiler: $(VENV)/test.installed
	rm -rf $(VENV)/tpu
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(VENV)/tpu "$$($(BIN)/python -c "import importlib.metadata as m; print(next(r.split(';')[0] for r in m.requires('jax') if r.startswith('libtpu')))")"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
