# make demo: pool a pretrained ViT on real photos.   make test: the tests.   Both start from nothing but python3 and a
# C++ compiler.   make test-all: also the GPU kernels, in a simulator and in Triton's interpreter.   make lint.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
PY := $(VENV)/bin/python
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/* csrc/cuda/* csrc/build_cuda.py csrc/build_backend.py)

PARALLEL ?= -n 2 --dist loadfile
SLOW := $(addprefix tests/test_,cuda_simulator.py triton_interpret.py triton_compile.py)

.PHONY: build demo test test-gpu-kernels test-all fuzz sanitize aarch64 lint docs bench clean

build: $(VENV)/built

$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check $(TORCH) numpy "setuptools>=77"
	touch $@

$(VENV)/built: $(VENV)/torch $(SOURCES)
	$(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	touch $@

# TORCH stands in each line so that no extra replaces the pinned build.
$(VENV)/demo: $(VENV)/torch pyproject.toml
	$(PY) -m pip install --quiet --disable-pip-version-check $(TORCH) $$($(PY) -c "import tomllib; print(*(r.split(';')[0].replace(' ', '') for r in tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['demo']))")
	touch $@

$(VENV)/test: $(VENV)/demo
	$(PY) -m pip install --quiet --disable-pip-version-check $(TORCH) $$($(PY) -c "import tomllib; print(*(r.split(';')[0].replace(' ', '') for extra in ('test', 'triton', 'bench') for r in tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies'][extra]))")
	touch $@

demo: $(VENV)/built $(VENV)/demo
	$(PY) -m tokenpool_ext demo

test: $(VENV)/built $(VENV)/test
	OMP_NUM_THREADS=1 $(PY) -m pytest --require=cpu $(PARALLEL) $(addprefix --ignore=,$(SLOW))

test-gpu-kernels: $(VENV)/built $(VENV)/test
	$(PY) -m pytest --require=cpu $(PARALLEL) $(SLOW)

test-all: test test-gpu-kernels

# Every public function with hostile arguments; tests/test_fuzz.py runs a few hundred of the cases.
fuzz: $(VENV)/built $(VENV)/test
	$(PY) tests/fuzz.py --cases 10000

# The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer.
sanitize: $(VENV)/test
	tests/sanitize.sh $(PY)

# The CPU kernels on an emulated arm64 processor: apt-get install g++-aarch64-linux-gnu qemu-user.
aarch64:
	tests/aarch64.sh

# Versions are pinned: a formatter's next release must not change what passes.
$(VENV)/lint:
	$(PYTHON) -m venv $(VENV)/tools
	$(VENV)/tools/bin/python -m pip install --quiet --disable-pip-version-check ruff==0.17.6 clang-format==23.1.5 mypy==2.4.1
	touch $@

# mypy reads torch's types from the environment the package is built in.
lint: $(VENV)/lint $(VENV)/torch
	$(VENV)/tools/bin/ruff check
	$(VENV)/tools/bin/ruff format --check
	$(VENV)/tools/bin/mypy --python-executable $(PY)
	git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' | xargs $(VENV)/tools/bin/clang-format --dry-run --Werror

# The documents and the API reference, into build/docs; a docstring that cannot be read is an error.
$(VENV)/docs: $(VENV)/lint
	$(VENV)/tools/bin/python -m pip install --quiet --disable-pip-version-check mkdocs-material==9.8.2 mkdocstrings==1.0.8 mkdocstrings-python==2.0.11
	touch $@

docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/tools/bin/mkdocs build --quiet --strict

bench: $(VENV)/built $(VENV)/test
	$(PY) -m bench --quick

clean:
	rm -rf $(VENV) build *.egg-info tokenpool_ext/*.so
