"""What people have on disk: checkpoints read, loaded, and written."""
