"""Peak memory of a command with all its child processes: python benchmarks/peak_memory.py COMMAND [ARGUMENT ...]

Adds up the proportional set sizes (PSS: pages that processes share are split among them, so nothing counts twice) every second. Linux only.
"""

import subprocess
import sys
import time

import psutil

EVERY_S = 1.0


def tree_pss_bytes(root: psutil.Process) -> int:
    total = 0
    for process in [root, *root.children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue  # it ended while we looked
    return total


def main() -> int:
    child = subprocess.Popen(sys.argv[1:])
    root, peak = psutil.Process(child.pid), 0
    while child.poll() is None:
        peak = max(peak, tree_pss_bytes(root))
        time.sleep(EVERY_S)
    print(f"peak memory of all processes: {peak / 1e9:.2f} GB", file=sys.stderr)
    return child.returncode


if __name__ == "__main__":
    sys.exit(main())
