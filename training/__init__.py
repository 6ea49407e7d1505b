"""Everything that training needs around its loop, such as checkpoints, the optimizer, processes and logs."""
