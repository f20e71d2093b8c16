#!/bin/sh
# Compares the CPU kernels with the reference on an emulated aarch64 processor:
#
#     sh tests/on_aarch64.sh FOLDER            check_cpu_kernels.py
#     sh tests/on_aarch64.sh FOLDER --tests    and kernels/test_cpu.py with 3 examples per property
#
# Needs an x86 Debian, root, and python3 with pip. FOLDER gets an arm64 Debian and the packages for
# it; a second call uses them again. They take about 6 GB where PyTorch's index of CPU builds cannot
# be reached, because PyPI's torch for aarch64 requires the CUDA libraries.
set -eu
case "${2:-}" in
"" | --tests) ;;
*) echo "the second argument must be --tests, got $2" >&2; exit 2 ;;
esac

RELEASE=bookworm
PYTHON_VERSION=3.11 # of that release
CPU_TORCH_INDEX=https://download.pytorch.org/whl/cpu
PROCESSOR=neoverse-n1

repository=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "${1:?the folder for the arm64 system is missing}"
folder=$(cd "$1" && pwd)
root=$folder/debian
packages=$folder/packages

install_emulator() {
    apt-get -qq update
    apt-get -qq install -y --no-install-recommends qemu-user-static debootstrap >/dev/null
}

# Unpacks the packages without running their scripts, which would have to be emulated.
make_debian() {
    rm -rf "$root" "$root.part"
    debootstrap --arch=arm64 --foreign --variant=minbase --include=python3,libstdc++6 \
        "$RELEASE" "$root.part" >"$folder/debootstrap.log"
    for deb in "$root.part"/var/cache/apt/archives/*.deb; do
        dpkg-deb --fsys-tarfile "$deb" | tar -x --keep-directory-symlink -C "$root.part"
    done
    describe_processor "$root.part"
    mv "$root.part" "$root"
}

# Programs in the emulation read these files instead of those of the x86 processor, with which torch
# crashes.
describe_processor() {
    identification=$1/sys/devices/system/cpu/cpu0/regs/identification
    mkdir -p "$identification"
    echo 0x00000000413fd0c1 >"$identification/midr_el1"
    rm "$1/proc" # a link to /proc
    mkdir "$1/proc"
    cat >"$1/proc/cpuinfo" <<END
processor	: 0
Features	: fp asimd aes pmull sha1 sha2 crc32 atomics fphp asimdhp asimdrdm lrcpc dcpop asimddp
CPU implementer	: 0x41
CPU architecture: 8
CPU variant	: 0x3
CPU part	: 0xd0c
CPU revision	: 1
END
}

# The packages that the tests of the kernels import, in the versions of the requirements.
make_packages() {
    cd "$repository"
    names='numba|numpy|scipy|pytest|hypothesis'
    requirements=$(grep -hoE "^($names)[=<>][0-9.,<>=]*" requirements*.txt)
    torch=$(grep -oE '^torch==[0-9.]*' requirements.txt)
    index="--extra-index-url $CPU_TORCH_INDEX --retries 1"
    pip_install "$torch+cpu" $requirements $index 2>/dev/null || pip_install "$torch" $requirements
    mv "$packages.part" "$packages"
}

pip_install() {
    rm -rf "$packages.part"
    python3 -m pip install --quiet --root-user-action ignore --target "$packages.part" \
        --only-binary=:all: --python-version $PYTHON_VERSION --platform manylinux2014_aarch64 \
        $(seq -f '--platform manylinux_2_%g_aarch64' 17 28) "$@"
}

emulated_python() {
    qemu-aarch64-static -cpu $PROCESSOR -L "$root" "$root/usr/bin/python3" "$@"
}

command -v qemu-aarch64-static >/dev/null && command -v debootstrap >/dev/null || install_emulator
[ -d "$root" ] || make_debian
[ -d "$packages" ] || make_packages

cd "$repository"
export PYTHONPATH="$repository:$packages" PYTHONDONTWRITEBYTECODE=1
export OMP_NUM_THREADS=2 NUMBA_NUM_THREADS=2 NUMBA_CACHE_DIR="$folder/numba"
emulated_python tests/check_cpu_kernels.py
if [ "${2:-}" = --tests ]; then
    emulated_python -m pytest tests/kernels/test_cpu.py -p no:cacheprovider --hypothesis-profile=few
fi
