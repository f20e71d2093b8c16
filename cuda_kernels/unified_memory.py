"""Unified memory: one address for the host and the device, and a driver that moves what lies there to whoever touches it.

A kernel that touches what is on the host faults, and the driver moves it, 64 KB to 2 MB at a time: right, but slow, for the
kernel waits. So three calls say beforehand what is wanted:

    cuMemAllocManaged       reserves addresses; memory is taken where it is touched first, and is zero
    cuMemPrefetchAsync      moves a range in one go, in the order of a stream, whether or not it is there already
    cuMemAdvise             the preferred location: where the driver should leave a range when nothing else decides

When the device is full the driver makes room for ordinary tensors too: managed pages leave for the host, unseen by anyone.
That is what a paged optimizer lives on. The driver tells nobody where a page is; it knows where a range was last sent to, but
neither a fault nor its own evictions change that. So nothing here pretends to know.

The library is libcuda itself, through ctypes: it is there wherever there is a GPU, and its entry points never change. Those
that end in _v2 take a CUmemLocation, two integers; headers of CUDA 13 compile the plain names to them, and drivers from
535 on have them. Streams and the context are torch's.

Where host and kernels cannot share a page (Windows, WSL, old GPUs), `driver_of` returns None.
"""

import ctypes
import weakref

import torch
from torch import Tensor

# CU_MEM_ATTACH_GLOBAL, CU_MEM_ADVISE_SET_PREFERRED_LOCATION, CU_DEVICE_ATTRIBUTE_CONCURRENT_MANAGED_ACCESS
GLOBAL, PREFERRED_LOCATION, CONCURRENT_MANAGED_ACCESS = 1, 3, 89
ON_DEVICE, ON_HOST = 1, 2  # CU_MEM_LOCATION_TYPE_DEVICE and _HOST


class Location(ctypes.Structure):
    """CUmemLocation: what kind of place, and which device."""

    _fields_ = [("kind", ctypes.c_int), ("id", ctypes.c_int)]


def library() -> ctypes.CDLL | None:
    """The driver, if it is Linux's and knows locations."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    return cuda if hasattr(cuda, "cuMemPrefetchAsync_v2") else None


def driver_of(device: torch.device) -> "Driver | None":
    """The driver of a CUDA device whose kernels and host may share pages; None for any other device."""
    cuda = library() if device.type == "cuda" else None
    driver = Driver(cuda, device) if cuda is not None else None
    return driver if driver is not None and driver.shares_pages() else None


class Driver:
    """The calls that are needed, on one device. A call that fails raises a RuntimeError with its name and CUDA's number."""

    def __init__(self, cuda: ctypes.CDLL, device: torch.device) -> None:
        self.cuda, self.device = cuda, device
        self.index = torch.cuda.current_device() if device.index is None else device.index

    def call(self, name: str, *arguments: object) -> None:
        code = getattr(self.cuda, name)(*arguments)
        if code:
            raise RuntimeError(f"{name} failed with CUDA error {code}")

    def shares_pages(self) -> bool:
        answer = ctypes.c_int()
        self.call(
            "cuDeviceGetAttribute",
            ctypes.byref(answer),
            CONCURRENT_MANAGED_ACCESS,
            ctypes.c_int(self.index),
        )
        return bool(answer.value)

    def free_bytes(self) -> int:
        """What the device has left, for all processes."""
        return torch.cuda.mem_get_info(self.device)[0]

    def allocate(self, nbytes: int) -> int:
        """The address of new managed memory."""
        address = ctypes.c_uint64()
        with torch.cuda.device(self.device):
            self.call(
                "cuMemAllocManaged",
                ctypes.byref(address),
                ctypes.c_size_t(nbytes),
                ctypes.c_uint(GLOBAL),
            )
        return address.value

    def free(self, address: int) -> None:
        torch.cuda.synchronize(self.device)  # a kernel may still be at work there
        self.call("cuMemFree_v2", ctypes.c_uint64(address))

    def move(self, address: int, nbytes: int, kind: int, stream: torch.cuda.Stream) -> None:
        """Let a range of bytes live on the device or the host from now on, and move it there in its turn on the stream."""
        start, size, place = (
            ctypes.c_uint64(address),
            ctypes.c_size_t(nbytes),
            Location(kind, self.index * (kind == ON_DEVICE)),
        )
        self.call("cuMemAdvise_v2", start, size, PREFERRED_LOCATION, place)
        self.call(
            "cuMemPrefetchAsync_v2",
            start,
            size,
            place,
            ctypes.c_uint(0),
            ctypes.c_void_p(stream.cuda_stream),
        )


class Memory:
    """Managed memory that is freed when nothing refers to it any more, neither this object nor a tensor made of it."""

    def __init__(self, driver: Driver, nbytes: int) -> None:
        self.driver, self.nbytes, self.address = driver, nbytes, driver.allocate(nbytes)
        weakref.finalize(self, driver.free, self.address)
        self.aside = torch.cuda.Stream(driver.device)  # for what nothing waits for

    @property
    def __cuda_array_interface__(self) -> dict:
        """How torch learns where the bytes are. Its tensor keeps the object that said so alive."""
        return {
            "shape": (self.nbytes,),
            "typestr": "|u1",
            "data": (self.address, False),
            "strides": None,
            "version": 3,
        }

    def tensor(self) -> Tensor:
        """All of it, uint8, as a tensor on the device; nothing is copied."""
        return torch.as_tensor(self, device=self.driver.device)

    def to_device(self, offset: int, nbytes: int, ahead: bool = False) -> None:
        """Before whatever the current stream does next; with `ahead`, beside what it does, and nothing waits for it."""
        stream = self.aside if ahead else torch.cuda.current_stream(self.driver.device)
        self.driver.move(self.address + offset, nbytes, ON_DEVICE, stream)

    def to_host(self, offset: int, nbytes: int) -> None:
        """After whatever the current stream still does with it."""
        self.driver.move(
            self.address + offset, nbytes, ON_HOST, torch.cuda.current_stream(self.driver.device)
        )
