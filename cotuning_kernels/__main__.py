"""``python -m cotuning_kernels`` prints the environment report."""

from cotuning_kernels.environment import report

print(report())
