"""Device, process groups, schedule and sharded optimizer on megatron-core.

Importing this package makes ``megatron.core`` importable on this device, so in every file the
imports of megatron stand below those of ours.
"""

from triptych.parallel.device import prepare_megatron

prepare_megatron()
