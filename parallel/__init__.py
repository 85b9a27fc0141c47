"""Device, process groups, schedule and sharded optimizer on megatron-core.

Importing this package makes ``megatron.core`` importable on this device, so in every file the
imports of megatron stand below those of ours. The package by itself imports neither torch nor
megatron-core.
"""

from triptych.parallel.megatron_finder import prepare_megatron

prepare_megatron()
