"""Exact, IO-aware attention for NVIDIA GPUs from Ampere to Hopper and, for every other machine, the CPU."""

from pkgutil import extend_path

from flash_attn._dispatch import use_path
from flash_attn._report import explain, info
from flash_attn.interface import (
    flash_attn_combine,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
    get_scheduler_metadata,
)
from flash_attn.version import __version__

# Other distributions add subpackages to this name, flash_attn.cute among them.
__path__ = extend_path(__path__, __name__)

__all__ = [
    "__version__",
    "explain",
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
    "info",
    "use_path",
]
