"""The top floor: profile, preflight, pipeline, report.

`compressor.run` is this package and, by interface, also the function that runs a profile, so the
package itself can be called.
"""

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from compressor.run.pipeline import run

        return run(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
