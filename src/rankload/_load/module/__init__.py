"""Loads into modules and optimizers: plan which bytes belong where, and carry the plan out."""
