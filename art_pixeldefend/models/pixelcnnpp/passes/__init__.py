"""Fused forward and backward passes of the network's blocks: Numba on a CPU, Triton on an NVIDIA GPU."""
