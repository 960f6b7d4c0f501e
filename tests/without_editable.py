"""Programs for a Python that is to find another copy of the package than the checkout that is installed."""

from __future__ import annotations

# An editable install finds its modules by a hook, which comes before PYTHONPATH.
PRELUDE = "import sys; sys.meta_path[:] = [each for each in sys.meta_path if 'editable' not in type(each).__module__]; "
