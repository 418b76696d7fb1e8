"""Ours beside what a user would run instead: `ddpm-fast bench`.

baselines.py      engines behind one face: a forward pass, and a sampling loop of the engine's own
worker.py     a process that holds one of them and runs it when asked
race.py       such processes taking turns; figures with intervals
results.py    the file that comes of it, and what got slower since an older one
launches.py   every kernel beside the machine's ceilings
charts.py     pictures of all that
"""
