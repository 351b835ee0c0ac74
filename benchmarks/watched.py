"""Peak resident memory of a call, beyond what the process held before; imports nothing."""

import re
import threading
import time
from pathlib import Path


def resident():
    """Bytes of this process in memory now."""
    found = re.search(r"VmRSS:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(found.group(1))


def watched(call):
    """{cpu_seconds, extra_bytes} of a call, sampled every 5 ms."""
    before, peak, stop = resident(), [0], threading.Event()

    def watch():
        while not stop.wait(0.005):
            peak[0] = max(peak[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.process_time()
    try:
        call()
        took = time.process_time() - start
    finally:
        stop.set()
        watcher.join()
    return {"cpu_seconds": took, "extra_bytes": max(0, peak[0] - before)}
