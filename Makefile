# make sample   draws a grid of images into samples.png
# make test     proves the tree right
# make check    lint, format, types          make proof   the long proofs
# Everything is installed once into $(VENV); a torch that the machine already has is used as it is.
PYTHON ?= python3
VENV ?= .venv
WEIGHTS ?= weights/fashion-mnist-32
OLDEST_TRITON := 3.6.0
NEWEST_TRITON := 3.9.0

PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
OLDEST := PYTHONPATH=$(CURDIR)/$(VENV)/triton-$(OLDEST_TRITON)
HAS_TORCH = $(PYTHON) -c 'import torch; assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)' 2>/dev/null

.PHONY: sample test check proof clean

sample: $(INSTALLED)
	$(PY) -m ddpm_fast sample --weights $(WEIGHTS) --images 64 --solver ddim --steps 50 --out samples.png

# The kernels run by Triton's interpreter under the oldest and the newest release that is supported, everything else once.
test: $(INSTALLED)
	$(OLDEST) TRITON_INTERPRET=1 $(PY) -m pytest -q -m kernel
	TRITON_INTERPRET=1 $(PY) -m pytest -q -m kernel
	$(OLDEST) $(PY) -m pytest -q -m compile
	$(PY) -m pytest -q -m "not kernel"

proof: $(INSTALLED)
	$(PY) -m pytest -q --proof -m proof

check: $(INSTALLED)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# torch first: builds for a GPU bring the Triton they need, builds for a CPU bring none
$(INSTALLED): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, this is " + sys.version.split()[0])'
	@if $(HAS_TORCH); then echo "using the torch of $$($(PYTHON) -c 'import sys; print(sys.prefix)')"; fi
	$(PYTHON) -m venv --clear $$($(HAS_TORCH) && echo --system-site-packages) $(VENV)
	$(HAS_TORCH) || $(PY) -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(PY) -c 'import triton' 2>/dev/null || $(PY) -m pip install -q --disable-pip-version-check triton==$(NEWEST_TRITON)
	$(HAS_TORCH) && grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt || cp constraints.txt $(VENV)/constraints.txt
	$(PY) -m pip install -q --disable-pip-version-check -c $(VENV)/constraints.txt -e '.[dev]'
	$(PY) -m pip install -q --disable-pip-version-check --no-deps --target $(VENV)/triton-$(OLDEST_TRITON) triton==$(OLDEST_TRITON)
	touch $@

clean:
	rm -rf $(VENV) samples.png
