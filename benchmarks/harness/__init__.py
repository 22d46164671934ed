"""How things are measured: timing and its clock on a GPU, memory, units, and the environment that a figure is read with.

Nothing here knows an operation. `timing.measure` runs the candidates of a case in turn, after it has compared their results.
"""
