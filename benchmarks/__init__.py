"""Times cotuning_kernels and the formulations that people use today; ``README.md`` says how to run the benchmarks."""
