"""Adapters between ddpm_fast and other libraries."""
