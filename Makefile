# `make` sets up, `make demo` runs the whole pipeline on MovieLens-100k, `make test` runs the tests.

PYTHON ?= python3.11
LOCK ?= requirements/cpu.lock
SPEC ?= specs/movielens_pep.yaml

.DELETE_ON_ERROR:
.PHONY: install demo test check bench quality clean

STAMP = .venv/installed-$(notdir $(LOCK))

install: $(STAMP)

# Installed in place, so that an edit takes effect without installing again, and TorchX's jobs, `make` and the tests
# run the same files. From nothing each time: the packages of one lock must not stay under those of another.
$(STAMP): $(LOCK) pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11) and "Thresher needs Python 3.11: make PYTHON=…")'
	$(PYTHON) -m venv --clear .venv
	.venv/bin/python -m pip install --quiet --no-deps -r $(LOCK) || \
	  { echo 'torch not found? requirements/cpu.lock says where its CPU build comes from.' >&2; exit 1; }
	.venv/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

demo: install
	.venv/bin/thresher pipeline --spec $(SPEC)

test: install
	.venv/bin/python -m pytest

check: install
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy service components

quality: install
	.venv/bin/python -m benchmarks.quality.movielens_100k

bench: install
	for file in benchmarks/[a-z]*.py; do .venv/bin/python -m benchmarks.$$(basename $$file .py) || exit 1; done

clean:
	rm -rf .venv build service/thresher.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
