# `make` sets up, `make demo` runs the whole pipeline on MovieLens-100k, `make test` runs the tests.

PYTHON ?= python3.11
LOCK ?= requirements/cpu.lock
SPEC ?= specs/movielens_pep.yaml

.DELETE_ON_ERROR:
.PHONY: install demo test check bench bench-tables quality sanitize clean

PACKAGES = .venv/packages-$(notdir $(LOCK))
STAMP = .venv/installed

install: $(STAMP)

# From nothing each time: the packages of one lock must not stay under those of another.
$(PACKAGES): $(LOCK)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11) and "Thresher needs Python 3.11: make PYTHON=…")'
	$(PYTHON) -m venv --clear .venv
	.venv/bin/python -m pip install --quiet --no-deps -r $(LOCK) || \
	  { echo 'torch not found? requirements/cpu.lock says where its CPU build comes from.' >&2; exit 1; }
	touch $@

# Installed in place, so that an edit takes effect without installing again, and TorchX's jobs, `make` and the tests
# run the same files. This builds the C++ parts too: a minute, once.
$(STAMP): $(PACKAGES) pyproject.toml setup.py $(wildcard service/thresher/kernels/cpu/* service/thresher/tables/native/*)
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
	.venv/bin/thresher sweep --spec benchmarks/quality/movielens_100k.yaml

# The C++ parts under AddressSanitizer and UBSan, by the same tests; a second build, beside the one in use.
SANITIZED = build/sanitized
sanitize: install
	rm -rf $(SANITIZED)
	THRESHER_SANITIZE=1 .venv/bin/python -m pip install --quiet --no-deps --no-build-isolation --target $(SANITIZED) .
	PYTHONPATH=$(SANITIZED) LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	  .venv/bin/python -m pytest -p no:cacheprovider tests/unit/test_kernels.py tests/unit/test_lookup.py \
	  tests/unit/test_tables_core.py tests/unit/test_tables_lookup.py tests/unit/test_tables_files.py

bench: install
	for file in benchmarks/[a-z]*.py; do .venv/bin/python -m benchmarks.$$(basename $$file .py) || exit 1; done

bench-tables: install
	.venv/bin/python -m benchmarks.tables

clean:
	rm -rf .venv build service/thresher.egg-info service/thresher/kernels/*.so service/thresher/tables/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
