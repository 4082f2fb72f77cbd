# make test, make bench, make demo, make lint, make docs: on a fresh machine with Python, a C++ compiler and a package
# index each of them first makes an environment in .venv.
#
#   make test ARGS="-k focal -x"          arguments for pytest; likewise for bench
#   make test PYTHON=python3 VENV=        that interpreter as it is: nothing is installed, the kernels are built in place

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

# Pinned: any newer one would do, but `torch>=2.11` may pull a build of several GB where this one is at hand. On Linux
# PyPI's wheel is the CUDA build, which runs on a CPU too; for the small CPU build set
# PIP_EXTRA_INDEX_URL to PyTorch's own index of those.
TORCH := torch==2.13.0
# The oldest that is supported, and a numpy that goes with its Triton: for make test-versions.
VERSIONS ?= torch==2.11.0 numpy==2.2.6

ifeq ($(strip $(VENV)),)
PY := $(PYTHON)
READY :=
else
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
endif

# The checkout, also for the scripts in examples/ and for an interpreter into which nothing is installed.
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

# Where there is an nvcc the tests look at the CUDA kernels also beside a torch that has no CUDA; one target is enough.
export MLKERNELS_CUDA ?= $(if $(shell command -v nvcc),1)
export MLKERNELS_CUDA_ARCHS ?= 90

# Of one version, pinned in pyproject.toml: others format otherwise. csrc/build.py writes those that are left out.
CLANG_FORMAT = $(PY) -c "from clang_format import clang_format; clang_format()"
CPP = $(filter-out csrc/numbering.h csrc/schemas.h, $(wildcard $(foreach d, csrc csrc/* tools/*/ tools/*/*, $(d)/*.h $(d)/*.cpp $(d)/*.cu)))

.PHONY: test test-versions bench demo lint docs format build wheel clean sanitize

test: build
	$(PY) -m pytest -n auto --dist worksteal $(RECORD) $(ARGS)

# With other versions, in an environment of their own that is kept, and in a copy: the checkout's libraries stay as they are.
# A run that is cut off has kept how each test ended; ARGS=--resume goes on from there.
OTHER = build/$(subst ==,-,$(firstword $(VERSIONS)))-$(shell $(PYTHON) -c 'import sys; print(sys.implementation.cache_tag)')
test-versions:
	mkdir -p $(OTHER)/checkout
	find $(OTHER)/checkout -mindepth 1 -maxdepth 1 ! -name build -exec rm -rf {} +
	tar -c --exclude=./.git --exclude=./.venv --exclude=./build --exclude='*.so' --exclude='*.egg-info' . | tar -x -C $(OTHER)/checkout
	$(MAKE) -C $(OTHER)/checkout test TORCH="$(VERSIONS)" VENV=../venv RECORD="-p tools.outcomes --outcomes=../outcomes.txt"

bench: build
	$(PY) -m bench $(ARGS)

demo: build
	set -e; for script in examples/[a-z]*.py; do echo "== $$script"; $(PY) $$script; done

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(CLANG_FORMAT) --dry-run --Werror $(CPP)
	$(PY) tools/lengths.py

# Into docs/_build/index.html. Warnings are errors: a link or a reference that leads nowhere is one. With VENV= the
# interpreter must have what the extra "docs" names.
docs: build $(if $(READY),$(VENV)/.docs)
	$(PY) -m sphinx -W --keep-going -q -b html docs docs/_build

format: $(READY)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(CLANG_FORMAT) -i $(CPP)

# Always asked, and done in no time where nothing changed; where it cannot be done it says so and exits with 0.
build: $(READY)
	$(PY) csrc/build.py --simt

# The installation is editable, so the environment is made again only when the dependencies may have changed.
$(VENV)/.ready: pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install $(TORCH) "setuptools>=77" ninja
	$(PY) -m pip install --no-build-isolation -e ".[dev]"
	touch $@

$(VENV)/.docs: $(READY) pyproject.toml
	$(PY) -m pip install --no-build-isolation -e ".[docs]"
	touch $@

$(VENV)/.release: $(READY) pyproject.toml
	$(PY) -m pip install --no-build-isolation -e ".[release]"
	touch $@

# What is published, in dist/: the source, and a wheel made of that source alone, for every torch from 2.11 on and every
# Python from 3.10 on. auditwheel names the oldest glibc it runs with: that of this machine's compiler, so release on an old one.
wheel: $(if $(READY),$(VENV)/.release)
	rm -rf dist
	MLKERNELS_FAST_PATH=0 $(PY) -m build --no-isolation --outdir dist/local
	mv dist/local/*.tar.gz dist
	PATH="$(dir $(PY)):$$PATH" $(PY) -m auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' -w dist dist/local/*.whl
	rm -r dist/local
	$(PY) -m twine check --strict dist/*

# The compiled operators under gcc's sanitizers, in memory of their own: tests, then malformed calls. Then the ordinary
# libraries again. Python itself is not built for them, so they are loaded first; what it leaves at its end is no leak.
SANITIZED := test_buffers test_linear test_pairs test_layouts test_conventions test_autograd test_values
sanitize: $(READY)
	MLKERNELS_CUDA=0 MLKERNELS_SANITIZE=address,undefined $(PY) csrc/build.py
	export LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1; \
	$(PY) -m pytest -k "cpu or buffers or pairs" $(SANITIZED:%=tests/%.py) $(ARGS) && \
	  $(PY) -m tools.fuzz_operators --calls 1e4; status=$$?; unset LD_PRELOAD; \
	$(PY) csrc/build.py; exit $$status

clean:
	rm -rf build dist docs/_build *.egg-info mlkernels/*.so mlkernels/*.error.txt
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis bench/out examples/out
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
