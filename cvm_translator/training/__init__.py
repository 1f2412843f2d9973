"""The loop that teachers and students share, its step, and the guard that may turn it back."""
