"""The paper's grid: run, stored, tabulated, drawn."""
