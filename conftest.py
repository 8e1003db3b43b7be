"""What of the package can only be imported where an optional library is installed."""

from importlib.util import find_spec


KERNELS = ["hf_dpzo/distributed/triton_sums.py", "hf_dpzo/zo/triton_kernel.py", "tests/support/compiled_kernel.py"]
collect_ignore = [] if find_spec("triton") else KERNELS
