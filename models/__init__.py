"""Model code, composed from megatron-core modules."""
