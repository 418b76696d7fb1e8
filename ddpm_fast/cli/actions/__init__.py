"""Implementations of the commands. Imported, with torch, after options have been parsed."""
