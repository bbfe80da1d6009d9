"""What a run will cost in memory, bytes, FLOPs and hours, before it starts."""
