"""What happens before step 0: derived numbers, shapes, memory, the start screen, building, launching."""
