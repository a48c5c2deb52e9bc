"""What every package shares and that knows none of them: files, words, YAML, processes, terminals."""
