"""Peak memory of a call, beyond what the process held before; imports nothing of compressor."""

import re
import threading
import time
from pathlib import Path


def memory(kind):
    """Bytes of this process now: VmRSS, all that is resident, or RssAnon, what has no file."""
    found = re.search(rf"{kind}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(found.group(1))


def watched(call, kind):
    """(what a call returns, bytes beyond those before, CPU seconds); sampled every 5 ms."""
    before, peak, stop = memory(kind), [0], threading.Event()

    def watch():
        while not stop.wait(0.005):
            peak[0] = max(peak[0], memory(kind))

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.process_time()
    try:
        found = call()
        took = time.process_time() - start
    finally:
        stop.set()
        watcher.join()
    return found, max(0, peak[0] - before), took


def cost(load, call):
    """{cpu_seconds, extra_bytes} of `call(load())`, and `whole_bytes`, the model included.

    extra_bytes count from the loaded model, whole_bytes from before it was loaded.
    """
    found = {}

    def both():
        model = load()
        _, extra, seconds = watched(lambda: call(model), "VmRSS")
        found.update(cpu_seconds=seconds, extra_bytes=extra)

    _, whole, _ = watched(both, "VmRSS")
    return found | {"whole_bytes": whole}
