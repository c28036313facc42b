"""How fast cotuning_kernels is, beside the formulations that people use today; ``README.md`` says how to run it."""
