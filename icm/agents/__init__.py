"""Learners. Each one has `act`, `observe`, `update` and `state_dict`."""
