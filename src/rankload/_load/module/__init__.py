"""Modules and optimizers: which bytes belong where."""
