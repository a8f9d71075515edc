PYTHON ?= python3
BIN := .venv/bin

.PHONY: run test test-slow lint docs notebooks clean

# On the embedded digits: trains a smoothed classifier and certifies it, compares out-of-distribution detectors, and
# attacks a classifier that was trained on adversarial images.
run: .venv/.installed
	$(BIN)/python -m experiments.smoothing
	$(BIN)/python -m experiments.ood
	$(BIN)/python -m experiments.adversarial

# The whole suite, without the tests marked slow.
test: .venv/.installed-test
	$(BIN)/python -m pytest

# Of the tests marked slow those that take minutes: notebooks, several processes, kills. Claims take hours.
test-slow: .venv/.installed-test
	$(BIN)/python -m pytest -m slow --ignore-glob='*claim*' tests

lint: .venv/.installed-test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyrefly check

# The site, into results/docs; a warning, such as a reference that leads nowhere, is an error.
docs: .venv/.installed-docs
	$(BIN)/python -m sphinx -W --keep-going -q -d .cache/docs docs results/docs
	@echo results/docs/index.html

# Executes the notebooks of colab from clean kernels and stores them with their outputs; `make notebooks NOTEBOOKS=ood`
# does so for one. own_model shows a PyTorch model where the extra torch is installed.
notebooks: .venv/.installed-test
	$(BIN)/python -m colab.execute $(NOTEBOOKS)

.venv/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name one: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	@touch $@

.venv/.installed: pyproject.toml | .venv/.created
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[experiments]'
	@touch $@

.venv/.installed-test: pyproject.toml | .venv/.created
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@

.venv/.installed-docs: pyproject.toml | .venv/.created
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	@touch $@

clean:
	rm -rf .venv .cache results docs/api docs/tutorials/*.ipynb
