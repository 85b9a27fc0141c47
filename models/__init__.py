"""Model code, composed from megatron-core modules, which ``parallel`` makes importable."""

import triptych.parallel  # noqa: F401  # before any module here imports megatron
