"""Code that comes with a model is cached in a folder of the test session, not in the user's home."""

from __future__ import annotations

import os
import tempfile

# Read when transformers is imported, so before any test file is.
_modules = tempfile.TemporaryDirectory(prefix="prosparse-test-modules-", ignore_cleanup_errors=True)
os.environ["HF_MODULES_CACHE"] = _modules.name
