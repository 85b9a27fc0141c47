"""From the plan to the batches of one data-parallel rank."""
