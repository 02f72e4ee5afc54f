"""What surrounds a run, beside training itself: the lock of its folder, its heartbeat, how it ended. Optional."""
