# What a contributor runs; CONTRIBUTING.md says when. Everything is installed by
# pip install -e '.[test,docs]'.
.PHONY: test-fast test lint types docs ci

test-fast:  ## the tests that take seconds: 13 minutes on 2 cores with an empty cache
	pytest -n auto

test:  ## the slow ones too, but not the exhaustive ones, which take an hour
	pytest -n auto -m "not exhaustive"

lint:  ## style, and the arrows between packages
	ruff check .
	ruff format --check .
	lint-imports

types:  ## every annotation
	pyright

docs:  ## the site, in site/; any broken link or reference is an error
	mkdocs build --strict

ci:  ## everything that a release must pass, in environments of its own
	.ci/run
