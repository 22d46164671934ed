"""The machinery of the linear_* operations, which take hidden states and the head in place of logits.

`inputs` checks and holds a call's tensors, `gemm` multiplies, `engine` runs the row kernels on a workspace of logits.
"""
