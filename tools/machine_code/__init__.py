"""The compiled kernels: instructions, registers, launches. No tool here needs a GPU."""
