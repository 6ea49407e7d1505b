"""What training needs around its loop: checkpoints, resume, optimizer, processes, weights, logs, estimates."""
