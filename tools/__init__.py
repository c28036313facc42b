"""Tools for those who work on cotuning_kernels. No tool is installed with the package."""
