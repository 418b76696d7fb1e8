"""The command line `ddpm-fast`."""
