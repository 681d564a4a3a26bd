.PHONY: demo test style check bench man

PYTHON = .venv/bin/python

.venv/.installed: pyproject.toml
	python3 -m venv --without-pip .venv
	python3 -m pip --python .venv install -q -e '.[test]'
	touch $@

demo: .venv/.installed
	$(PYTHON) -m imagewatch demo

test: .venv/.installed
	$(PYTHON) -m pytest

style: .venv/.installed
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy

check: style test

bench: .venv/.installed
	$(PYTHON) bench

man: .venv/.installed
	$(PYTHON) man/make.py > man/imagewatch.1
