"""What a process that lasts needs: its machine, a directory of its own, signals, and what it says and writes."""
