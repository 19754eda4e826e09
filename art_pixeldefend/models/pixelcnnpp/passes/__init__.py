"""Forward and backward passes of the network's blocks, fused: Numba on a CPU, Triton on an NVIDIA GPU."""
