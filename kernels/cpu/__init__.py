"""The CPU kernels, compiled by Numba: the results of the reference, without its temporaries.

The reference is written for clarity, which costs memory traffic: its look-up writes a float32 level
for every element, the product with absmax reads and writes it again, and the cast to bfloat16 does
so once more. A processor multiplies far faster than it reads, so the bytes moved determine the
time, and a kernel should read or write each byte once. Bytes per element, with double quantization:

    quantize.quantize    4 read, 1/2 + 4/64 written       absmax, codes and packing in one pass
    decode.decode        1/2 + 1/64 read, 2 or 4 written  the constants are decoded in the same pass
    matmul.multiply      1/2 + 1/64 read                  W is decoded piece by piece and multiplied
    adamw.update         16 read, 12 written              parameter, gradient, moments in float32

vectors.py gives the kernels vectors of numbers. launch.py calls the kernels. With Numba's compiler
off, all of them run in plain Python; so in the tests NumPy checks each index.
"""
