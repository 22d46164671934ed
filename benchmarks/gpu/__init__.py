"""Everything that is run on a GPU, in parts of ten minutes: tests, compute-sanitizer, benchmarks, ncu.

`python -m benchmarks.gpu` goes on where it stopped; `.cuda_resources` tells what nvcc made of the kernels, and needs no GPU.
"""
