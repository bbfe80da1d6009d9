"""What holds for the whole test session: one worker's share of the machine, and no cache in the user's home."""

from __future__ import annotations

import atexit
import os
import tempfile

# Both are read when torch and transformers are imported, so before any test file is.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    # Two workers with a thread for every core each would spend their time waiting for one another.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
_modules = tempfile.TemporaryDirectory(prefix="prosparse-test-modules-", ignore_cleanup_errors=True)
atexit.register(_modules.cleanup)
os.environ["HF_MODULES_CACHE"] = _modules.name
