"""Where a teacher's knowledge comes from."""
