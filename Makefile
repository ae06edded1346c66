# make reproduce   the smoke grid of Table 3: real text in, table and figures out
# make test        the tests
# make mutants     does a test fail for each of a list of wrong edits?  About 25 minutes
# make report      tables and figures again, from the records alone
# make docs        the documentation into site/; a broken link or anchor ends it
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin

.PHONY: reproduce test mutants report docs setup clean
setup: $(VENV)/.installed

$(VENV)/.installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; this is " + sys.version.split()[0] + ". Try make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

reproduce: setup
	$(BIN)/python -m reproduce.table3 --scale smoke

test: setup
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

mutants: setup
	$(BIN)/python tests/mutants.py

report: setup
	$(BIN)/python -m reproduce.pages

docs: setup
	$(BIN)/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) build site *.egg-info results/work
