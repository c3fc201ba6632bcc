"""Pumice: sparse language models, measurably faster on the machine they run on."""

__version__ = "0.1.0"
