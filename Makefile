.PHONY: demo test quick style check bench man reference site lowest pythons lock release url deb image

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

# The pages of docs/reference that follow from the code.
reference: .venv/.installed
	$(PYTHON) docs/make.py

# The commands, the log and the documents with exactly the lowest versions that pyproject.toml allows.
lowest: .venv/.installed
	mkdir -p .build
	$(PYTHON) .ci/lowest.py > .build/lowest.txt
	python3 -m venv --without-pip --clear .build/lowest
	python3 -m pip --python .build/lowest install -q -e '.[test]' -c .build/lowest.txt
	.build/lowest/bin/python -m pytest -q $(addprefix tests/,$(addsuffix .py,commands/test_cli commands/test_completion commands/test_mcp commands/test_terminal docs/test_supply job/test_receipts system/test_log))

# The quick tests and the demo with each of these interpreters that is installed. pyproject.toml names those that pass.
pythons:
	set -e; for version in 3.11 3.12 3.13 3.14; do \
		command -v python$$version > /dev/null || { echo "python$$version is not installed"; continue; }; \
		rm -rf .build/python$$version .build/demo$$version; \
		python$$version -m venv .build/python$$version; \
		.build/python$$version/bin/python -m pip install -q -e '.[test]'; \
		.build/python$$version/bin/python -m pytest -q -m quick; \
		.build/python$$version/bin/imagewatch demo .build/demo$$version; \
	done

HASHED = --require-hashes --only-binary :all:
TOOLS = .build/tools
SITE = .build/sphinx

$(TOOLS)/.installed: requirements/release.txt
	python3 -m venv --without-pip --clear $(TOOLS)
	python3 -m pip --python $(TOOLS) install -q $(HASHED) -r $<
	touch $@

$(SITE)/.installed: requirements/docs.txt
	python3 -m venv --without-pip --clear $(SITE)
	python3 -m pip --python $(SITE) install -q $(HASHED) -r $<
	touch $@

# The documentation as a site in .build/site. Each warning is an error, and so is a link without a target.
site: $(SITE)/.installed
	rm -rf .build/site
	$(SITE)/bin/sphinx-build -q -W --keep-going -n -c docs -d .build/doctrees . .build/site

# Renews requirements/: the newest versions that pyproject.toml allows, with the hashes of all their files.
COMPILE = $(TOOLS)/bin/uv pip compile -q --upgrade --universal --python-version 3.11 --generate-hashes --custom-compile-command 'make lock'
lock: $(TOOLS)/.installed
	$(COMPILE) pyproject.toml -o requirements/service.txt
	$(COMPILE) --extra postgres pyproject.toml -o requirements/postgres.txt
	$(COMPILE) --group build -o requirements/build.txt
	$(COMPILE) --group release -o requirements/release.txt
	$(COMPILE) --fork-strategy fewest --group docs -o requirements/docs.txt

# Sets the address of the repository everywhere: make url URL=https://…
url:
	python3 .ci/set_url.py '$(URL)'

# dist/: all that is published of a version: source, wheel, Debian package, image, bill of materials (CycloneDX) of what a
# service installs, checksums. The same commit gives the same files, except for the image; docs/contributing/release.md says how far.
release: export SOURCE_DATE_EPOCH = $(shell git log -1 --format=%ct)
release: $(TOOLS)/.installed
	@for tool in git sha256sum $$(test ! -d debian || echo dpkg-buildpackage dh); do \
		command -v $$tool > /dev/null || { echo "make release needs $$tool"; exit 1; }; done
	test -z "$$(git status --porcelain)" || { echo 'commit everything first'; exit 1; }
	rm -rf dist .build/service
	$(TOOLS)/bin/python -m build --no-isolation
	python3 -m venv --without-pip .build/service
	python3 -m pip --python .build/service install -q $(HASHED) -r requirements/service.txt
	version=$$($(TOOLS)/bin/hatchling version) && \
		sed "s/^dynamic = .*/version = \"$$version\"/" pyproject.toml > .build/pyproject.toml && \
		$(TOOLS)/bin/cyclonedx-py environment --output-reproducible --mc-type application --pyproject .build/pyproject.toml \
		--output-file "dist/imagewatch-$$version.cdx.json" .build/service/bin/python
	test ! -d debian || $(MAKE) deb
	test ! -e Containerfile || $(MAKE) image
	cd dist && sha256sum * > SHA256SUMS

# dist/imagewatch_VERSION-1~debRELEASE_ARCH.deb, for the release of Debian that this runs on. The same commit gives the same file.
DEB = .build/deb
DIST = dist
deb: export SOURCE_DATE_EPOCH = $(shell git log -1 --format=%ct)
deb:
	rm -rf $(DEB)
	mkdir -p $(DEB)/imagewatch $(DIST)
	git ls-files -z | xargs -0 cp --parents --no-dereference -t $(DEB)/imagewatch
	sh $(DEB)/imagewatch/debian/changelog.sh > $(DEB)/imagewatch/debian/changelog
	cd $(DEB)/imagewatch && dpkg-checkbuilddeps -I && dpkg-buildpackage --build=binary --no-sign --no-check-builddeps
	mv $(DEB)/imagewatch_*.deb $(DIST)

# dist/: the image for "podman load" and "docker load", built without a registry. The same commit and the same Debian packages give
# the same file: .ci/image_archive.py removes the random names that Podman writes into it.
image: export SOURCE_DATE_EPOCH = $(shell git log -1 --format=%ct)
image:
	mkdir -p dist .build
	version=$$(sed -n 's/^__version__ = "\(.*\)"$$/\1/p' imagewatch/__init__.py) && \
		.ci/image.sh "localhost/imagewatch:$$version" --build-arg VERSION="$$version" --build-arg REVISION="$$(git rev-parse HEAD)" && \
		podman tag "localhost/imagewatch:$$version" localhost/imagewatch:latest && \
		rm -f .build/image.tar && \
		podman save --quiet --format docker-archive --output .build/image.tar \
			"localhost/imagewatch:$$version" localhost/imagewatch:latest && \
		python3 .ci/image_archive.py .build/image.tar "dist/imagewatch-$$version-image.tar" && \
		rm .build/image.tar
