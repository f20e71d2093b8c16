"""CUDA's unified memory: one address for the host and the device; the driver moves the bytes.

A kernel that reads bytes on the host faults, and the driver moves them, 64 KB to 2 MB at a time.
This is correct but slow, because the kernel waits. So the driver is told in advance:

    cuMemPrefetchAsync      moves a range in stream order, from wherever it is
    cuMemAdvise             sets the preferred location: where the driver should keep a range

cuMemAllocManaged reserves addresses. Memory is taken at first use, and is zero.

When the device is full, the driver also makes room for ordinary tensors: it moves managed pages to
the host. A paged optimizer depends on this. The driver does not report where a page is: it
records where a range was last sent, but neither faults nor its own evictions update this record. So
this module does not report it either.

The calls go to libcuda through ctypes: it is on every machine with a GPU, and its functions do not
change. Those that end in _v2 take a CUmemLocation, two integers. The headers of CUDA 13 map the
plain names to them, and drivers from version 535 on have them. Streams and the context are torch's.

If host and kernels cannot share a page (Windows, WSL, old GPUs), `driver_of` returns None.
"""

import ctypes
import weakref

import torch
from torch import Tensor

ATTACH_GLOBAL = 1  # CU_MEM_ATTACH_GLOBAL
PREFERRED_LOCATION = 3  # CU_MEM_ADVISE_SET_PREFERRED_LOCATION
CONCURRENT_MANAGED_ACCESS = 89  # CU_DEVICE_ATTRIBUTE_CONCURRENT_MANAGED_ACCESS
ON_DEVICE = 1  # CU_MEM_LOCATION_TYPE_DEVICE
ON_HOST = 2  # CU_MEM_LOCATION_TYPE_HOST


class Location(ctypes.Structure):
    """CUmemLocation: the kind of location, and the index of the device."""

    _fields_ = [("kind", ctypes.c_int), ("id", ctypes.c_int)]


def library() -> ctypes.CDLL | None:
    """The driver's library on Linux; None if there is none, or if it does not support locations."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    return cuda if hasattr(cuda, "cuMemPrefetchAsync_v2") else None


def driver_of(device: torch.device) -> "Driver | None":
    """The driver of a CUDA device that shares pages with the host; None for any other device."""
    if device.type != "cuda":
        return None
    cuda = library()
    if cuda is None:
        return None
    driver = Driver(cuda, device)
    return driver if driver.shares_pages() else None


class Driver:
    """The driver's calls for one device.

    Raises: RuntimeError with the name of a call that failed and CUDA's error number.
    """

    def __init__(self, cuda: ctypes.CDLL, device: torch.device) -> None:
        self.cuda = cuda
        self.device = device
        self.index = torch.cuda.current_device() if device.index is None else device.index

    def call(self, name: str, *arguments: object) -> None:
        code = getattr(self.cuda, name)(*arguments)
        if code:
            raise RuntimeError(f"{name} failed with CUDA error {code}")

    def shares_pages(self) -> bool:
        """Whether host and kernels may use the same page at the same time."""
        answer = ctypes.c_int()
        index = ctypes.c_int(self.index)
        self.call("cuDeviceGetAttribute", ctypes.byref(answer), CONCURRENT_MANAGED_ACCESS, index)
        return bool(answer.value)

    def free_bytes(self) -> int:
        """Free memory of the device, which all processes share."""
        return torch.cuda.mem_get_info(self.device)[0]

    def allocate(self, nbytes: int) -> int:
        """Allocate managed memory. Returns its address."""
        address = ctypes.c_uint64()
        size = ctypes.c_size_t(nbytes)
        flags = ctypes.c_uint(ATTACH_GLOBAL)
        with torch.cuda.device(self.device):
            self.call("cuMemAllocManaged", ctypes.byref(address), size, flags)
        return address.value

    def free(self, address: int) -> None:
        """Free managed memory when no kernel can use it any more."""
        torch.cuda.synchronize(self.device)
        self.call("cuMemFree_v2", ctypes.c_uint64(address))

    def move(self, address: int, nbytes: int, kind: int, stream: torch.cuda.Stream) -> None:
        """Set the preferred location of a range of bytes, and move it there in stream order."""
        start = ctypes.c_uint64(address)
        size = ctypes.c_size_t(nbytes)
        location = Location(kind, self.index if kind == ON_DEVICE else 0)
        flags = ctypes.c_uint(0)
        handle = ctypes.c_void_p(stream.cuda_stream)
        self.call("cuMemAdvise_v2", start, size, PREFERRED_LOCATION, location)
        self.call("cuMemPrefetchAsync_v2", start, size, location, flags, handle)


class Memory:
    """Managed memory, freed when neither this object nor a tensor made from it exists any more."""

    def __init__(self, driver: Driver, nbytes: int) -> None:
        self.driver = driver
        self.nbytes = nbytes
        self.address = driver.allocate(nbytes)
        weakref.finalize(self, driver.free, self.address)
        self.prefetch_stream = torch.cuda.Stream(driver.device)

    @property
    def __cuda_array_interface__(self) -> dict:
        """Tells torch where the bytes are. The tensor that it makes keeps this object alive."""
        return {
            "shape": (self.nbytes,),
            "typestr": "|u1",
            "data": (self.address, False),
            "strides": None,
            "version": 3,
        }

    def tensor(self) -> Tensor:
        """All the memory as a uint8 tensor on the device; nothing is copied."""
        return torch.as_tensor(self, device=self.driver.device)

    def to_device(self, offset: int, nbytes: int, ahead: bool = False) -> None:
        """Move a range to the device before the next kernel of the current stream.

        With `ahead`, move it while the current stream works; no kernel waits for it.
        """
        current = torch.cuda.current_stream(self.driver.device)
        stream = self.prefetch_stream if ahead else current
        self.driver.move(self.address + offset, nbytes, ON_DEVICE, stream)

    def to_host(self, offset: int, nbytes: int) -> None:
        """Move a range to the host after the current stream's work on it."""
        stream = torch.cuda.current_stream(self.driver.device)
        self.driver.move(self.address + offset, nbytes, ON_HOST, stream)
