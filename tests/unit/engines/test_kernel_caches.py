"""The kernels that oneDNN and torch keep for the shapes of products do not fill the memory."""

import subprocess
import sys

_SCRIPT = """
import engines, ctypes, psutil, torch

def resident_bytes():
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return psutil.Process().memory_info().rss

torch.set_num_threads(1)
x, weight = torch.ones(400, 256), torch.ones(1024, 256)
with torch.inference_mode():
    torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    before = resident_bytes()
    for rows in range(399, 0, -1):
        torch.ops.mkldnn._linear_pointwise(x[:rows].contiguous(), weight, None, "none", [], "")
print(resident_bytes() - before)
"""


def test_products_of_many_lengths_leave_little_memory_behind() -> None:
    done = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, text=True, check=True, timeout=60)

    assert int(done.stdout) < 100e6
