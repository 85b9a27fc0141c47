"""What the fork server imports for ranks with pretended CUDA devices, in this order."""

import importlib
import os

from triptych.tests.helpers.pretend_cuda import pretend_cuda

pretend_cuda()
if hasattr(os, "SCHED_BATCH"):  # as parallel.device.let_peers_work does where there is no CUDA
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
importlib.import_module("triptych.tests.helpers.pool_preload")
