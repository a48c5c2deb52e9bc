"""What a person types: one file a command (base/commands.py names them); bench/ and check/ measure and prove."""
