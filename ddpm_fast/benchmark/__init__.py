"""Benchmarks of ddpm_fast against the engines that it replaces: `ddpm-fast bench`.

workload.py   checkpoint, precision and size that every engine runs
baselines.py  engines with one interface: a forward pass, and a sampling loop of the engine
worker.py     worker process that holds one engine
runner.py     engines that take turns, checked before they are timed; medians with intervals
results.py    results file, table, and comparison with an older file
kernels.py    time of every kernel, and the ceilings of the device
figures.py    plots of a result
timer.py      timing of one call
"""
