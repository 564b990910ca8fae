"""Tests of the interpreter need TRITON_INTERPRET=1 before triton is imported, so they run in processes of their own."""

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreter"]
