"""What of the package can only be imported where an optional library is installed."""

from importlib.util import find_spec


collect_ignore = [] if find_spec("triton") else ["hf_dpzo/zo/triton_kernel.py"]
