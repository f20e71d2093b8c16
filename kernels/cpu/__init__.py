"""The hot path on a CPU, compiled by Numba: the results of nf4.py, double_quant.py and paged_optim.py, without temporaries.

The reference is written to be read, and pays for it in memory traffic: its look-up writes a float32 level for every element,
the product with absmax reads and writes it again, the cast to bfloat16 once more. A processor multiplies far faster than it
reads, so time is bytes, and a kernel should touch each byte once. Bytes an element, double-quantized:

    quantize.quantize    4 read, 1/2 + 4/64 written         absmax, code and packing while the block is in the cache
    decode.decode        1/2 + 1/64 read, 2 or 4 written    the constants are decoded on the way
    fused.multiply       1/2 + 1/64 read                    a number of W lives in a register while it is multiplied
    adamw.update         16 read, 12 written                parameter, gradient and both moments, float32

Each file can be read alone, and stands alone: Numba keeps compiled code on disk, and compiles anew when the file of a kernel
has changed, but does not look at what that file imports. Every function but those that are made of instructions runs in plain
Python as well, with the compiler off: so the tests see each index checked by NumPy. host.py calls them.
"""
