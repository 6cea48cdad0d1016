"""Devices, and the host memory through which bytes reach them."""
