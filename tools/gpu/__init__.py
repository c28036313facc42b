"""What to run first on a machine with a GPU: ``python -m tools.gpu``, or ``make gpu``."""
