"""Side-by-side timings with the ways people load weights today. ``./benchmarks/run.sh`` prints tables of ratios."""
