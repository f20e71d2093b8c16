"""The kernels for an NVIDIA GPU, in Numba CUDA: the reference's results, limited only by memory.

A GPU computes far faster than it reads, so the bytes moved determine the time. Each byte should
move once, in accesses of 16 bytes, and neighbouring threads should access neighbouring addresses.
Bytes per element of 16-bit numbers, with double quantization:

    quantize.py      2 read, 1/2 + 4/64 written    the lanes that hold a block find its absmax
    dequantize.py    1/2 + 1/64 read, 2 written    four kernels, step by step; the last is used
    matmul.py        1/2 + 1/64 read               decoded in registers, for 1 ... 64 rows
    adamw.py         16 read, 12 written           parameter, gradient, moments in float32

device.py has the instructions that Python lacks, each with a Python twin that runs in the tests'
simulator. kernels/launch_cuda.py takes tensors, validates them, and starts kernels. Importing this
package is cheap: kernels/dispatch.py imports launch_cuda.py when the first CUDA tensor comes.
"""
