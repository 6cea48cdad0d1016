"""Devices, and the memory through which bytes get there."""
