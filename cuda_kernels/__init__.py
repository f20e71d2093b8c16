"""The kernels for an NVIDIA GPU, in Numba CUDA: the reference's results at the speed of memory.

A GPU computes far faster than it reads, so time is bytes: each byte should move once, in accesses
of 16 bytes, with neighbouring threads asking for neighbouring addresses. Bytes per element of
16-bit numbers, with double quantization:

    quantize.py      2 read, 1/2 + 4/64 written    the lanes that hold a block find its absmax
    dequantize.py    1/2 + 1/64 read, 2 written    a ladder of four kernels; the last one is used
    matmul.py        1/2 + 1/64 read               decoded in registers, for 1 ... 64 rows
    adamw.py         16 read, 12 written           parameter, gradient, moments in float32

device.py has the instructions that Python lacks, each with a Python twin that runs in the tests'
simulator. kernels/launch_cuda.py takes tensors, validates them, and starts kernels. Importing this
package is cheap: kernels/dispatch.py imports launch_cuda.py when the first CUDA tensor comes.
"""
