"""The mathematics of DDPM: schedules, solvers, losses. No network, no engine."""
