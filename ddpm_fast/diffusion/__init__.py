"""Mathematics of DDPM: schedules, the forward and reverse process, solvers and losses."""
