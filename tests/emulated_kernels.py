"""The kernels that an emulated package has, and which of them ran."""

import ctypes
import re

import repository  # noqa: F401  (makes build_support importable)

import flash_attn
from build_support.options import load_variants
from flash_attn import _extension

VARIANTS = load_variants()
# The enumerators of csrc/variant/variant.h in their order, as a kernel's name has their numbers.
ENUMERATORS = {
    "Dtype": ("kFp16", "kBf16"),
    "Mask": ("kFull", "kCausal", "kGeneral"),
    "Score": ("kPlain", "kGeneral"),
    "Rows": ("kMany", "k64", "k16"),
}


def built_kernels():
    """(group, dtype, options) of every kernel that the package has."""
    build = _extension.build_info
    groups = VARIANTS.groups(build.archs, build.head_dims, build.dtypes)
    return [(group, dtype, options) for group in groups for dtype in group.dtypes for options in group.options]


def name_of(kernel):
    group, dtype, options = kernel
    short = "-".join(re.sub(r".*::k", "", option) for option in options)
    return f"{group.name}-{dtype}-{short}"


def key_of(kernel):
    """(kind, what its launch function's name ends with): numbers, without the zeros at the end."""
    group, dtype, options = kernel
    numbers = [group.arch, ENUMERATORS["Dtype"].index(f"k{dtype.title()}"), *group.tile_row[:2]]
    numbers.append(int(group.tile_row[2].removesuffix("KB")))
    numbers += [ENUMERATORS[kind].index(name) for kind, name in (option.split("::") for option in options)]
    return group.kind.name, _without_zeros(numbers)


def _without_zeros(numbers):
    while numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def take_launches():
    """The launch functions that were called since, as C++ writes them, one a line."""
    take = ctypes.CDLL(flash_attn._C.__file__).flash_attn_take_launches
    take.restype = ctypes.c_char_p
    return take().decode()


def launched_keys():
    """The keys of the attention kernels that ran since, and the names of other kernels' launch functions."""
    found = set()
    for line in take_launches().splitlines():
        name = re.search(r"launch_([a-z_]+)", line)[1].removesuffix("_kernel")
        # SM90's have their tile beside the variant, whose enums have names.
        variant = re.split(r"Tile\{|>\(", line.partition("Variant{")[2])[0]
        numbers = [int(number) for number in re.findall(r"\b\d+\b", re.sub(r"\([^)]*\)", "", variant))]
        found.add((name, _without_zeros(numbers)) if numbers else name)
    return found
