"""What a run writes about itself: its folder, its identity, metrics, loggers, the console."""
