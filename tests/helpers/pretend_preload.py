"""What the fork server imports for ranks with pretended CUDA devices, in this order."""

import importlib

from triptych.tests.helpers.pretend_cuda import pretend_cuda

pretend_cuda()
importlib.import_module("triptych.tests.helpers.pool_preload")
