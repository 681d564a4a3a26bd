.PHONY: demo test quick style check bench man lowest lock release image

PYTHON = .venv/bin/python

.venv/.installed: pyproject.toml
	python3 -m venv --without-pip .venv
	python3 -m pip --python .venv install -q -e '.[test]'
	touch $@

demo: .venv/.installed
	$(PYTHON) -m imagewatch demo

test: .venv/.installed
	$(PYTHON) -m pytest

# Without what starts imagewatch and what takes seconds: about 40 seconds on two idle cores.
quick: .venv/.installed
	$(PYTHON) -m pytest -q -m quick

style: .venv/.installed
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy

check: style test

bench: .venv/.installed
	$(PYTHON) bench

man: .venv/.installed
	$(PYTHON) man/make.py > man/imagewatch.1

# The commands, the log and the documents with exactly the lowest versions that pyproject.toml allows.
lowest: .venv/.installed
	mkdir -p .build
	$(PYTHON) .ci/lowest.py > .build/lowest.txt
	python3 -m venv --without-pip --clear .build/lowest
	python3 -m pip --python .build/lowest install -q -e '.[test]' -c .build/lowest.txt
	.build/lowest/bin/python -m pytest -q $(addprefix tests/,$(addsuffix .py,commands/test_cli commands/test_completion commands/test_mcp commands/test_terminal docs/test_supply job/test_receipts system/test_log))

HASHED = --require-hashes --only-binary :all:
TOOLS = .build/tools

$(TOOLS)/.installed: requirements/release.txt
	python3 -m venv --without-pip --clear $(TOOLS)
	python3 -m pip --python $(TOOLS) install -q $(HASHED) -r $<
	touch $@

# Renews requirements/: the newest versions that pyproject.toml allows, with the hashes of all their files.
COMPILE = $(TOOLS)/bin/uv pip compile -q --upgrade --universal --python-version 3.11 --generate-hashes --custom-compile-command 'make lock'
lock: $(TOOLS)/.installed
	$(COMPILE) pyproject.toml -o requirements/service.txt
	$(COMPILE) --extra postgres pyproject.toml -o requirements/postgres.txt
	$(COMPILE) --group build -o requirements/build.txt
	$(COMPILE) --group release -o requirements/release.txt

# dist/: source, wheel, bill of materials (CycloneDX) of what a service installs, checksums. The same commit gives the same files.
release: export SOURCE_DATE_EPOCH = $(shell git log -1 --format=%ct)
release: $(TOOLS)/.installed
	test -z "$$(git status --porcelain)" || { echo 'commit everything first'; exit 1; }
	rm -rf dist .build/service
	$(TOOLS)/bin/python -m build --no-isolation
	python3 -m venv --without-pip .build/service
	python3 -m pip --python .build/service install -q $(HASHED) -r requirements/service.txt
	version=$$($(TOOLS)/bin/hatchling version) && \
		sed "s/^dynamic = .*/version = \"$$version\"/" pyproject.toml > .build/pyproject.toml && \
		$(TOOLS)/bin/cyclonedx-py environment --output-reproducible --mc-type application --pyproject .build/pyproject.toml \
		--output-file "dist/imagewatch-$$version.cdx.json" .build/service/bin/python
	cd dist && sha256sum * > SHA256SUMS

# dist/: the image for "podman load" and "docker load", built without a registry. The same commit and the same Debian packages give
# the same image.
image: export SOURCE_DATE_EPOCH = $(shell git log -1 --format=%ct)
image:
	mkdir -p dist
	version=$$(sed -n 's/^__version__ = "\(.*\)"$$/\1/p' imagewatch/__init__.py) && \
		.ci/image.sh "localhost/imagewatch:$$version" --build-arg VERSION="$$version" --build-arg REVISION="$$(git rev-parse HEAD)" && \
		podman tag "localhost/imagewatch:$$version" localhost/imagewatch:latest && \
		rm -f "dist/imagewatch-$$version-image.tar" && \
		podman save --quiet --format docker-archive --output "dist/imagewatch-$$version-image.tar" \
			"localhost/imagewatch:$$version" localhost/imagewatch:latest
