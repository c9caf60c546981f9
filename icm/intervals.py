"""What happens every N agent steps."""


def crossed(step: int, num_envs: int, every: int) -> bool:
    """Whether the last vector step reached or passed a multiple of `every`."""
    return step // every > (step - num_envs) // every
