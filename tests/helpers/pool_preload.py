"""What the fork server imports once for all ranks: torch, and what tests reach of megatron-core
and of a run.

Forking is safe because none of this starts a thread (OMP_NUM_THREADS=1) or touches a device.
"""

import gc
import importlib

from triptych.parallel.megatron_finder import prepare_megatron

MODULES = (
    "torch._dynamo",
    "deepspeed.runtime.zero.muon.original_muon",  # else with the first optimizer, for a second
    "hydra._internal.core_plugins",
    "megatron.core.distributed",
    "megatron.core.models.gpt",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel",
    "triptych.configs.validate",
    "triptych.parallel.zero.deepspeed",
    "triptych.parallel.zero.megatron",
    "triptych.train.run",
)

prepare_megatron()
for name in MODULES:
    importlib.import_module(name)
gc.freeze()  # ranks share the pages of these modules as long as no collector touches them
