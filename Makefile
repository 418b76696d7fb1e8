# make sample         draw a grid of images into samples.png; installs only what sampling needs
# make test           every operation, engine and command, with or without a GPU; about eight
#                     minutes on two cores
# make test-all       in addition the oldest Triton, whole networks and long statistics; about
#                     twenty minutes, check and sample included
# make acceptance     tests in full size, and compile-check: hours
# make check          lint, format, types
# make bench          benchmark ddpm_fast and the baselines on this machine, within ten minutes:
#                     tables, JSON and figures in bench-results/
# make bench-update MACHINE=cpu-amd-zen4
#                     copy these results to bench/results and rewrite the documents' tables
# make gpu            tests, then timings, on a machine with a GPU, within eight minutes
# make compile-check  every launch of four networks for sm_80, sm_90 and sm_100, by both releases
#                     of Triton
# Packages are installed once into $(VENV): those of sampling by `make sample`, all others by the
# other targets. An installed torch is reused.
PYTHON ?= python3
VENV ?= .venv
WEIGHTS ?= weights/fashion-mnist-32
OLDEST_TRITON := 3.6.0
NEWEST_TRITON := 3.9.0

PY := $(VENV)/bin/python
PIP := $(PY) -m pip install -q --disable-pip-version-check
SAMPLING := $(VENV)/.sampling
INSTALLED := $(VENV)/.installed
# Packages of sampling: the dependencies and the extra cpu of pyproject.toml, without triton, which
# torch installs for a GPU; and the build backend, for an installation without build isolation.
NEEDED := "numpy>=1.26" "safetensors>=0.4" "pillow>=10.1" "tqdm>=4.60" "click>=8.2" "llvmlite>=0.44" "setuptools>=77"
# Each release of Triton is in a separate folder; the environment has the one that torch requires.
TRITONS := $(foreach v,$(OLDEST_TRITON) $(NEWEST_TRITON),$(VENV)/.triton-$(v))
OLDEST := PYTHONPATH="$(abspath $(VENV))/triton-$(OLDEST_TRITON)"
NEWEST := PYTHONPATH="$(abspath $(VENV))/triton-$(NEWEST_TRITON)"
IS_TRITON = -c 'import sys, triton; sys.exit(triton.__version__ != sys.argv[1] and "wrong Triton: " + triton.__version__)'

.PHONY: sample test test-all acceptance check bench bench-update bench-suites compile-check gpu clean

sample: $(SAMPLING)
	$(PY) -m ddpm_fast sample --weights $(WEIGHTS) --images 64 --solver ddim --steps 50 --out samples.png

# Two processes, each on one core. Triton's interpreter runs the kernels. All other tests, including
# compilation for GPUs, run in a second call, because a process reads TRITON_INTERPRET once. On a
# machine with a GPU the second call runs the kernels on it.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist worksteal -p no:benchmark
test: $(INSTALLED)
	TRITON_INTERPRET=1 $(PYTEST) -m kernel
	$(PYTEST)

# The oldest release of Triton, the most common one, runs all tests; the newest runs and compiles
# the kernels, without whole networks.
test-all: $(INSTALLED) $(TRITONS)
	$(PYTEST) --full -m "not compile"
	$(OLDEST) $(PY) $(IS_TRITON) $(OLDEST_TRITON)
	$(OLDEST) TRITON_INTERPRET=1 $(PYTEST) --full -m kernel
	$(OLDEST) $(PYTEST) --full -m compile
	$(NEWEST) $(PY) $(IS_TRITON) $(NEWEST_TRITON)
	$(NEWEST) TRITON_INTERPRET=1 $(PYTEST) -m kernel tests/kernels
	$(NEWEST) $(PYTEST) -m compile

acceptance: $(INSTALLED) compile-check
	$(OLDEST) TRITON_INTERPRET=1 $(PYTEST) --acceptance -m 'acceptance and kernel'
	$(PYTEST) --acceptance -m acceptance

bench: $(VENV)/.baselines
	$(PY) -m bench.run_all

# MACHINE is the CPU's vendor and microarchitecture, as in bench/results
bench-update: $(INSTALLED)
	$(if $(MACHINE),,$(error MACHINE is empty; give the name of the CPU such as MACHINE=cpu-amd-zen4))
	$(PY) -m bench.report --results bench-results --machine $(MACHINE)

# the parts on pytest-benchmark: BENCH="bench/bench_unet.py -k cifar10 --benchmark-json=FILE"
BENCH ?= bench/bench_kernels.py bench/bench_unet.py
bench-suites: $(VENV)/.baselines
	$(PY) -m pytest $(BENCH) --benchmark-sort=name --benchmark-columns=median,iqr,rounds

# the comparison skips baselines that cannot be installed, and prints the reason
$(VENV)/.baselines: $(INSTALLED)
	$(PIP) -c $(VENV)/constraints.txt -e '.[baselines]' || echo "some baselines cannot be installed here"
	touch $@

compile-check: $(INSTALLED) $(TRITONS)
	$(OLDEST) $(PY) -m bench.tools.compile_check
	$(NEWEST) $(PY) -m bench.tools.compile_check

# Python of the environment, or of the machine without one; nothing is installed
gpu:
	$(if $(wildcard $(PY)),$(PY),$(PYTHON)) -m bench.gpu

check: $(INSTALLED)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# If the machine's torch is new enough, the environment uses the machine's packages; otherwise torch
# is installed. Byte code is compiled at the first import, as only a third of torch is used.
$(SAMPLING): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, this is " + sys.version.split()[0])'
	@echo "creating $(VENV) ..."
	@$(PYTHON) -m venv --clear --system-site-packages $(VENV)
	@if $(PY) -c 'import torch; assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)' 2>/dev/null; then \
	  echo "using the installed torch"; grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt; \
	else \
	  sed -i 's/^include-system-site-packages.*/include-system-site-packages = false/' $(VENV)/pyvenv.cfg && cp constraints.txt $(VENV)/ && \
	  echo "installing torch, the largest part ..." && \
	  $(PY) -m pip install --disable-pip-version-check --no-compile -c constraints.txt torch; \
	fi
	@echo "installing numpy, llvmlite and the other packages of sampling ..."
	@$(PIP) --no-compile -c $(VENV)/constraints.txt $(NEEDED)
	@echo "installing ddpm_fast ..."
	@$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

$(INSTALLED): $(SAMPLING)
	@echo "installing the packages of tests, checks and benchmarks ..."
	@$(PIP) -c $(VENV)/constraints.txt -e '.[dev]'
	@touch $@

$(VENV)/.triton-%: $(INSTALLED)
	@echo "installing Triton $* ..."
	@rm -rf $(VENV)/triton-$*
	@$(PY) $(IS_TRITON) $* 2>/dev/null || $(PIP) --no-deps --target $(VENV)/triton-$* triton==$*
	@touch $@

clean:
	rm -rf $(VENV) samples.png
