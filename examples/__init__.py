"""Projects that use the trainer as yours would. The trainer imports none of them: its commands look them up by name."""
