"""Pictures and videos of what an agent does."""
