"""What compilers made of the kernels: instructions, registers, launches. Nothing here needs a GPU."""
