"""The hot path on an NVIDIA GPU, in Numba CUDA: nf4.py, double_quant.py and paged_optim.py at the speed of the memory.

A GPU computes far faster than it reads, so time is bytes: each should move once, 16 at a time, and neighbouring threads should
ask for neighbouring ones. Bytes an element, double-quantized, for 16-bit numbers:

    quantize.py      2 read, 1/2 + 4/64 written          a block's absmax is found by the lanes that hold it
    dequantize.py    1/2 + 1/64 read, 2 written          a ladder of four kernels, from the obvious one to the one in use
    matmul.py        1/2 + 1/64 read                     decoded in registers, as the tensor cores take it, for 1 ... 64 rows
    adamw.py         16 read, 12 written                 parameter, gradient and both moments, float32

device.py has the instructions that Python lacks, each beside a Python twin, by which kernels run in the tests' simulator;
launch.py takes tensors, checks them, and starts kernels. Importing this package costs nothing: dispatch.py imports launch.py
when the first CUDA tensor comes.
"""
