"""Copies, carried out: buckets, threads, devices."""
