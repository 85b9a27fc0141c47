"""Device, process groups, schedule, layout and sharded optimizer on megatron-core."""
