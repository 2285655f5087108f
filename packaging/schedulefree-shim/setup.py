"""Refuses a setuptools that does not know the metadata; everything else is in pyproject.toml."""

import sys

import setuptools

if int(setuptools.__version__.partition(".")[0]) < 77:
    sys.exit(f'\nsetuptools {setuptools.__version__} is too old: pip install "setuptools>=77"\n')
setuptools.setup()
