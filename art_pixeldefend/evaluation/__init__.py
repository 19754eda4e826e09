"""Grids of attacks and defences: computed, stored, printed as tables and drawn."""
